// The policies that learn nothing: the largest rank that fits, one rank for all, and a table from budgets to ranks.

import { wholeMs } from './budget.ts';
import type { PolicySettings, RankPolicy } from './policy.ts';
import { chooseRank, planConfigured } from './rank-policy.ts';

const stateless: Pick<RankPolicy, 'settle' | 'save' | 'restore'> = {
  settle: () => {},
  save: () => '',
  restore: (text) => text === '',
};

export const largestPolicy: RankPolicy = {
  ...stateless,
  name: 'largest',
  choose: (input, predict) => chooseRank(input, predict),
};

export function fixedPolicy(rank: number): RankPolicy {
  return {
    ...stateless,
    name: 'fixed',
    choose: (input, predict) => planConfigured(input, predict, rank),
  };
}

type TableRows = (PolicySettings & { readonly kind: 'table' })['rows'];

/** Below the first row the smallest allowed rank, without a budget every rank. */
export function tablePolicy(rows: TableRows): RankPolicy {
  return {
    ...stateless,
    name: 'table',
    choose(input, predict) {
      const ms = wholeMs(input.budget, input.tokensMax) ?? Number.POSITIVE_INFINITY;
      const row = rows.findLast(({ fromMs }) => ms >= fromMs);
      const rank = ms === Number.POSITIVE_INFINITY ? ms : (row?.rank ?? 0);
      return planConfigured(input, predict, rank);
    },
  };
}
