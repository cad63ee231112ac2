// Who can be compared: one rank for everybody, ranks known beforehand, and the product's policies.

import { createPolicy } from '../../../src/router/create-policy.ts';
import type { PolicySettings } from '../../../src/router/policy.ts';
import { Router } from '../../../src/router/router.ts';
import { createRng } from '../random.ts';
import type { Contestant, Scenario } from './scenario.ts';

export const rankLadder: readonly number[] = [1, 2, 4, 8, 16, 32, 64];

/** Each adapter at this rank, or at its own when that is smaller. */
export function fixedRank(rank: number): Contestant {
  return {
    name: `rank ${rank}`,
    createRouter: createRouter({ kind: 'largest' }),
    rankOf: (_, { rankMax }) => Math.min(rank, rankMax),
  };
}

/** Request i at ranks[i]. */
export function givenRanks(name: string, ranks: readonly number[]): Contestant {
  return {
    name,
    createRouter: createRouter({ kind: 'largest' }),
    rankOf: (index) => ranks[index]!,
  };
}

/** A policy of the product. */
export function routed(settings: PolicySettings): Contestant {
  return { name: settings.kind, createRouter: createRouter(settings), rankOf: () => null };
}

function createRouter(settings: PolicySettings): Contestant['createRouter'] {
  return ({ machine, seed }: Scenario) =>
    new Router({
      identity: { baseHash: '', backend: 'simulated', threads: 1 },
      rowsMax: machine.segmentsMax,
      prefillTokensMax: machine.prefillTokensMax,
      policy: createPolicy(settings),
      draw: createRng(seed ^ 0x2545_f491).next,
    });
}
