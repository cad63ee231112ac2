import { describe, expect, it } from 'vitest';
import { CriticPolicy } from '../../../src/router/critic-policy.ts';
import type { Plan, Predict, RouteInput } from '../../../src/router/policy.ts';
import { createRng } from '../../support/random.ts';
import { routedAdapter } from '../../support/routed-adapter.ts';

const curve = [0.7, 0.8, ...[0.85, 0.9], ...[0.92, 0.94, 0.96, 0.97], ...[0.98, 0.98, 0.98, 0.98]];
curve.push(0.99, 0.99, 0.99, 1);

function inputOf(waiting: number, budget: Partial<RouteInput['budget']> = {}): RouteInput {
  return {
    budget: {
      ...{ totalMs: 1000, ttftMs: null, perTokenMs: null, strict: false, rank: null },
      ...{ rankMin: 1, priority: 5, ...budget },
    },
    promptTokens: 10,
    tokensMax: 10,
    adapter: routedAdapter(16, curve),
    system: null,
    load: { decodeRows: 0, decodeRanks: 0, waiting, waitingPromptTokens: 0, kvCells: 0 },
  };
}

const predict: Predict = (_, ranks) => ({
  totalMs: 100 + 10 * ranks,
  sigmaMs: 10,
  ttftMs: 10,
  ttftSigmaMs: 1,
  perTokenMs: 1,
  perTokenSigmaMs: 0.1,
});

/** Whoever takes more than 4 ranks makes the next request wait so long that it is late. */
function ranksAfter(decisions: number, discount: number): number[] {
  const rng = createRng(1);
  const policy = new CriticPolicy({ discount, regularizer: discount > 0 ? 'beer' : 'none' });
  let waiting = 0;
  return Array.from({ length: decisions }, () => {
    const input = inputOf(waiting);
    const plan = policy.choose(input, predict, rng.next);
    policy.settle({ input, plan, met: waiting === 0, score: null });
    waiting = plan.rank > 4 ? 63 : 0;
    return plan.rank;
  });
}

describe('a policy with a critic', () => {
  it('leaves room for the next request, which one that only looks at its own does not', () => {
    const share = (ranks: readonly number[]): number =>
      ranks.slice(-500).filter((rank) => rank <= 4).length / 500;
    expect(share(ranksAfter(20_000, 0.9))).toBeGreaterThan(0.85);
    expect(share(ranksAfter(20_000, 0))).toBeLessThan(0.15);
  });

  it('learns alike whichever comes first, the outcome or the next decision, and once', () => {
    const [early, late] = [false, true].map((isLate) => {
      const rng = createRng(2);
      const policy = new CriticPolicy({ discount: 0.9, regularizer: 'none' });
      let open: { input: RouteInput; plan: Plan } | null = null;
      for (let i = 0; i < 50; i++) {
        const input = inputOf(i % 3);
        const plan = policy.choose(input, predict, rng.next);
        const due = isLate ? open : { input, plan };
        if (due !== null) {
          for (const met of [true, false]) policy.settle({ ...due, met, score: 0.5 });
        }
        open = { input, plan };
      }
      return policy.save();
    });
    expect(early).not.toBe(new CriticPolicy({ discount: 0.9, regularizer: 'none' }).save());
    // The last outcome of one was not yet known to the other, and neither has led anywhere yet.
    expect(late).toBe(early);
  });

  it('explores inside the safe set only, and not with requests that have no budget', () => {
    const policy = new CriticPolicy({ discount: 0.9, regularizer: 'none' });
    const always = (): number => 0.04; // explores, and takes the first
    expect(policy.choose(inputOf(0), predict, always)).toMatchObject({ rank: 16, reason: 'fits' });
    const last = [0.04, 0.3];
    const drawn = policy.choose(inputOf(0), predict, () => last.shift()!);
    expect(drawn).toMatchObject({ rank: 2, reason: 'learned' }); // rank 1 loses more than allowed
    const never = (): number => {
      throw new Error('it drew');
    };
    expect(policy.choose(inputOf(0, { totalMs: null }), predict, never).reason).toBe('full');
    expect(policy.choose(inputOf(0, { totalMs: 1 }), predict, never).reason).toBe('infeasible');
    expect(policy.choose(inputOf(0, { rank: 3 }), predict, never).reason).toBe('fixed');
  });

  it('goes on after a restart, and refuses what is not its own', () => {
    const policy = new CriticPolicy({ discount: 0.9, regularizer: 'none' });
    const again = new CriticPolicy({ discount: 0.9, regularizer: 'none' });
    const rng = createRng(3);
    for (let i = 0; i < 20; i++) {
      const input = inputOf(i % 2);
      policy.settle({ input, plan: policy.choose(input, predict, rng.next), met: true, score: 1 });
    }
    expect(again.restore(policy.save())).toBe(true);
    expect(again.save()).toBe(policy.save());
    for (const text of ['', '{}', policy.save().replace('critic/1', 'critic/2')]) {
      expect(again.restore(text)).toBe(false);
    }
  });
});
