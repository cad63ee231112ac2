// The configuration's word for a rank policy → the policy.

import { CriticPolicy } from './critic-policy.ts';
import { GuardedPolicy } from './guarded-policy.ts';
import type { PolicySettings, RankPolicy } from './policy.ts';
import { fixedPolicy, largestPolicy, tablePolicy } from './set-ranks.ts';

export function createPolicy(settings: PolicySettings): RankPolicy {
  switch (settings.kind) {
    case 'guarded':
      return new GuardedPolicy();
    case 'largest':
      return largestPolicy;
    case 'fixed':
      return fixedPolicy(settings.rank);
    case 'table':
      return tablePolicy(settings.rows);
    case 'critic':
      return new CriticPolicy(settings);
  }
}
