// Errors as OpenAI's clients read them: {"error": {message, type, param, code}}. The one place that knows which code has
// which status. Messages of 5xx are fixed texts, and a message that looks like it holds a path, an address or a stack is
// replaced (faults.md B77): the cause is in the log under the request's id.

import { asGatewayError, type ErrorCode, GatewayError } from '../errors.ts';

/** Failures of HTTP itself, which no other layer can cause. */
export class HttpError extends Error {
  readonly status: 403 | 404 | 405 | 415 | 499;
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
  };
}

/** 499 is nginx's "client closed request": nobody reads it, the log does. */
const statuses: Readonly<Record<ErrorCode, number>> = {
  INVALID_REQUEST: 400,
  INVALID_BUDGET: 400,
  CONTEXT_LENGTH_EXCEEDED: 400,
  MODEL_NOT_FOUND: 404,
  ADAPTER_NOT_FOUND: 404,
  ADAPTER_EXISTS: 409,
  GENERATION_MISMATCH: 409,
  INVALID_ADAPTER: 422,
  ADAPTER_CORRUPT: 500,
  BASE_MISMATCH: 422,
  INVALID_MODEL_FILE: 500,
  SHAPE_MISMATCH: 500,
  UNSUPPORTED: 400,
  FORBIDDEN: 403,
  UNAUTHENTICATED: 401,
  PAYLOAD_TOO_LARGE: 413,
  CONTENDED: 429,
  NO_CAPACITY: 503,
  DEADLINE_TOO_SHORT: 504,
  // Not a 5xx: clients repeat those by themselves, and this request has killed the engine twice.
  ENGINE_POISONED: 422,
  ENGINE_FAILED: 500,
  DISK_FULL: 507,
  CANCELLED: 499,
  INTERNAL: 500,
};

const fixedMessages: Partial<Record<ErrorCode, string>> = {
  ADAPTER_CORRUPT: 'the stored adapter no longer matches its hash',
  INVALID_MODEL_FILE: 'the base model cannot be used',
  SHAPE_MISMATCH: 'internal error',
  ENGINE_FAILED: 'the engine failed on this request',
  DISK_FULL: 'no space left to store this',
  INTERNAL: 'internal error',
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
  const status = statuses[error.code];
  return {
    status,
    headers: headersOf(error),
    error: {
      message: messageOf(error),
      type: typeOf(status),
      param: error.param ?? null,
      code: error.code === 'UNAUTHENTICATED' ? 'invalid_api_key' : error.code.toLowerCase(),
    },
  };
}

function messageOf(error: GatewayError): string {
  const fixed = fixedMessages[error.code];
  if (fixed !== undefined) return fixed;
  if (revealing.test(error.message)) return error.code.toLowerCase().replaceAll('_', ' ');
  return error.message;
}

function headersOf(error: GatewayError): Record<string, string> {
  switch (error.code) {
    case 'CONTENDED':
    case 'NO_CAPACITY':
      return { 'retry-after': String(Math.max(1, Math.ceil(error.retryAfterS ?? 1))) };
    case 'UNAUTHENTICATED':
      return { 'www-authenticate': 'Bearer' };
    // OpenAI's clients repeat 409 and 5xx unless told not to; the same call would fail the same way.
    case 'DEADLINE_TOO_SHORT':
    case 'GENERATION_MISMATCH':
    case 'ADAPTER_EXISTS':
    case 'ADAPTER_CORRUPT':
    case 'DISK_FULL':
      return { 'x-should-retry': 'false' };
    default:
      return {};
  }
}

function typeOf(status: number): string {
  switch (status) {
    case 401:
      return 'authentication_error';
    case 403:
      return 'permission_error';
    case 429:
      return 'rate_limit_error';
    default:
      return status >= 500 ? 'server_error' : 'invalid_request_error';
  }
}

export function invalidRequest(message: string, param?: string): GatewayError {
  return new GatewayError('INVALID_REQUEST', message, param === undefined ? {} : { param });
}
