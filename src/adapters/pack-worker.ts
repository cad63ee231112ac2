// The thread that reads packed files for the engine (pack-reader.ts): one after the other, in the order of the asking.

import { parentPort } from 'node:worker_threads';
import { asGatewayError, type ErrorCode } from '../errors.ts';
import type { Generation } from './adapter.ts';
import { type PackedContents, readContents } from './pack.ts';

export interface PackTask {
  readonly path: string;
  readonly generation: Generation;
}

export type PackAnswer =
  | { readonly kind: 'read'; readonly contents: PackedContents }
  | { readonly kind: 'failed'; readonly code: ErrorCode; readonly message: string };

parentPort?.on('message', ({ path, generation }: PackTask) => {
  let answer: PackAnswer;
  try {
    answer = { kind: 'read', contents: readContents(path, generation) };
  } catch (error) {
    const { code, message } = asGatewayError(error);
    answer = { kind: 'failed', code, message };
  }
  parentPort?.postMessage(answer, answer.kind === 'read' ? buffersOf(answer.contents) : []);
});

/** They move, uncopied. Most pages are views of the file's one buffer. */
function buffersOf({ modules, floats }: PackedContents): ArrayBuffer[] {
  const views = [...modules.values()].flatMap(({ a, b }) => [a, b]);
  const all = [...views, ...[...floats.values()].map(({ values }) => values)];
  return [...new Set(all.map(({ buffer }) => buffer as ArrayBuffer))];
}
