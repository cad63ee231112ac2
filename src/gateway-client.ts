// The client side of the adapter calls, for the command line. Errors keep the server's message and code; an upload is
// streamed.

export interface ClientOptions {
  readonly url: string;
  readonly apiKey: string | null;
  readonly timeoutMs: number;
}

/** What a command ends with when it is not done: its exit code, a stable code and what to print. */
export class CommandError extends Error {
  readonly exitCode: 1 | 2 | 3;
  readonly code: string;

  constructor(exitCode: 1 | 2 | 3, code: string, message: string) {
    super(message);
    this.exitCode = exitCode;
    this.code = code;
  }
}

export interface Call {
  readonly method: 'GET' | 'POST' | 'PUT' | 'DELETE';
  readonly path: string;
  /** Sent as JSON, or as a form. */
  readonly body?: object;
  /** Told how much of a form was taken from its files. */
  readonly onProgress?: (bytes: number) => void;
  /** Generation that the name must point at, else 409. */
  readonly ifMatch?: string | undefined;
}

/** Throws a CommandError: 1 when the server refused, 3 when nobody answered. */
export async function callGateway(options: ClientOptions, call: Call): Promise<Response> {
  const headers = new Headers();
  if (options.apiKey !== null) headers.set('authorization', `Bearer ${options.apiKey}`);
  const body = encodeBody(call, headers);
  if (call.ifMatch !== undefined) headers.set('if-match', call.ifMatch);
  let response: Response;
  try {
    response = await fetch(new URL(call.path, options.url), {
      method: call.method,
      headers,
      body,
      duplex: 'half',
      signal: AbortSignal.timeout(options.timeoutMs),
    });
  } catch {
    throw new CommandError(3, 'UNREACHABLE', `no rankgate answers at ${options.url}`);
  }
  if (response.ok) return response;
  const text = await response.text();
  let error: { message?: unknown; code?: unknown } = {};
  try {
    error = (JSON.parse(text) as { error?: typeof error }).error ?? {};
  } catch {
    // Not ours: a proxy's page, say.
  }
  throw new CommandError(
    1,
    typeof error.code === 'string' ? error.code : `http_${response.status}`,
    typeof error.message === 'string' ? error.message : `the server answered ${response.status}`,
  );
}

/** Sets the content type with it. */
function encodeBody(
  { body, onProgress }: Call,
  headers: Headers,
): string | ReadableStream<Uint8Array> | null {
  if (body === undefined) return null;
  if (!(body instanceof FormData)) {
    headers.set('content-type', 'application/json');
    return JSON.stringify(body);
  }
  const form = new Response(body);
  headers.set('content-type', form.headers.get('content-type')!);
  let done = 0;
  const count = new TransformStream<Uint8Array, Uint8Array>({
    transform(chunk, controller) {
      done += chunk.length;
      onProgress?.(done);
      controller.enqueue(chunk);
    },
  });
  return form.body!.pipeThrough(count);
}
