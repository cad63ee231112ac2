import { describe, expect, it } from 'vitest';
import { squeezeModule } from '../../../src/adapters/squeeze.ts';
import type { StepReport } from '../../../src/engine/messages.ts';
import { GuardedPolicy } from '../../../src/router/guarded-policy.ts';
import type {
  Plan,
  Predict,
  Prediction,
  RankPolicy,
  RouteInput,
} from '../../../src/router/policy.ts';
import { chooseRank, fits, perturbation } from '../../../src/router/rank-policy.ts';
import { fixedPolicy, largestPolicy } from '../../../src/router/set-ranks.ts';
import { StepTime, workOf } from '../../../src/router/step-time.ts';
import { createRng, type Rng } from '../../support/random.ts';
import { routedAdapter } from '../../support/routed-adapter.ts';

const ranks = [1, 2, 4, 8, 16, 32] as const;
/** Energy kept at each of them, and what the answers are worth: alike in order, not in size. */
const kept = [0.55, 0.68, 0.8, 0.89, 0.96, 1];
const accuracy = [0.38, 0.46, 0.54, 0.61, 0.67, 0.71];
const curve = Array.from({ length: 32 }, (_, i) => {
  const at = Math.log2(i + 1);
  const low = Math.floor(at);
  return kept[low]! + (at - low) * ((kept[low + 1] ?? 1) - kept[low]!);
});

interface Request {
  readonly input: RouteInput;
  /** Multiplies its latency, whatever the rank. */
  readonly noise: number;
}

function reportOf({ load, promptTokens }: RouteInput, rank: number): Omit<StepReport, 'ms'> {
  return {
    decodeRows: load.decodeRows,
    prefillTokens: promptTokens,
    decodeRanks: load.decodeRanks + rank,
    prefillRanks: promptTokens * rank,
    kvCells: load.kvCells,
  };
}

function meanMs(input: RouteInput, rank: number): number {
  const { decodeRows, prefillTokens, decodeRanks, prefillRanks } = reportOf(input, rank);
  return 30 + 6 * decodeRows + 0.4 * prefillTokens + 3 * decodeRanks + 0.02 * prefillRanks;
}

/** Requests of section 11's setting: six ranks, one adapter, a budget that 7.5 % cannot meet at rank 1. */
function requestsOf(rng: Rng, count: number): Request[] {
  return Array.from({ length: count }, () => {
    const decodeRows = rng.below(8);
    const input: RouteInput = {
      budget: {
        ...{ totalMs: null, ttftMs: null, perTokenMs: null, strict: false, rank: null },
        ...{ rankMin: 1, priority: 5 },
      },
      promptTokens: 20 + rng.below(160),
      tokensMax: 1,
      adapter: { ...routedAdapter(32, curve), name: 'a' },
      system: null,
      load: { decodeRows, decodeRanks: 0, waiting: 0, waitingPromptTokens: 0, kvCells: 0 },
    };
    const totalMs = meanMs(input, 1) * Math.exp(0.79 + 0.55 * rng.normal());
    return {
      input: { ...input, budget: { ...input.budget, totalMs } },
      noise: Math.exp(0.05 * rng.normal()),
    };
  });
}

/** What the policy knows: a linear model of whole requests, learned from those that were served. */
function onlineModel(): { predict: Predict; learn: (report: StepReport) => void } {
  const model = new StepTime();
  return {
    predict(input, rank) {
      const { ms, doubtMs } = model.estimate(workOf({ ms: 0, ...reportOf(input, rank) }));
      return predictionOf(ms, Math.hypot(doubtMs, ms * model.relativeSigma));
    },
    learn: (report) => model.observe(report),
  };
}

function predictionOf(totalMs: number, sigmaMs: number): Prediction {
  return { totalMs, sigmaMs, ttftMs: 0, ttftSigmaMs: 0, perTokenMs: 0, perTokenSigmaMs: 0 };
}

interface Run {
  /** Mean of accuracy where the budget was met, else 0. */
  readonly reward: number;
  readonly violations: number;
}

function run(policy: RankPolicy, requests: readonly Request[], rng: Rng): Run {
  const { predict, learn } = onlineModel();
  let [reward, violations] = [0, 0];
  for (const { input, noise } of requests) {
    const plan = policy.choose(input, predict, rng.next);
    const ms = meanMs(input, plan.rank) * noise;
    const met = ms <= input.budget.totalMs!;
    const worth = accuracy[ranks.indexOf(plan.rank as 1)]!;
    learn({ ms, ...reportOf(input, plan.rank) });
    policy.settle({ input, plan, met, score: rng.next() < worth ? 1 : 0 });
    if (met) reward += worth / requests.length;
    else violations += 1 / requests.length;
  }
  return { reward, violations };
}

/** Of whoever knows each request's own latency. */
function hindsight(requests: readonly Request[]): Run {
  const rewards = requests.map(({ input, noise }) =>
    Math.max(
      0,
      ...ranks.map((rank, i) =>
        meanMs(input, rank) * noise <= input.budget.totalMs! ? accuracy[i]! : 0,
      ),
    ),
  );
  const sum = rewards.reduce((a, b) => a + b, 0);
  return {
    reward: sum / rewards.length,
    violations: rewards.filter((one) => one === 0).length / rewards.length,
  };
}

describe('guarded Thompson sampling', () => {
  it.each([1, 2, 3])(
    'closes three quarters of the gap from the best fixed rank to hindsight, seed %d',
    (seed) => {
      const requests = requestsOf(createRng(seed), 3000);
      const oracle = hindsight(requests);
      expect(oracle.violations).toBeGreaterThan(0.06);
      expect(oracle.violations).toBeLessThan(0.09);
      const fixed = ranks.map((rank) => run(fixedPolicy(rank), requests, createRng(9)).reward);
      const best = Math.max(...fixed);
      const guarded = run(new GuardedPolicy(), requests, createRng(9));
      expect((guarded.reward - best) / (oracle.reward - best)).toBeGreaterThanOrEqual(0.75);
      expect(guarded.violations).toBeLessThanOrEqual(oracle.violations + 0.01);
    },
  );

  it('loses little to the guard alone where the guard is right and nobody scores', () => {
    const requests = requestsOf(createRng(4), 3000);
    const { predict, learn } = onlineModel();
    const policy = new GuardedPolicy();
    const rng = createRng(5);
    let smaller = 0;
    for (const { input, noise } of requests) {
      const plan = policy.choose(input, predict, rng.next);
      const ms = meanMs(input, plan.rank) * noise;
      if (plan.reason === 'learned') smaller += 1;
      learn({ ms, ...reportOf(input, plan.rank) });
      policy.settle({ input, plan, met: ms <= input.budget.totalMs!, score: null });
    }
    expect(smaller / requests.length).toBeLessThan(0.05);
  });

  /** 10 ms a rank and 100 besides, σ 4 %. */
  const known: Predict = (_, rank) => predictionOf(100 + 10 * rank, 4 + 0.4 * rank);
  const [{ input: some }] = requestsOf(createRng(1), 1) as [Request];
  const within = (totalMs: number): RouteInput => ({
    ...some,
    budget: { ...some.budget, totalMs },
  });

  it('goes below the largest rank that fits when the machine is slower there than predicted', () => {
    const missed = (policy: RankPolicy): number => {
      const rng = createRng(6);
      let late = 0;
      for (let i = 0; i < 1000; i++) {
        const input = within(300 + rng.below(400));
        const plan = policy.choose(input, known, rng.next);
        const ms = (100 + 10 * plan.rank) * (plan.rank > 8 ? 1.6 : 1);
        const met = ms <= input.budget.totalMs!;
        policy.settle({ input, plan, met, score: null });
        if (i >= 200 && !met) late += 1;
      }
      return late;
    };
    const [guard, guarded] = [missed(largestPolicy), missed(new GuardedPolicy())];
    expect(guard).toBeGreaterThan(200);
    expect(guarded).toBeLessThan(guard / 2);
  });

  it('does not gamble with a loose budget', () => {
    const rng = createRng(15);
    const policy = new GuardedPolicy();
    for (let i = 0; i < 2000; i++) {
      const plan = policy.choose(within(10_000), known, rng.next);
      expect(plan).toMatchObject({ rank: 32, reason: 'fits' });
      policy.settle({ input: within(10_000), plan, met: true, score: null });
    }
  });

  it('learns from scores that a smaller rank answers better', () => {
    const rng = createRng(7);
    const policy = new GuardedPolicy();
    const taken = Array.from({ length: 600 }, () => {
      const plan = policy.choose(within(1000), known, rng.next);
      const worth = plan.rank === 8 ? 0.9 : 0.5;
      const score = rng.next() < worth ? 1 : 0;
      policy.settle({ input: within(1000), plan, met: true, score });
      return plan.rank;
    });
    const last = taken.slice(-200);
    expect(last.filter((rank) => rank === 8).length / 200).toBeGreaterThan(0.8);
    expect(Math.min(...taken)).toBeGreaterThanOrEqual(4); // 2 and 1 lose too much of the adapter
  });

  it('says which rule chose', () => {
    const policy = new GuardedPolicy();
    const rng = createRng(8);
    for (let i = 0; i < 300; i++) {
      const plan: Plan = { ...chooseRank(within(1000), known) };
      policy.settle({ input: within(1000), plan, met: true, score: 0 });
      policy.settle({ input: within(1000), plan: { ...plan, rank: 16 }, met: true, score: 1 });
    }
    expect(policy.choose(within(1000), known, rng.next)).toMatchObject({
      ...{ rank: 16, reason: 'learned' },
      prediction: { totalMs: 260 },
    });
    // Of the rest of the rules nothing changes.
    for (const [change, reason] of [
      [{ totalMs: null }, 'full'],
      [{ rank: 4 }, 'fixed'],
      [{ totalMs: 50 }, 'infeasible'],
    ] as const) {
      const input = { ...some, budget: { ...some.budget, totalMs: 1000, ...change } };
      expect(policy.choose(input, known, rng.next).reason).toBe(reason);
    }
    expect(policy.choose(within(1000), () => null, rng.next).reason).toBe('full');
  });

  it('chooses among ranks that the guard lets through only, whatever it was told', () => {
    const rng = createRng(10);
    const policy = new GuardedPolicy();
    for (let i = 0; i < 500; i++) {
      const input = within(100 + rng.below(500));
      const plan = policy.choose(input, known, rng.next);
      const largest = chooseRank(input, known);
      expect(plan.rank).toBeLessThanOrEqual(largest.rank);
      if (plan.reason === 'learned') {
        expect(fits(input.budget, plan.prediction!)).toBe(true);
        expect(perturbation(curve, plan.rank, largest.rank)).toBeLessThanOrEqual(0.5);
      } else expect(plan).toEqual(largest);
      policy.settle({ input, plan, met: rng.next() < 0.5, score: rng.next() });
    }
  });

  it('goes on after a restart as it would have, and refuses what is not its own', () => {
    const policy = new GuardedPolicy();
    run(policy, requestsOf(createRng(11), 300), createRng(12));
    const saved = policy.save();
    const again = new GuardedPolicy();
    expect(again.restore(saved)).toBe(true);
    const requests = requestsOf(createRng(13), 100);
    const [one, other] = [policy, again].map((each) => run(each, requests, createRng(14)));
    expect(other).toEqual(one);
    expect(again.save()).toBe(policy.save());
    const damaged = ['', '{}', saved.slice(0, -1), saved.replace('[', '[-1,')];
    for (const text of [...damaged, saved.replace('guarded/1', 'guarded/2')]) {
      const fresh = new GuardedPolicy();
      expect(fresh.restore(text), text.slice(0, 40)).toBe(false);
      expect(fresh.save()).toBe(new GuardedPolicy().save());
    }
  });

  it('remembers a bounded number of adapters', () => {
    const policy = new GuardedPolicy();
    const plan = chooseRank(within(1000), known);
    for (let i = 0; i < 5000; i++) {
      const input = { ...some, adapter: { ...some.adapter!, name: `adapter-${i}` } };
      policy.settle({ input, plan, met: null, score: 1 });
    }
    const { scores } = JSON.parse(policy.save()) as { scores: Array<[string, unknown]> };
    expect(scores).toHaveLength(1024);
    expect(scores[0]![0]).toBe('adapter-4999');
  });

  it('takes no outcome that is none', () => {
    const policy = new GuardedPolicy();
    const before = policy.save();
    const plan = chooseRank(within(1000), known);
    for (const score of [Number.NaN, -1, 1.5, null]) {
      policy.settle({ input: within(1000), plan, met: null, score });
    }
    policy.settle({ input: { ...some, adapter: null }, plan, met: true, score: 1 });
    // A plan that the guard did not let through, and one of which nothing was predicted.
    policy.settle({ input: within(110), plan, met: false, score: null });
    policy.settle({ input: some, plan: { ...plan, prediction: null }, met: true, score: null });
    expect(policy.save()).toBe(before);
  });
});

it('the step from one rank to another is as large as their adapters differ', () => {
  const rng = createRng(20);
  const [rank, inputs, outputs] = [6, 12, 9];
  const filled = (length: number): Float64Array =>
    Float64Array.from({ length }, () => rng.normal());
  const { a, b, sigma } = squeezeModule({
    ...{ rank, in: inputs, out: outputs, scale: 1 },
    ...{ a: filled(rank * inputs), b: filled(outputs * rank) },
  });
  /** ‖Σ b_i a_i‖_F over ranks k … n−1, summed up as a matrix. */
  const norm = (k: number, n: number): number => {
    let squares = 0;
    for (let row = 0; row < outputs; row++) {
      for (let column = 0; column < inputs; column++) {
        let entry = 0;
        for (let i = k; i < n; i++) entry += b[i * outputs + row]! * a[i * inputs + column]!;
        squares += entry * entry;
      }
    }
    return Math.sqrt(squares);
  };
  let sum = 0;
  const energies = Array.from(sigma, (one) => (sum += one * one));
  const shares = energies.map((one) => one / sum);
  for (let k = 0; k <= rank; k++) {
    for (let n = k; n <= rank; n++) {
      expect(Math.abs(perturbation(shares, k, n) - norm(k, n) / norm(0, rank))).toBeLessThan(1e-10);
    }
  }
});
