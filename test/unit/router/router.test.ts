import { describe, expect, it } from 'vitest';
import type { StepReport } from '../../../src/engine/messages.ts';
import { CriticPolicy } from '../../../src/router/critic-policy.ts';
import { GuardedPolicy } from '../../../src/router/guarded-policy.ts';
import type { Budget, Plan, RouteInput } from '../../../src/router/policy.ts';
import { Router, type RouterOptions } from '../../../src/router/router.ts';
import { largestPolicy } from '../../../src/router/set-ranks.ts';
import { createRng, type Rng } from '../../support/random.ts';
import { routedAdapter } from '../../support/routed-adapter.ts';

const options: RouterOptions = {
  identity: { baseHash: 'b'.repeat(64), backend: 'test 1', threads: 2 },
  prefillTokensMax: 64,
  rowsMax: 64,
  policy: largestPolicy,
  draw: () => 0.5,
};
const idle = { decodeRows: 0, decodeRanks: 0, waiting: 0, waitingPromptTokens: 0, kvCells: 0 };
const open: Budget = {
  totalMs: null,
  ttftMs: null,
  perTokenMs: null,
  strict: false,
  rank: null,
  rankMin: 0,
  priority: 5,
};
const adapter = routedAdapter(16);

function stepMs(report: StepReport): number {
  return (
    8 +
    report.decodeRows +
    2 * report.prefillTokens +
    0.25 * report.decodeRanks +
    0.02 * report.prefillRanks +
    0.001 * report.kvCells
  );
}

interface Simulated {
  readonly ttftMs: number;
  readonly totalMs: number;
}

/** Runs one request beside `others` decoding rows, as an engine would, and feeds every step to the router. */
function simulate(router: Router, rng: Rng, job: Job): Simulated {
  const { promptTokens, tokens, rank, others } = job;
  let ms = 0;
  let ttftMs = 0;
  let cells = 0;
  const run = (report: StepReport): void => {
    const took = stepMs(report) * (1 + 0.03 * rng.normal());
    ms += took;
    router.observe({ ...report, ms: took });
  };
  for (let done = 0; done < promptTokens; done += 64) {
    const chunk = Math.min(64, promptTokens - done);
    run({
      ms: 0,
      decodeRows: others,
      prefillTokens: chunk,
      decodeRanks: others * 8,
      prefillRanks: chunk * rank,
      kvCells: others * 100 + chunk * cells + (chunk * (chunk + 1)) / 2,
    });
    cells += chunk;
  }
  ttftMs = ms;
  for (let i = 1; i < tokens; i++) {
    cells++;
    run({
      ms: 0,
      decodeRows: others + 1,
      prefillTokens: 0,
      decodeRanks: others * 8 + rank,
      prefillRanks: 0,
      kvCells: others * 100 + cells,
    });
  }
  return { ttftMs, totalMs: ms };
}

interface Job {
  readonly promptTokens: number;
  readonly tokens: number;
  readonly rank: number;
  readonly others: number;
}

function inputOf(job: Omit<Job, 'rank'>, budget: Partial<Budget> = {}): RouteInput {
  const { others, promptTokens, tokens } = job;
  return {
    budget: { ...open, ...budget },
    promptTokens,
    tokensMax: tokens,
    adapter,
    system: null,
    load: { ...idle, decodeRows: others, decodeRanks: others * 8, kvCells: others * 100 },
  };
}

function randomJob(rng: Rng): Omit<Job, 'rank'> {
  return { promptTokens: 1 + rng.below(200), tokens: 2 + rng.below(60), others: rng.below(8) };
}

function settle(router: Router, input: RouteInput, plan: Plan, seen: Simulated): void {
  router.settle({
    adapter: input.adapter?.name ?? null,
    prediction: plan.prediction,
    tokensMax: input.tokensMax,
    completionTokens: input.tokensMax,
    load: input.load,
    ...seen,
  });
}

function train(router: Router, rng: Rng, answers: number): void {
  for (let i = 0; i < answers; i++) {
    const job = randomJob(rng);
    const input = inputOf(job, { rank: [0, 1, 2, 4, 8, 16][rng.below(6)]! });
    const plan = router.route(input);
    settle(router, input, plan, simulate(router, rng, { ...job, rank: plan.rank }));
  }
}

describe('the router', () => {
  it('says nothing before it has seen steps', () => {
    expect(new Router(options).route(inputOf({ promptTokens: 5, tokens: 5, others: 0 }))).toEqual({
      rank: 16,
      rankMax: 16,
      ranks: 16,
      hasSystem: false,
      reason: 'full',
      prediction: null,
    });
  });

  it('predicts whole answers and first tokens of a simulated engine within 10 % on average', () => {
    const rng = createRng(1);
    const router = new Router(options);
    train(router, rng, 60);
    let totalError = 0;
    let ttftError = 0;
    for (let i = 0; i < 100; i++) {
      const job = randomJob(rng);
      const plan = router.route(inputOf(job));
      const seen = simulate(new Router(options), rng, { ...job, rank: plan.rank });
      totalError += Math.abs(plan.prediction!.totalMs - seen.totalMs) / seen.totalMs;
      ttftError += Math.abs(plan.prediction!.ttftMs - seen.ttftMs) / seen.ttftMs;
    }
    expect(totalError / 100).toBeLessThan(0.1);
    expect(ttftError / 100).toBeLessThan(0.1);
  });

  it('keeps at least 97 of 100 feasible budgets, and uses them', () => {
    const rng = createRng(2);
    const router = new Router(options);
    train(router, rng, 100);
    const counts = { met: 0, feasible: 0, ranks: 0, best: 0 };
    for (let i = 0; i < 300; i++) {
      const job = randomJob(rng);
      const exact = (rank: number): number =>
        simulate(new Router(options), { ...rng, normal: () => 0 }, { ...job, rank }).totalMs;
      const totalMs = exact(0) + rng.next() * 1.5 * (exact(16) - exact(0));
      const input = inputOf(job, { totalMs });
      const plan = router.route(input);
      const seen = simulate(router, rng, { ...job, rank: plan.rank });
      settle(router, input, plan, seen);
      if (plan.reason === 'infeasible') continue;
      counts.feasible++;
      if (seen.totalMs <= totalMs) counts.met++;
      counts.ranks += plan.rank;
      counts.best += [16, 8, 4, 2, 1, 0].find((rank) => exact(rank) <= totalMs) ?? 0;
    }
    expect(counts.feasible).toBeGreaterThan(150);
    expect(counts.met / counts.feasible).toBeGreaterThan(0.97);
    // Against an oracle that knows the times without noise: caution costs some rank, not most of it.
    expect(counts.ranks / counts.best).toBeGreaterThan(0.5);
  });

  it('lowers the rank when the machine is loaded, and gives all when the budget is loose', () => {
    const rng = createRng(3);
    const router = new Router(options);
    train(router, rng, 100);
    const job = { promptTokens: 40, tokens: 40 };
    const quiet = router.route(inputOf({ ...job, others: 0 }, { totalMs: 950 }));
    const busy = router.route(inputOf({ ...job, others: 3 }, { totalMs: 950 }));
    expect(quiet).toMatchObject({ rank: 16, reason: 'fits' });
    expect(busy.rank).toBeLessThan(16);
    expect(busy.reason).toBe('reduced');
    expect(router.route(inputOf({ ...job, others: 7 }, { totalMs: 60_000 })).rank).toBe(16);
  });

  it('refuses a strict budget that cannot be met, and says when to come back only if waiting helps', () => {
    const rng = createRng(4);
    const router = new Router(options);
    train(router, rng, 100);
    const job = { promptTokens: 40, tokens: 40, others: 2 };
    expect(() => router.route(inputOf(job, { totalMs: 5, strict: true }))).toThrow(
      expect.objectContaining({ code: 'DEADLINE_TOO_SHORT', retryAfterS: undefined }),
    );
    const loaded = inputOf(job, { totalMs: 1500, strict: true });
    const behind = { ...loaded, load: { ...loaded.load, waiting: 4, waitingPromptTokens: 5000 } };
    expect(() => router.route(behind)).toThrow(
      expect.objectContaining({ code: 'DEADLINE_TOO_SHORT', retryAfterS: expect.any(Number) }),
    );
    expect(router.route({ ...behind, budget: { ...behind.budget, strict: false } })).toMatchObject({
      rank: 0,
      reason: 'infeasible',
    });
  });

  it('continues after a restart, on the same base, backend and thread count only', () => {
    const rng = createRng(5);
    const router = new Router(options);
    train(router, rng, 30);
    const saved = router.save();
    const input = inputOf({ promptTokens: 40, tokens: 40, others: 2 }, { totalMs: 700 });
    const same = new Router(options);
    expect(same.restore(saved)).toBe(true);
    expect(same.route(input)).toEqual(router.route(input));
    for (const change of [{ baseHash: 'c' }, { backend: 'test 2' }, { threads: 3 }]) {
      const other = new Router({ ...options, identity: { ...options.identity, ...change } });
      expect(other.restore(saved)).toBe(false);
      expect(other.route(input).prediction).toBeNull();
    }
    for (const damaged of [
      '',
      '{}',
      saved.slice(0, -2),
      saved.replace(/steps\\":\d+/, 'steps\\":-1'),
    ]) {
      expect(new Router(options).restore(damaged)).toBe(false);
    }
  });

  it('refuses a strict budget that was spent before the plan, and serves another at the smallest rank', () => {
    const job = { promptTokens: 5, tokens: 5, others: 0 };
    const router = new Router(options);
    expect(() => router.route(inputOf(job, { totalMs: -1, strict: true }))).toThrow(
      expect.objectContaining({ code: 'DEADLINE_TOO_SHORT', retryAfterS: undefined }),
    );
    const late = router.route(inputOf(job, { totalMs: -1 }));
    expect(late).toMatchObject({ rank: 0, reason: 'infeasible', prediction: null });
  });

  it('says when to come back by what waits, how fast it is served, and at most a minute', () => {
    const rng = createRng(7);
    const router = new Router(options);
    train(router, rng, 100);
    const load = { ...idle, decodeRows: 2, decodeRanks: 16, kvCells: 200 };
    expect(router.retryAfterS(load)).toBe(1);
    const some = router.drainMs({ ...load, waiting: 4, waitingPromptTokens: 400 });
    // Seven steps of 64 prompt tokens beside two rows, and two answers in turn at either row.
    const prefillMs = 7 * (8 + 2 + 0.25 * 16 + 0.2) + 2 * 400 + 0.02 * 400 * 8;
    expect(some).toBeGreaterThan(0.9 * prefillMs);
    expect(some).toBeLessThan(prefillMs + 2 * 60 * 30);
    const wider = { ...load, decodeRows: 4, decodeRanks: 32, waiting: 8 };
    expect(router.drainMs(wider) / router.drainMs({ ...load, waiting: 8 })).toBeLessThan(0.7);
    const full = { ...load, waiting: 4000, waitingPromptTokens: 400_000 };
    expect(router.retryAfterS(full)).toBe(60);
  });

  it('keeps what its policy learned, for the same policy', () => {
    const input = inputOf({ promptTokens: 40, tokens: 40, others: 2 });
    const policy = new GuardedPolicy();
    const router = new Router({ ...options, policy });
    train(router, createRng(8), 20);
    router.judge({ input, plan: router.route(input), met: null, score: 0.5 });
    const learned = policy.save();
    expect(learned).not.toBe(new GuardedPolicy().save());
    const [same, other] = [
      new GuardedPolicy(),
      new CriticPolicy({ discount: 0.9, regularizer: 'none' }),
    ];
    const before = other.save();
    for (const one of [same, other]) {
      const next = new Router({ ...options, policy: one });
      expect(next.restore(router.save())).toBe(true);
      expect(next.predict(input, 4)).toEqual(router.predict(input, 4));
    }
    expect(same.save()).toBe(learned);
    expect(other.save()).toBe(before);
  });

  it('is not wrecked by outcomes that are none', () => {
    const rng = createRng(6);
    const router = new Router(options);
    train(router, rng, 30);
    const input = inputOf({ promptTokens: 40, tokens: 40, others: 2 });
    const plan = router.route(input);
    const before = router.save();
    for (const seen of [
      { ttftMs: Number.NaN, totalMs: 1 },
      { ttftMs: 2, totalMs: 1 },
      { ttftMs: -1, totalMs: 1 },
    ]) {
      settle(router, input, plan, seen);
    }
    expect(router.save()).toBe(before);
  });
});
