// The texts of `bench train`: TypeScript's compiler messages as its package ships them, in English and in languages that people
// translated them to. A task is a language; an example asks for the translation of one message. Which side of the split a
// message is on is decided by the hash of its key, so one that is held out is held out in every language.

import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';

export const tasks = ['de', 'es'] as const;
export type Task = (typeof tasks)[number];

export interface TextSizes {
  readonly training: number;
  readonly heldOut: number;
}

export interface TextExample {
  readonly prompt: string;
  readonly completion: string;
}

export interface TaskTexts {
  readonly training: readonly TextExample[];
  readonly heldOut: readonly TextExample[];
}

const names: Readonly<Record<Task, string>> = { de: 'German', es: 'Spanish' };
const library = dirname(createRequire(import.meta.url).resolve('typescript/lib/_tsc.js'));
/** Characters of either side: both fit a window of 128 tokens. */
const charactersMax = 72;
const heldOutShare = 0.2;

export const textSource: string = `typescript ${
  (JSON.parse(readFileSync(join(library, '../package.json'), 'utf8')) as { version: string })
    .version
}: compiler messages of lib/_tsc.js and lib/{${tasks.join(',')}}/diagnosticMessages.generated.json, up to ${charactersMax} characters`;

/** By key, as the compiler declares them: `diag(1002, 1, "Unterminated_string_literal_1002", "Unterminated string literal.")`. */
export function englishMessages(source: string): Map<string, string> {
  const text = String.raw`"(?:[^"\\]|\\.)*"`;
  const call = new RegExp(String.raw`\bdiag\(\d+, \d+ /\* \w+ \*/, (${text}), (${text})`, 'g');
  const entries = [...source.matchAll(call)].map(
    ([, key, message]) => [JSON.parse(key!), JSON.parse(message!)] as [string, string],
  );
  return new Map(entries);
}

/** Uniform in [0, 1). */
function placeOf(key: string): number {
  return createHash('sha256').update(key).digest().readUInt32BE(0) / 2 ** 32;
}

/** In the order of their hashes. Throws RangeError when there are fewer. */
export function readTask(task: Task, sizes: TextSizes): TaskTexts {
  const english = englishMessages(readFileSync(join(library, '_tsc.js'), 'utf8'));
  const path = join(library, task, 'diagnosticMessages.generated.json');
  const translated = JSON.parse(readFileSync(path, 'utf8')) as Record<string, string>;
  const found = Object.entries(translated).flatMap(([key, translation]) => {
    const message = english.get(key);
    const isUsed =
      message !== undefined &&
      message !== translation &&
      Math.max(message.length, translation.length) <= charactersMax;
    return isUsed ? [{ message, translation, place: placeOf(key) }] : [];
  });
  found.sort((a, b) => a.place - b.place);
  const take = (isHeldOut: boolean, count: number): TextExample[] => {
    const side = found.filter(({ place }) => place < heldOutShare === isHeldOut).slice(0, count);
    if (side.length < count) throw new RangeError(`${task}: ${side.length} texts, want ${count}`);
    return side.map(({ message, translation }) => ({
      prompt: `English: ${message}\n${names[task]}:`,
      completion: ` ${translation}`,
    }));
  };
  return { training: take(false, sizes.training), heldOut: take(true, sizes.heldOut) };
}

export function asLines(examples: readonly TextExample[]): string {
  return examples.map((example) => `${JSON.stringify(example)}\n`).join('');
}
