// An example as a task: the prompt of its last answer, and that answer as text.

import type { GgufMetadata } from '../model/gguf-values.ts';
import { endTokensOf, readVocabulary, tokenBytes } from '../model/tokenizer.ts';
import type { Example } from './examples.ts';

export interface Task {
  readonly prompt: Int32Array;
  readonly expected: string;
}

/** Tokens of answers as a caller would see them. */
export interface AnswerText {
  readonly ends: ReadonlySet<number>;
  readonly textOf: (tokens: Iterable<number>) => string;
}

export function answerText(metadata: GgufMetadata): AnswerText {
  const vocabulary = readVocabulary(metadata);
  const bytesOf = tokenBytes(vocabulary);
  return {
    ends: new Set(endTokensOf(vocabulary)),
    textOf: (tokens) =>
      Buffer.concat(Array.from(tokens, (token) => bytesOf(token) ?? new Uint8Array())).toString(),
  };
}

export function taskOf({ tokens, learnt }: Example, { ends, textOf }: AnswerText): Task {
  const end = learnt.lastIndexOf(1) + 1;
  const start = learnt.lastIndexOf(0, end - 1) + 1;
  const answer = tokens.subarray(start, end).filter((token) => !ends.has(token));
  return { prompt: tokens.slice(0, start), expected: textOf(answer) };
}
