// Scores of answers, 0 … 1, that a recipe can name (jobs/reward-recipe.ts). Equal to rouge-score's F1, nltk's GLEU and
// rapidfuzz's ratio on English text (test/golden/trainer/similarity.json); words are any script's here.

import type { RewardRecipe, SingleReward } from '../jobs/reward-recipe.ts';

export interface Judged {
  /** The example's own answer, or what of it was within the window. */
  readonly expected: string;
  readonly answer: string;
  /** Tokens of the answer. */
  readonly length: number;
  /** What the judge of the recipe says, if it has one. */
  readonly verdict?: number;
}

export type Reward = (judged: Judged) => number;

export function rewardOf(recipe: RewardRecipe): Reward {
  switch (recipe.kind) {
    case 'full-stop':
      return ({ answer }) => Number(answer.trimEnd().endsWith('.'));
    case 'expected':
      return ({ answer, expected }) => Number(answer.trim() === expected.trim());
    case 'length':
      return ({ length }) => 1 - Math.min(1, Math.abs(length - recipe.tokens) / recipe.tokens);
    case 'json':
      return ({ answer }) => Number(isJson(answer));
    case 'number':
      return ({ answer, expected }) =>
        // False where either has none: NaN is near to nothing.
        Number(Math.abs(lastNumber(answer) - lastNumber(expected)) <= recipe.tolerance);
    case 'check': {
      const check = checks[recipe.operation];
      return ({ answer, expected }) => Number(check(answer, recipe.reference ?? expected));
    }
    case 'similarity': {
      const { metric, reference } = recipe;
      return ({ answer, expected }) => similarity(metric, answer, reference ?? expected);
    }
    case 'judge':
      return ({ verdict }) => verdict!;
    case 'weighted': {
      const parts = recipe.parts.map(({ weight, reward }) => ({ weight, of: rewardOf(reward) }));
      return (judged) => parts.reduce((sum, { weight, of }) => sum + weight * of(judged), 0);
    }
  }
}

/** What the base is asked about each answer; null: nothing. */
export function questionOf(recipe: RewardRecipe): string | null {
  const all = recipe.kind === 'weighted' ? recipe.parts.map(({ reward }) => reward) : [recipe];
  return all.find((one) => one.kind === 'judge')?.question ?? null;
}

type Check = Extract<SingleReward, { kind: 'check' }>['operation'];
const checks: Readonly<Record<Check, (answer: string, reference: string) => boolean>> = {
  eq: (answer, reference) => answer === reference,
  ne: (answer, reference) => answer !== reference,
  like: (answer, reference) => answer.includes(reference),
  ilike: (answer, reference) => answer.toLowerCase().includes(reference.toLowerCase()),
};

function isJson(text: string): boolean {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}

/** 1,234.5 as people write it; NaN without any. */
function lastNumber(text: string): number {
  const found = text.match(/-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?/g)?.at(-1);
  return found === undefined ? Number.NaN : Number(found.replaceAll(',', ''));
}

type Metric = Extract<SingleReward, { kind: 'similarity' }>['metric'];
const charactersMax = 4096; // of a common sequence: 17 million comparisons

export function similarity(metric: Metric, answer: string, reference: string): number {
  if (metric === 'fuzzy_match') {
    return commonShare([...answer.slice(0, charactersMax)], [...reference.slice(0, charactersMax)]);
  }
  const [words, wanted] = [wordsOf(answer), wordsOf(reference)];
  if (metric === 'rouge_l') return commonShare(words, wanted);
  const [from, to] = metric === 'gleu' ? [1, 4] : [Number(metric.at(-1)), Number(metric.at(-1))];
  const [own, other] = [grams(words, from, to), grams(wanted, from, to)];
  const shared = overlap(own, other);
  if (shared === 0) return 0;
  // The lower of precision and recall, or their F1.
  return metric === 'gleu'
    ? shared / Math.max(own.length, other.length)
    : (2 * shared) / (own.length + other.length);
}

function wordsOf(text: string): string[] {
  return text.toLowerCase().match(/[\p{L}\p{M}\p{N}]+/gu) ?? [];
}

function grams(words: readonly string[], from: number, to: number): string[] {
  const all: string[] = [];
  for (let n = from; n <= to; n++) {
    for (let i = 0; i + n <= words.length; i++) all.push(words.slice(i, i + n).join(' '));
  }
  return all;
}

/** How many both have, each as often as it is in both. */
function overlap(a: readonly string[], b: readonly string[]): number {
  const left = new Map<string, number>();
  for (const gram of b) left.set(gram, (left.get(gram) ?? 0) + 1);
  let shared = 0;
  for (const gram of a) {
    const count = left.get(gram) ?? 0;
    if (count === 0) continue;
    left.set(gram, count - 1);
    shared += 1;
  }
  return shared;
}

/** Twice the longest common subsequence over both lengths. */
function commonShare(a: readonly string[], b: readonly string[]): number {
  if (a.length === 0 || b.length === 0) return 0;
  const lengths = new Uint32Array(b.length + 1); // of the sequence so far with the first j of b
  for (const item of a) {
    let diagonal = 0;
    b.forEach((other, j) => {
      const above = lengths[j + 1]!;
      lengths[j + 1] = item === other ? diagonal + 1 : Math.max(above, lengths[j]!);
      diagonal = above;
    });
  }
  return (2 * lengths[b.length]!) / (a.length + b.length);
}
