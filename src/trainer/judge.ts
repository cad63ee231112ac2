// A judge: the base, without an adapter, is asked about an answer in the next turn of the same conversation. Its verdict is how
// probable `yes` is, of all spellings of `yes` and `no`, as the first token of what it would say: no text is sampled.

import { GatewayError } from '../errors.ts';
import type { GgufMetadata } from '../model/gguf-values.ts';
import { openText, templateDate } from './examples.ts';

export interface Judge {
  /** What comes behind an answer: its end, the question, and what begins the reply. */
  readonly suffix: Int32Array;
  readonly yes: ReadonlySet<number>;
  readonly no: ReadonlySet<number>;
}

/** Of a question as long as a recipe may have it, and what the template writes around it. */
const charactersMax = 32_768;

/** Throws UNSUPPORTED for a base without turns, or whose tokens do not tell the two words apart. */
export function createJudge(metadata: GgufMetadata, question: string): Judge {
  const { tokenizer, template } = openText(metadata);
  if (template === null) throw unsupported('the model file has no chat template');
  const turns = [
    { role: 'user', content: 'q' },
    { role: 'assistant', content: 'a' },
    { role: 'user', content: question },
  ];
  const rendered = (count: number) =>
    template.render({
      messages: turns.slice(0, count),
      markNotIn: turns.map(({ content }) => content), // so that both have one mark
      templateArguments: {},
      now: templateDate,
      charactersMax,
    });
  const { marked, mark } = rendered(3);
  const before = `${rendered(1).marked}a`;
  if (!marked.startsWith(before)) {
    throw unsupported('the chat template does not write an answer behind the prompt for it');
  }
  const tokens = tokenizer.encodePrompt(marked.slice(before.length), mark, 4 * charactersMax);
  const suffix = tokenizer.addsBos && tokens[0] === tokenizer.bos ? tokens.subarray(1) : tokens;
  const firstOf = (word: string): Set<number> => {
    const spellings = [word, word[0]!.toUpperCase() + word.slice(1), word.toUpperCase()];
    const texts = spellings.flatMap((one) => [one, ` ${one}`]);
    return new Set(texts.map((one) => tokenizer.encodeText(one, one.length)[0]!));
  };
  const [yes, no] = [firstOf('yes'), firstOf('no')];
  // A space alone begins both.
  for (const token of [...yes].filter((one) => no.has(one))) {
    yes.delete(token);
    no.delete(token);
  }
  if (yes.size === 0 || no.size === 0) throw unsupported('yes and no begin with one token');
  return { suffix, yes, no };
}

/** P(yes) / (P(yes) + P(no)). */
export function verdictOf({ yes, no }: Judge, logits: Float32Array): number {
  const most = [...yes, ...no].reduce((max, token) => Math.max(max, logits[token]!), -Infinity);
  const mass = (tokens: ReadonlySet<number>): number =>
    [...tokens].reduce((sum, token) => sum + Math.exp(logits[token]! - most), 0);
  return mass(yes) / (mass(yes) + mass(no));
}

function unsupported(message: string): GatewayError {
  return new GatewayError('UNSUPPORTED', `a judge: ${message}`, { param: 'method.reward' });
}
