// Scores of answers, 0 … 1, that a recipe can name.

import type { RewardRecipe } from '../jobs/recipe.ts';

export interface Judged {
  /** The example's own answer, or what of it was within the window. */
  readonly expected: string;
  readonly answer: string;
  /** Tokens of the answer. */
  readonly length: number;
}

export type Reward = (judged: Judged) => number;

export function rewardOf(recipe: RewardRecipe): Reward {
  switch (recipe.kind) {
    case 'full-stop':
      return ({ answer }) => (answer.trimEnd().endsWith('.') ? 1 : 0);
    case 'expected':
      return ({ answer, expected }) => (answer.trim() === expected.trim() ? 1 : 0);
    case 'length':
      return ({ length }) => 1 - Math.min(1, Math.abs(length - recipe.tokens) / recipe.tokens);
  }
}
