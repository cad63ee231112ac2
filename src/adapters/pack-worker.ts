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
  // All pages are views of one buffer: it moves, uncopied.
  const [first] = answer.kind === 'read' ? answer.contents.modules.values() : [];
  parentPort?.postMessage(answer, first === undefined ? [] : [first.a.buffer as ArrayBuffer]);
});
