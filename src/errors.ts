// Every failure that a caller can cause or must handle has one stable code here. No HTTP in this file:
// server/problem.ts maps codes to statuses. Messages say what was got, what was wanted, and which name; they never
// carry a path, an address or a stack (faults.md B77).

export type ErrorCode =
  | 'INVALID_REQUEST' // a field is missing, unknown, out of range or not implemented
  | 'INVALID_BUDGET' // a latency budget that is not a finite number > 0, or an unknown tier
  | 'CONTEXT_LENGTH_EXCEEDED'
  | 'MODEL_NOT_FOUND' // the model field names no base and no adapter
  | 'ADAPTER_NOT_FOUND'
  | 'ADAPTER_EXISTS'
  | 'ADAPTER_IN_USE' // aliases follow the name, or it is pinned
  | 'GENERATION_MISMATCH' // compare-and-swap lost: the name points at another generation
  | 'INVALID_ADAPTER' // a hostile, broken or unsupported adapter file
  | 'ADAPTER_CORRUPT' // bytes on disk no longer match their hash
  | 'BASE_MISMATCH' // made for another base model
  | 'INVALID_MODEL_FILE' // a hostile, broken or unsupported base model file
  | 'INVALID_FILE' // no file of examples: `lines` says where
  | 'FILE_NOT_FOUND'
  | 'FILE_IN_USE' // a job that has not ended needs it
  | 'JOB_NOT_FOUND'
  | 'QUOTA_EXCEEDED' // an owner's own limit: waiting does not help, removing does
  | 'TRAINER_FAILED' // the trainer process died too often
  | 'SHAPE_MISMATCH' // caught in TypeScript, before native code would abort the process
  | 'UNSUPPORTED' // a real feature that this build does not have
  | 'FORBIDDEN'
  | 'UNAUTHENTICATED'
  | 'PAYLOAD_TOO_LARGE'
  | 'CONTENDED' // capacity exists and is taken: retry later (429)
  | 'NO_CAPACITY' // no capacity now: starting, draining, engine down (503)
  | 'DEADLINE_TOO_SHORT' // strict was asked and even rank 0 cannot make it
  | 'ENGINE_POISONED' // this request killed the engine twice
  | 'ENGINE_FAILED'
  | 'DISK_FULL'
  | 'CANCELLED' // the caller went away
  | 'INTERNAL';

/** Of a file that was sent; lines are counted from 1. */
export interface LineError {
  readonly line: number;
  readonly message: string;
}

export interface ErrorDetails {
  readonly param?: string;
  readonly lines?: readonly LineError[];
  readonly retryAfterS?: number;
  readonly cause?: unknown;
}

export class GatewayError extends Error {
  readonly code: ErrorCode;
  readonly param: string | undefined;
  readonly lines: readonly LineError[] | undefined;
  readonly retryAfterS: number | undefined;

  constructor(code: ErrorCode, message: string, details: ErrorDetails = {}) {
    super(message, details.cause === undefined ? undefined : { cause: details.cause });
    this.name = 'GatewayError';
    this.code = code;
    this.param = details.param;
    this.lines = details.lines;
    this.retryAfterS = details.retryAfterS;
  }
}

/** The error as itself when it is ours, else wrapped as INTERNAL with the original as cause. */
export function asGatewayError(error: unknown): GatewayError {
  if (error instanceof GatewayError) return error;
  return new GatewayError('INTERNAL', 'internal error', { cause: error });
}
