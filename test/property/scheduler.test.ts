import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { StepCosts } from '../../src/engine/messages.ts';
import {
  type Moment,
  planStep,
  promptTokenMs,
  type Runnable,
  rowMs,
  type StepPlan,
} from '../../src/engine/scheduler.ts';

const limitsArbitrary = fc
  .record({
    tokensMax: fc.integer({ min: 2, max: 40 }),
    segmentsMax: fc.integer({ min: 2, max: 10 }),
    prefillTokensMax: fc.integer({ min: 1, max: 40 }),
  })
  .map((limits) => ({ ...limits, segmentsMax: Math.min(limits.segmentsMax, limits.tokensMax) }));

const never = Number.POSITIVE_INFINITY;
const workArbitrary = fc.array(
  fc.record({
    prompt: fc.integer({ min: 1, max: 90 }),
    answer: fc.integer({ min: 1, max: 12 }),
    tenant: fc.constantFrom('a', 'a', 'a', 'b', 'c'),
    priority: fc.constantFrom(2, 5, 5, 8),
    dueMs: fc.constantFrom(10, 500, never, never),
    paceMs: fc.constantFrom(-5, 3, 12, 30, never, never),
    rowRanks: fc.constantFrom(0, 0, 8, 64),
  }),
  { minLength: 1, maxLength: 14 },
);
const costsArbitrary: fc.Arbitrary<StepCosts | null> = fc.option(
  fc.record({
    step: fc.constantFrom(0, 8),
    decodeRow: fc.constantFrom(0.1, 2.5),
    prefillToken: fc.constantFrom(0.01, 2.5),
    decodeRank: fc.constantFrom(0, 0.13),
    prefillRank: fc.constantFrom(0, 0.01),
    kvCell: fc.constantFrom(0, 0.001),
  }),
  { freq: 4, nil: null },
);

interface Job extends Runnable {
  promptTokensLeft: number;
  answerLeft: number;
  lastStep: number;
  position: number;
}

function jobsOf(work: typeof workArbitrary extends fc.Arbitrary<infer T> ? T : never): Job[] {
  return work.map(({ prompt, answer, paceMs, ...rest }, i) => ({
    ...rest,
    ...{ id: `j${i}`, arrival: i, promptTokensLeft: prompt, answerLeft: answer },
    ...{ lastStep: 0, position: 0, paceMs: () => paceMs },
  }));
}

/** What the other tenants would add to a step, on average. */
function wantedOf(live: readonly Job[], costs: StepCosts, tenant: string): number {
  const others = live.filter((job) => job.tenant !== tenant);
  const ms = others.map((job) => {
    const left = job.promptTokensLeft;
    return left === 0 ? rowMs(costs, job) : Math.min(100, left * promptTokenMs(costs, job, left));
  });
  return ms.reduce((a, b) => a + b, 0) / new Set(others.map((job) => job.tenant)).size;
}

/** Takes what was planned for done. */
function compute(jobs: readonly Job[], plan: StepPlan, step: number): void {
  for (const { id, count } of plan.segments) {
    const job = jobs.find((one) => one.id === id)!;
    job.position += count;
    job.lastStep = step;
    if (job.promptTokensLeft === 0) job.answerLeft -= 1;
    job.promptTokensLeft = Math.max(0, job.promptTokensLeft - count);
  }
}

describe('planStep', () => {
  it('stays in its limits, computes every token once and starves nobody', () => {
    fc.assert(
      fc.property(
        workArbitrary,
        limitsArbitrary,
        costsArbitrary,
        fc.constantFrom(0, 20, 500),
        (work, limits, costs, credit) => {
          const jobs = jobsOf(work);
          // A tenant whose rows are held back has one of them in each step, in turn, and so has whoever waits behind more
          // rows than fit; whoever waited for 64 steps goes before all others.
          const rowsMax = Math.max(1, limits.segmentsMax - 1);
          const gapMax = 64 + 2 * jobs.length;
          const prompts = work.reduce((sum, one) => sum + one.prompt, 0);
          for (let step = 1; jobs.some((job) => job.answerLeft > 0); step++) {
            const live = jobs.filter((job) => job.answerLeft > 0);
            expect(step).toBeLessThan((prompts + 13 * jobs.length) * (gapMax + 1));
            const moment: Moment = { step, nowMs: 0, costs, creditMs: () => credit };
            const plan = planStep(live, limits, moment);
            const { segments } = plan;
            expect(segments.length).toBeGreaterThan(0);
            expect(segments.length).toBeLessThanOrEqual(limits.segmentsMax);
            expect(new Set(segments.map((one) => one.id)).size).toBe(segments.length);
            const tokens = segments.reduce((sum, one) => sum + one.count, 0);
            expect(tokens).toBeLessThanOrEqual(limits.tokensMax);
            let prefill = 0;
            for (const { id, count } of segments) {
              const job = jobs.find((one) => one.id === id)!;
              expect(count).toBeGreaterThan(0);
              if (job.promptTokensLeft > 0) {
                expect(count).toBeLessThanOrEqual(job.promptTokensLeft);
                prefill += count;
              } else expect(count).toBe(1);
            }
            expect(prefill).toBeLessThanOrEqual(limits.prefillTokensMax);
            const rows = live.filter((job) => job.promptTokensLeft === 0);
            if (rows.length <= rowsMax && costs === null) {
              const planned = new Set(segments.map((one) => one.id));
              expect(rows.filter((row) => !planned.has(row.id))).toEqual([]);
            }
            if (live.length > rows.length && costs === null) expect(prefill).toBeGreaterThan(0);
            compute(jobs, plan, step);
            for (const job of live) expect(step - job.lastStep).toBeLessThanOrEqual(gapMax);
          }
        },
      ),
      { numRuns: 150 },
    );
  });

  it('makes no step longer than a row can bear, or than tenants owe each other', () => {
    let [bound, held] = [0, 0];
    fc.assert(
      fc.property(
        workArbitrary,
        costsArbitrary,
        fc.constantFrom(0, 20, 500),
        (work, costs, credit) => {
          if (costs === null) return;
          const limits = { tokensMax: 1000, segmentsMax: 100, prefillTokensMax: 1000 };
          const jobs = jobsOf(work);
          for (let step = 1; step < 40 && jobs.some((job) => job.answerLeft > 0); step++) {
            const live = jobs.filter((job) => job.answerLeft > 0);
            const moment: Moment = { step, nowMs: 0, costs, creditMs: () => credit };
            const plan = planStep(live, limits, moment);
            const parts = plan.segments.map(({ id, count }) => {
              const job = live.find((one) => one.id === id)!;
              const isRow = job.promptTokensLeft === 0;
              const ms = isRow ? rowMs(costs, job) : count * promptTokenMs(costs, job, count);
              return { job, count, isRow, ms };
            });
            const rowsMs = parts.reduce((sum, { isRow, ms }) => sum + (isRow ? ms : 0), costs.step);
            const allMs = parts.reduce((sum, { ms }) => sum + ms, costs.step);
            const kept = parts.filter(({ isRow, job }) => isRow && job.paceMs(0, false) >= rowsMs);
            const prompts = parts.filter(({ isRow }) => !isRow);
            const paceMs = Math.min(never, ...kept.map(({ job }) => job.paceMs(0, false)));
            // One token of a prompt goes along whatever it does.
            const isOne = prompts.length === 1 && prompts[0]!.count === 1;
            if (prompts.length > 0 && !isOne)
              expect(allMs).toBeLessThanOrEqual(paceMs * 1.02 + 0.5);
            if (prompts.length > 0 && paceMs < never) bound += 1;
            if (new Set(live.map(({ tenant }) => tenant)).size > 1) {
              for (const [tenant, ms] of plan.spentMs) {
                const own = parts.filter(({ job }) => job.tenant === tenant);
                // A row of it, and a prompt's token, are there whatever they cost.
                const rows = own.filter(({ isRow }) => isRow);
                const token = own.find(({ isRow, count }) => !isRow && count === 1);
                const owed = ms - (rows.length === 1 ? rows[0]!.ms : 0) - (token?.ms ?? 0);
                const wanted = wantedOf(live, costs, tenant);
                if (owed > Math.max(credit, wanted) + 1e-9) {
                  expect(owed).toBeLessThanOrEqual(0.31 * (allMs - ms) + 0.5);
                  held += 1;
                }
              }
            }
            compute(jobs, plan, step);
          }
        },
      ),
      { numRuns: 300 },
    );
    expect(bound).toBeGreaterThan(100); // it was about something
    expect(held).toBeGreaterThan(20);
  });

  const one = (id: string, over: Partial<Runnable>): Runnable => ({
    ...{ id, tenant: 't', arrival: 0, priority: 5, dueMs: never, promptTokensLeft: 0 },
    ...{ position: 0, rowRanks: 0, lastStep: 9, paceMs: () => never },
    ...over,
  });
  const costs: StepCosts = {
    ...{ step: 8, decodeRow: 2, prefillToken: 1, decodeRank: 0.1, prefillRank: 0, kvCell: 0 },
  };
  const moment: Moment = { step: 10, nowMs: 0, costs, creditMs: () => 0 };

  it('gives every decode row its place and fills the rest with the prompts that are due first', () => {
    const limits = { tokensMax: 32, segmentsMax: 8, prefillTokensMax: 24 };
    const all = [
      one('a', { arrival: 3 }),
      one('late', { arrival: 1, promptTokensLeft: 30 }),
      one('soon', { arrival: 5, promptTokensLeft: 10, dueMs: 400 }),
      one('first', { arrival: 6, promptTokensLeft: 4, priority: 8 }),
      one('b', { arrival: 4 }),
    ];
    const want = [
      { id: 'a', count: 1 },
      { id: 'b', count: 1 },
      { id: 'first', count: 4 },
      { id: 'soon', count: 10 },
      { id: 'late', count: 10 },
    ];
    expect(planStep(all, limits, moment).segments).toEqual(want);
    expect(planStep(all, limits, { ...moment, costs: null }).segments).toEqual(want);
    // Whoever had nothing for 64 steps goes first.
    const starved = planStep(all, limits, { ...moment, step: 74, costs: null }).segments;
    expect(starved.slice(2)).toEqual([{ id: 'late', count: 24 }]);
    expect(planStep([], limits, moment).segments).toEqual([]);
  });

  it('cuts a prompt to what the row in the greatest hurry can bear', () => {
    const limits = { tokensMax: 500, segmentsMax: 8, prefillTokensMax: 400 };
    const prompt = one('p', { promptTokensLeft: 400 });
    const chunk = (...paces: number[]): number => {
      const rows = paces.map((pace, i) => one(`r${i}`, { paceMs: () => pace, rowRanks: 10 }));
      return planStep([...rows, prompt], limits, moment).segments.at(-1)!.count;
    };
    // Two rows of rank 10 take 8 + 2 · 3 ms.
    expect(chunk(never, never)).toBe(100); // 100 ms: whoever comes meanwhile waits for the end
    expect(chunk(100, 50)).toBe(36);
    expect(chunk(100, 14)).toBe(1); // nothing is left, and the prompt starves all the same not
    expect(chunk(100, 13)).toBe(86); // that row is late whatever happens
    expect(chunk(-4, -1)).toBe(100);
  });

  it('takes the prompt that is due first, whosever it is, and last those of tenants beyond their credit', () => {
    const limits = { tokensMax: 500, segmentsMax: 8, prefillTokensMax: 400 };
    const prompt = (id: string, tenant: string, dueMs: number): Runnable =>
      one(id, { tenant, dueMs, promptTokensLeft: 10 });
    const busy = [prompt('b1', 'busy', 300), prompt('b2', 'busy', 200), prompt('b3', 'busy', 100)];
    const all = [...busy, prompt('c', 'calm', 150), prompt('d', 'calm', 400)];
    const order = (credits: Readonly<Record<string, number>>): string =>
      planStep(all, limits, { ...moment, creditMs: (tenant) => credits[tenant]! })
        .segments.map(({ id }) => id)
        .join(' ');
    expect(order({ busy: 500, calm: 500 })).toBe('b3 c b2 b1 d');
    expect(order({ busy: 0, calm: 500 })).toBe('c d b3'); // and 0.3 of what those take
    expect(order({ busy: 0, calm: 0 })).toBe('b3 c b2 d'); // nobody is beyond the other: as much as it wants
  });

  it('holds a tenant without credit to a share of what the others have in the step', () => {
    const limits = { tokensMax: 500, segmentsMax: 100, prefillTokensMax: 400 };
    const flood = Array.from({ length: 30 }, (_, i) =>
      one(`f${i}`, { tenant: 'flood', arrival: i }),
    );
    const others = ['x', 'y'].map((tenant) => one(tenant, { tenant, arrival: 50 }));
    const creditMs = (tenant: string): number => (tenant === 'flood' ? 0 : 500);
    const rowsOf = (credit: Moment['creditMs'], ...rows: Runnable[]): number => {
      const { segments } = planStep(rows, limits, { ...moment, creditMs: credit });
      return segments.filter(({ id }) => id.startsWith('f')).length;
    };
    expect(rowsOf(creditMs, ...flood, ...others)).toBe(1); // 0.3 · (8 + 2 · 2) ms: one row of 2 ms, for one it has always
    const many = Array.from({ length: 10 }, (_, i) => one(`x${i}`, { tenant: 'x' }));
    expect(rowsOf(creditMs, ...flood, ...many)).toBe(4); // 0.3 · (8 + 10 · 2)
    const none = (): number => 0;
    expect(rowsOf(none, ...flood, ...many)).toBe(10); // nobody has credit: as many as the other one wants
    expect(rowsOf(none, ...flood, ...many, others[1]!)).toBe(5); // of 10 and 1; 0.3 · 30 ms would be 4
    expect(rowsOf(() => 500, ...flood, ...others)).toBe(30);
    expect(rowsOf(creditMs, ...flood)).toBe(30); // alone
  });
});
