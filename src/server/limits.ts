// What a request body may be before anything looks inside: UTF-8 JSON, uncompressed, counted while it arrives. A
// Content-Length can only shorten the wait for the refusal; it is never trusted to be true (faults.md B61, B64, section 5).
// Whoever sends too slowly is cut off, whatever they send.

import type { Context } from 'hono';
import type { z } from 'zod';
import type { EngineClock } from '../engine/clock.ts';
import { GatewayError } from '../errors.ts';
import type { ServerDeps } from './deps.ts';
import type { Env } from './env.ts';
import { HttpError, invalidRequest } from './problem.ts';
import { parseBody } from './schemas.ts';
import { parseStrictJson } from './strict-json.ts';

// Beyond any body of this API. Depth is far from any parser's stack. Measured on two loaded vCPUs, Node 20.20.2: 10,000
// keys take 9 ms of CPU to read, 4 MiB of text 17 ms; 250,000 keys, which fit the same bytes, took 400 ms.
const jsonLimits = { depthMax: 32, keysMax: 10_000 } as const;

/** A sender is waited for in all as long as `graceMs` and what it has sent takes at `bytesPerSecondMin`. */
export interface Pace {
  readonly bytesMax: number;
  readonly graceMs: number;
  readonly bytesPerSecondMin: number;
}

// A guess: far below any link that a body of this API is sent over.
export const paceOf = (bytesMax: number): Pace => ({
  bytesMax,
  graceMs: 15_000,
  bytesPerSecondMin: 64 * 1024,
});

/** Throws 415, 408, PAYLOAD_TOO_LARGE, INVALID_REQUEST, or CANCELLED when the client goes away while sending. */
export async function readBody<T>(
  c: Context<Env>,
  { config, clock }: ServerDeps,
  schema: z.ZodType<T>,
): Promise<T> {
  const request = c.req.raw;
  checkMediaType(request.headers);
  const chunks: Uint8Array[] = [];
  for await (const chunk of pacedBytes(request, clock, paceOf(config.bodyBytesMax))) {
    chunks.push(chunk);
  }
  const bytes = chunks.length === 1 ? chunks[0]! : Buffer.concat(chunks);
  if (bytes.length === 0) throw invalidRequest('the body is empty; a JSON object is wanted');
  return parseBody(schema, parseStrictJson(decodeUtf8(bytes), jsonLimits));
}

export function checkUncompressed(headers: Headers): void {
  const encoding = headers.get('content-encoding');
  if (encoding !== null && encoding.trim().toLowerCase() !== 'identity') {
    throw unsupportedMedia('compressed bodies are not accepted: send no content-encoding');
  }
}

function checkMediaType(headers: Headers): void {
  checkUncompressed(headers);
  const type = headers.get('content-type') ?? '';
  if (!/^application\/json\s*(?:;\s*charset="?utf-8"?\s*)?$/i.test(type)) {
    throw unsupportedMedia('the body must be sent as content-type: application/json');
  }
}

/** The body as it arrives, within its pace. Only the wait for the sender counts, not what is done with the bytes. */
export async function* pacedBytes(
  request: Request,
  clock: EngineClock,
  pace: Pace,
): AsyncGenerator<Uint8Array, void> {
  const declared = Number(request.headers.get('content-length') ?? 0);
  if (declared > pace.bytesMax) throw tooLarge(pace.bytesMax);
  if (request.body === null) return;
  const reader = request.body.getReader();
  let [count, waitedMs] = [0, 0];
  try {
    for (;;) {
      const sinceMs = clock.nowMs();
      const leftMs = pace.graceMs + (count / pace.bytesPerSecondMin) * 1000 - waitedMs;
      const { done, value } = await inTime(reader.read(), clock, leftMs);
      if (done) return;
      waitedMs += clock.nowMs() - sinceMs;
      count += value.byteLength;
      // No cancel(): node-server reads on for a bounded while, so that the client gets to see the answer.
      if (count > pace.bytesMax) throw tooLarge(pace.bytesMax);
      yield value;
    }
  } catch (error) {
    if (error instanceof GatewayError || error instanceof HttpError) throw error;
    throw new GatewayError('CANCELLED', 'the client went away while sending', { cause: error });
  } finally {
    reader.releaseLock();
  }
}

function inTime<T>(work: Promise<T>, clock: EngineClock, ms: number): Promise<T> {
  return new Promise((resolve, reject) => {
    const cancel = clock.after(ms, () => {
      const message = 'the body arrives too slowly';
      reject(new HttpError(408, 'request_timeout', message, { connection: 'close' }));
    });
    work.then(resolve, reject).finally(cancel);
  });
}

function decodeUtf8(bytes: Uint8Array): string {
  let text: string;
  try {
    text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    throw invalidRequest('the body is not valid UTF-8');
  }
  if (text.charCodeAt(0) === 0xfeff) {
    throw invalidRequest('the body starts with a byte order mark; send plain UTF-8');
  }
  return text;
}

function tooLarge(bytesMax: number): GatewayError {
  return new GatewayError('PAYLOAD_TOO_LARGE', `the body is larger than ${bytesMax} bytes`);
}

export function unsupportedMedia(message: string): HttpError {
  return new HttpError(415, 'unsupported_media_type', message);
}
