// What a request body may be before anything looks inside: UTF-8 JSON, uncompressed, counted while it arrives. A
// Content-Length can only shorten the wait for the refusal; it is never trusted to be true (faults.md B61, B64, section 5).

import type { Context } from 'hono';
import type { z } from 'zod';
import { GatewayError } from '../errors.ts';
import type { ServerDeps } from './deps.ts';
import type { Env } from './env.ts';
import { HttpError, invalidRequest } from './problem.ts';
import { parseBody } from './schemas.ts';
import { parseStrictJson } from './strict-json.ts';

// Beyond any body of this API. Depth is far from any parser's stack. Measured on two loaded vCPUs, Node 20.20.2: 10,000
// keys take 9 ms of CPU to read, 4 MiB of text 17 ms; 250,000 keys, which fit the same bytes, took 400 ms.
const jsonLimits = { depthMax: 32, keysMax: 10_000 } as const;

/** Throws 415, PAYLOAD_TOO_LARGE, INVALID_REQUEST, or CANCELLED when the client goes away while sending. */
export async function readBody<T>(
  c: Context<Env>,
  { config }: ServerDeps,
  schema: z.ZodType<T>,
): Promise<T> {
  const request = c.req.raw;
  const bytesMax = config.bodyBytesMax;
  checkMediaType(request.headers);
  const declared = Number(request.headers.get('content-length') ?? 0);
  if (declared > bytesMax) throw tooLarge(bytesMax);
  const bytes = await readBytes(request, bytesMax);
  if (bytes.length === 0) throw invalidRequest('the body is empty; a JSON object is wanted');
  return parseBody(schema, parseStrictJson(decodeUtf8(bytes), jsonLimits));
}

function checkMediaType(headers: Headers): void {
  const encoding = headers.get('content-encoding');
  if (encoding !== null && encoding.trim().toLowerCase() !== 'identity') {
    throw unsupportedMedia('compressed bodies are not accepted: send no content-encoding');
  }
  const type = headers.get('content-type') ?? '';
  if (!/^application\/json\s*(?:;\s*charset="?utf-8"?\s*)?$/i.test(type)) {
    throw unsupportedMedia('the body must be sent as content-type: application/json');
  }
}

async function readBytes(request: Request, bytesMax: number): Promise<Uint8Array> {
  if (request.body === null) return new Uint8Array(0);
  const reader = request.body.getReader();
  const chunks: Uint8Array[] = [];
  let count = 0;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      count += value.byteLength;
      // No cancel(): node-server reads on for a bounded while, so that the client gets to see the answer.
      if (count > bytesMax) throw tooLarge(bytesMax);
      chunks.push(value);
    }
  } catch (error) {
    if (error instanceof GatewayError) throw error;
    throw new GatewayError('CANCELLED', 'the client went away while sending', { cause: error });
  } finally {
    reader.releaseLock();
  }
  return chunks.length === 1 ? chunks[0]! : Buffer.concat(chunks, count);
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

function unsupportedMedia(message: string): HttpError {
  return new HttpError(415, 'unsupported_media_type', message);
}
