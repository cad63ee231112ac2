// Errors as OpenAI's clients read them: {"error": {message, type, param, code}}. The one place that knows which code has
// which status. Messages of 5xx are fixed texts, and a message that looks like it holds a path, an address or a stack is
// replaced (faults.md B77): the cause is in the log under the request's id.

import { asGatewayError, type ErrorCode, GatewayError, type LineError } from '../errors.ts';

/** Failures of HTTP itself, which no other layer can cause. */
export class HttpError extends Error {
  readonly status: 403 | 404 | 405 | 408 | 415 | 499;
  readonly code: string;
  readonly headers: Readonly<Record<string, string>>;

  constructor(
    status: HttpError['status'],
    code: string,
    message: string,
    headers: Readonly<Record<string, string>> = {},
  ) {
    super(message);
    this.name = 'HttpError';
    this.status = status;
    this.code = code;
    this.headers = headers;
  }
}

export interface Problem {
  readonly status: number;
  readonly headers: Readonly<Record<string, string>>;
  readonly error: {
    readonly message: string;
    readonly type: string;
    readonly param: string | null;
    readonly code: string;
    /** The first wrong lines of a file that was sent. */
    readonly lines?: readonly LineError[];
  };
}

interface Rule {
  readonly status: number;
  /** Instead of the error's own, which is for the log. */
  readonly message?: string;
  /** OpenAI's clients repeat 409 and 5xx unless told not to; the same call would fail the same way. */
  readonly retry?: false;
}

const rules: Readonly<Record<ErrorCode, Rule>> = {
  INVALID_REQUEST: { status: 400 },
  INVALID_BUDGET: { status: 400 },
  CONTEXT_LENGTH_EXCEEDED: { status: 400 },
  MODEL_NOT_FOUND: { status: 404 },
  ADAPTER_NOT_FOUND: { status: 404 },
  ADAPTER_EXISTS: { status: 409, retry: false },
  ADAPTER_IN_USE: { status: 409, retry: false },
  GENERATION_MISMATCH: { status: 409, retry: false },
  INVALID_ADAPTER: { status: 422 },
  ADAPTER_CORRUPT: {
    status: 500,
    message: 'the stored adapter no longer matches its hash',
    retry: false,
  },
  BASE_MISMATCH: { status: 422 },
  INVALID_FILE: { status: 422 },
  FILE_NOT_FOUND: { status: 404 },
  FILE_IN_USE: { status: 409, retry: false },
  JOB_NOT_FOUND: { status: 404 },
  QUOTA_EXCEEDED: { status: 429, retry: false },
  TRAINER_FAILED: { status: 500, message: 'the trainer failed', retry: false },
  INVALID_MODEL_FILE: { status: 500, message: 'the base model cannot be used' },
  SHAPE_MISMATCH: { status: 500, message: 'internal error' },
  UNSUPPORTED: { status: 400 },
  FORBIDDEN: { status: 403 },
  UNAUTHENTICATED: { status: 401 },
  PAYLOAD_TOO_LARGE: { status: 413 },
  CONTENDED: { status: 429 },
  NO_CAPACITY: { status: 503 },
  DEADLINE_TOO_SHORT: { status: 504, retry: false },
  // Not a 5xx: clients repeat those by themselves, and this request has killed the engine twice.
  ENGINE_POISONED: { status: 422 },
  ENGINE_FAILED: { status: 500, message: 'the engine failed on this request' },
  DISK_FULL: { status: 507, message: 'no space left to store this', retry: false },
  // nginx's "client closed request": nobody reads it, the log does.
  CANCELLED: { status: 499 },
  INTERNAL: { status: 500, message: 'internal error' },
};

/** A POSIX or Windows path, a heap address, a stack frame, a file URL. */
const revealing =
  /(?:^|[\s'"`(=:[])(?:\/[\w.@+-]+){2,}|[A-Za-z]:\\|0x[0-9a-f]{6,}|\n\s+at |file:\/\//i;

export function problemOf(thrown: unknown): Problem {
  if (thrown instanceof HttpError) {
    const { status, code, message, headers } = thrown;
    return { status, headers, error: { message, type: typeOf(status), param: null, code } };
  }
  const error = asGatewayError(thrown);
  const { code, param = null, lines } = error;
  const { status, message = harmless(error) } = rules[code];
  const shown = code === 'UNAUTHENTICATED' ? 'invalid_api_key' : code.toLowerCase();
  return {
    status,
    headers: headersOf(error),
    error: {
      message,
      type: typeOf(status),
      param,
      code: shown,
      ...(lines === undefined ? {} : { lines }),
    },
  };
}

function harmless({ code, message }: GatewayError): string {
  return revealing.test(message) ? code.toLowerCase().replaceAll('_', ' ') : message;
}

function headersOf({ code, retryAfterS }: GatewayError): Record<string, string> {
  const retryAfter = { 'retry-after': String(Math.max(1, Math.ceil(retryAfterS ?? 1))) };
  if (code === 'CONTENDED' || code === 'NO_CAPACITY') return retryAfter;
  if (code === 'UNAUTHENTICATED') return { 'www-authenticate': 'Bearer' };
  // A strict budget that only the load of now breaks: the caller is told when, and no client repeats it by itself.
  const later = code === 'DEADLINE_TOO_SHORT' && retryAfterS !== undefined ? retryAfter : {};
  return rules[code].retry === false ? { 'x-should-retry': 'false', ...later } : {};
}

function typeOf(status: number): string {
  const types: Record<number, string> = {
    401: 'authentication_error',
    403: 'permission_error',
    429: 'rate_limit_error',
  };
  return types[status] ?? (status >= 500 ? 'server_error' : 'invalid_request_error');
}

export function invalidRequest(message: string, param?: string): GatewayError {
  return new GatewayError('INVALID_REQUEST', message, param === undefined ? {} : { param });
}
