// The thread that reads packed files, and merges them, for the engine (pack-reader.ts): one after the other, in the order of
// the asking.

import { parentPort } from 'node:worker_threads';
import { asGatewayError, type ErrorCode } from '../errors.ts';
import type { Generation } from './adapter.ts';
import { blendContents } from './blend.ts';
import type { BlendKey } from './blend-key.ts';
import { type PackedContents, readContents } from './pack.ts';
import { CheckedFiles } from './pack-file.ts';

export interface PackTask {
  /** null: the file itself. */
  readonly blend: BlendKey | null;
  readonly files: readonly { readonly path: string; readonly generation: Generation }[];
}

export type PackAnswer =
  | { readonly kind: 'read'; readonly contents: PackedContents }
  | { readonly kind: 'failed'; readonly code: ErrorCode; readonly message: string };

const checkedFiles = new CheckedFiles(Date.now);

parentPort?.on('message', ({ blend, files }: PackTask) => {
  let answer: PackAnswer;
  try {
    const parts = files.map(({ path, generation }) => readContents(path, generation, checkedFiles));
    const contents = blend === null ? parts[0]! : blendContents(blend, parts);
    answer = { kind: 'read', contents };
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
