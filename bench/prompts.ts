// The token ids that the jobs use as prompts: windows of the story and the report of the greedy oracle (real English, so
// that no answer ends within the measured tokens), read from its golden file, so that no side needs a tokenizer.

import { readFileSync } from 'node:fs';
import { join } from 'node:path';

interface Golden {
  readonly prompts: ReadonlyArray<{ readonly name: string; readonly promptIds: readonly number[] }>;
}

const path = join(import.meta.dirname, '../test/golden/llama-cpp/greedy-q4_1.json');

function corpus(): number[] {
  const golden = JSON.parse(readFileSync(path, 'utf8')) as Golden;
  const names = ['raw-story', 'raw-report', 'raw-typescript'];
  return names.flatMap((name) => {
    const prompt = golden.prompts.find((one) => one.name === name);
    if (prompt === undefined) throw new Error(`${path} has no prompt ${name}`);
    return [...prompt.promptIds];
  });
}

/** `count` prompts of `length` tokens that start at different places. */
export function takePrompts(count: number, length: number): number[][] {
  const ids = corpus();
  const stride = Math.floor((ids.length - length) / Math.max(1, count));
  if (stride < 1) throw new RangeError(`the corpus has ${ids.length} tokens only`);
  return Array.from({ length: count }, (_, i) => ids.slice(i * stride, i * stride + length));
}

/** `length` tokens of the corpus, from `start` on, over and over: where only the amount of text matters. */
export function takeTokens(length: number, start = 0): number[] {
  const ids = corpus();
  return Array.from({ length }, (_, i) => ids[(start + i) % ids.length]!);
}
