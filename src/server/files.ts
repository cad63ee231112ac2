// OpenAI's files, for fine-tuning: received in a stream, hashed, every line judged while it arrives, kept when it resolves.
// What is no training file is refused with the numbers of its wrong lines. A tenant sees its own alone, the operator all.

import { createHash } from 'node:crypto';
import { constants } from 'node:fs';
import { mkdir, open, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { Readable } from 'node:stream';
import type { Context } from 'hono';
import { GatewayError, type LineError } from '../errors.ts';
import { readExampleLines } from '../jobs/example-lines.ts';
import type { TrainingFile, Viewer } from '../jobs/job.ts';
import type { Caller } from './auth.ts';
import type { ServerDeps, Training } from './deps.ts';
import type { Env, Handle } from './env.ts';
import { checkUncompressed, pacedBytes, paceOf, unsupportedMedia } from './limits.ts';
import { boundaryOf, type Part, readMultipart, readText } from './multipart.ts';
import { type Described, listOf, pageWishOf } from './page-query.ts';
import { invalidRequest } from './problem.ts';
import { createFolders, storeError, type UploadFiles } from './upload.ts';

const lineErrorsMax = 100;

/** Throws UNSUPPORTED where nothing is trained. */
export function trainingOf({ training }: ServerDeps): Training {
  if (training !== null) return training;
  throw new GatewayError('UNSUPPORTED', 'training is switched off here (trainersMax is 0)');
}

export const ownerOf = ({ namespace }: Caller): string => namespace ?? '';
export const viewerOf = (caller: Caller): Viewer => (caller.isOperator ? null : ownerOf(caller));

export function createAddFile(calls: UploadFiles = { mkdir, open, rm }): Handle {
  const inFolder = createFolders(calls);
  return async function addFile(c, deps) {
    const { files } = trainingOf(deps);
    const boundary = boundaryOf(c.req.header('content-type') ?? '');
    if (boundary === null) throw unsupportedMedia('want multipart/form-data with a boundary');
    checkUncompressed(c.req.raw.headers);
    const owner = ownerOf(c.get('caller'));
    return inFolder(c, deps, async (folder) => {
      const path = join(folder, 'file');
      const bytesMax = Math.min(deps.config.fileBytesMax, files.room(owner));
      const body = pacedBytes(c.req.raw, deps.clock, paceOf(bytesMax + 64 * 1024));
      const parts = readMultipart(body, boundary);
      const received = await receiveParts(parts, (part) =>
        receiveFile(part, path, bytesMax, calls),
      );
      return c.json(describeFile(await files.add(path, { owner, ...received })));
    });
  };
}

type Received = Pick<TrainingFile, 'filename' | 'bytes' | 'examples' | 'sha256'>;

/** OpenAI's client sends the file first, others the purpose. */
async function receiveParts(
  parts: AsyncIterable<Part>,
  receive: (part: Part) => Promise<Received>,
): Promise<Received> {
  let purpose: string | null = null;
  let received: Received | null = null;
  for await (const part of parts) {
    if (part.name === 'purpose' && purpose === null) {
      purpose = await readText(part, 64);
      if (purpose !== 'fine-tune') {
        throw new GatewayError('UNSUPPORTED', 'purpose: only fine-tune', { param: 'purpose' });
      }
    } else if (part.name === 'file' && received === null) received = await receive(part);
    else throw invalidRequest(`${part.name}: unknown, unsupported or there twice`, part.name);
  }
  if (purpose === null) throw invalidRequest('purpose is wanted', 'purpose');
  if (received === null) throw invalidRequest('file is wanted', 'file');
  return received;
}

async function receiveFile(
  part: Part,
  path: string,
  bytesMax: number,
  calls: UploadFiles,
): Promise<Received> {
  const flags = constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL;
  const file = await calls.open(path, flags, 0o600).catch(storeError);
  const hash = createHash('sha256');
  let bytes = 0;
  async function* kept(): AsyncGenerator<Uint8Array, void> {
    for await (const chunk of part.body) {
      bytes += chunk.length;
      if (bytes > bytesMax) {
        const message = `the file is larger than ${bytesMax} bytes`;
        throw new GatewayError('PAYLOAD_TOO_LARGE', message, { param: 'file' });
      }
      hash.update(chunk);
      await file.writeFile(chunk).catch(storeError);
      yield chunk;
    }
  }
  try {
    const examples = await countExamples(kept());
    await file.sync().catch(storeError);
    const filename = part.filename ?? 'file';
    return { filename, bytes, examples, sha256: hash.digest('hex') };
  } finally {
    await file.close().catch(() => {});
  }
}

/** Throws INVALID_FILE with the first wrong lines. */
async function countExamples(chunks: AsyncIterable<Uint8Array>): Promise<number> {
  const wrong: LineError[] = [];
  let examples = 0;
  for await (const entry of readExampleLines(chunks)) {
    if ('shape' in entry) examples += 1;
    else wrong.push({ line: entry.line, message: entry.error.slice(0, 200) });
    if (wrong.length === lineErrorsMax) break; // What follows is not even read.
  }
  const [first] = wrong;
  if (first !== undefined) {
    const more = wrong.length === 1 ? '' : `, and ${wrong.length - 1} more lines`;
    const message = `line ${first.line}: ${first.message}${more}`;
    throw new GatewayError('INVALID_FILE', message, { param: 'file', lines: wrong });
  }
  if (examples > 0) return examples;
  throw new GatewayError('INVALID_FILE', 'the file has no examples', { param: 'file' });
}

export function listFiles(c: Context<Env>, deps: ServerDeps): Response {
  const { files } = trainingOf(deps);
  const wish = pageWishOf(c, ['order', 'purpose']);
  const { purpose = 'fine-tune' } = c.req.query();
  if (purpose !== 'fine-tune') return c.json(listOf({ items: [], hasMore: false }, describeFile));
  return c.json(listOf(files.list(viewerOf(c.get('caller')), wish), describeFile));
}

export function showFile(c: Context<Env>, deps: ServerDeps): Response {
  return c.json(describeFile(fileOf(c, deps)));
}

export async function sendFile(c: Context<Env>, deps: ServerDeps): Promise<Response> {
  const { id, bytes } = fileOf(c, deps);
  // Opened at once: who removes it meanwhile takes its name, not its bytes.
  const file = await open(trainingOf(deps).files.pathOf(id)).catch((cause: unknown) => {
    throw new GatewayError('INTERNAL', 'a file that is known cannot be read', { cause });
  });
  c.header('content-type', 'application/jsonl');
  c.header('content-length', String(bytes));
  return c.body(Readable.toWeb(file.createReadStream()) as ReadableStream);
}

export async function deleteFile(c: Context<Env>, deps: ServerDeps): Promise<Response> {
  const file = fileOf(c, deps);
  await trainingOf(deps).files.remove(file);
  return c.json({ id: file.id, object: 'file', deleted: true });
}

function fileOf(c: Context<Env>, deps: ServerDeps): TrainingFile {
  const file = trainingOf(deps).files.find(c.req.param('id') ?? '', viewerOf(c.get('caller')));
  if (file === null) throw new GatewayError('FILE_NOT_FOUND', 'there is no such file');
  return file;
}

function describeFile(file: TrainingFile): Described {
  const { id, bytes, createdS, filename, examples, sha256 } = file;
  return {
    id,
    object: 'file',
    bytes,
    created_at: createdS,
    filename,
    purpose: 'fine-tune',
    status: 'processed',
    rankgate: { examples, sha256 },
  };
}
