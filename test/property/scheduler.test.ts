import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { planAdmission, planStep, type Runnable } from '../../src/engine/scheduler.ts';

const limitsArbitrary = fc
  .record({
    tokensMax: fc.integer({ min: 2, max: 40 }),
    segmentsMax: fc.integer({ min: 2, max: 10 }),
    prefillTokensMax: fc.integer({ min: 1, max: 40 }),
  })
  .map((limits) => ({ ...limits, segmentsMax: Math.min(limits.segmentsMax, limits.tokensMax) }));

const workArbitrary = fc.array(
  fc.record({ prompt: fc.integer({ min: 1, max: 90 }), answer: fc.integer({ min: 1, max: 12 }) }),
  { minLength: 1, maxLength: 14 },
);

interface Job {
  readonly id: string;
  promptLeft: number;
  answerLeft: number;
  lastStep: number;
}

describe('planStep', () => {
  it('stays in its limits, computes every token once and starves nobody', () => {
    fc.assert(
      fc.property(workArbitrary, limitsArbitrary, (work, limits) => {
        const jobs: Job[] = work.map((one, i) => ({
          id: `j${i}`,
          promptLeft: one.prompt,
          answerLeft: one.answer,
          lastStep: Number.NEGATIVE_INFINITY,
        }));
        // Each step gives at least one prompt token when there is a prompt, and serves the decode rows in turn.
        const prompts = work.reduce((sum, one) => sum + one.prompt, 0);
        const rowsMax = Math.max(1, limits.segmentsMax - 1);
        const gapMax = Math.ceil(jobs.length / rowsMax);
        let steps = 0;
        for (; jobs.some((job) => job.answerLeft > 0); steps++) {
          expect(steps).toBeLessThan(prompts + (12 + 1) * (gapMax + 1) + jobs.length);
          const live = jobs.filter((job) => job.answerLeft > 0);
          const runnables: Runnable[] = live.map((job) => ({
            id: job.id,
            arrival: jobs.indexOf(job),
            promptTokensLeft: job.promptLeft,
            lastStep: job.lastStep,
          }));
          const plan = planStep(runnables, limits);
          expect(plan.length).toBeGreaterThan(0);
          expect(plan.length).toBeLessThanOrEqual(limits.segmentsMax);
          expect(new Set(plan.map((one) => one.id)).size).toBe(plan.length);
          expect(plan.reduce((sum, one) => sum + one.count, 0)).toBeLessThanOrEqual(
            limits.tokensMax,
          );
          let prefill = 0;
          for (const { id, count } of plan) {
            const job = jobs.find((one) => one.id === id)!;
            expect(count).toBeGreaterThan(0);
            if (job.promptLeft > 0) {
              expect(count).toBeLessThanOrEqual(job.promptLeft);
              prefill += count;
              job.promptLeft -= count;
              if (job.promptLeft === 0) job.answerLeft -= 1;
            } else {
              expect(count).toBe(1);
              job.answerLeft -= 1;
            }
            job.lastStep = steps;
          }
          expect(prefill).toBeLessThanOrEqual(limits.prefillTokensMax);
          for (const job of live) {
            if (job.promptLeft > 0 || job.answerLeft <= 0 || job.lastStep < 0) continue;
            expect(steps - job.lastStep).toBeLessThanOrEqual(gapMax);
          }
          // The earliest prompt is never passed over.
          const first = live.find((job) =>
            runnables.some((r) => r.id === job.id && r.promptTokensLeft > 0),
          );
          if (first !== undefined) expect(first.lastStep).toBe(steps);
        }
      }),
      { numRuns: 100 },
    );
  });

  it('gives every decode row its place and fills the rest with prompts in order of arrival', () => {
    const one = (id: string, arrival: number, promptTokensLeft: number): Runnable => ({
      id,
      arrival,
      promptTokensLeft,
      lastStep: 0,
    });
    const plan = planStep([one('a', 3, 0), one('p2', 2, 30), one('p1', 1, 10), one('b', 4, 0)], {
      tokensMax: 32,
      segmentsMax: 8,
      prefillTokensMax: 24,
    });
    expect(plan).toEqual([
      { id: 'a', count: 1 },
      { id: 'b', count: 1 },
      { id: 'p1', count: 10 },
      { id: 'p2', count: 14 },
    ]);
    expect(planStep([], { tokensMax: 1, segmentsMax: 1, prefillTokensMax: 1 })).toEqual([]);
  });
});

describe('planAdmission', () => {
  it('offers room to whoever holds least, and a flood only waits behind itself', () => {
    const queue = [
      ...Array.from({ length: 6 }, (_, i) => ({ id: `flood${i}`, tenant: 'flood', arrival: i })),
      { id: 'x', tenant: 'x', arrival: 6 },
      { id: 'y', tenant: 'y', arrival: 7 },
    ];
    const order = planAdmission(queue, new Map([['y', 2]])).map((one) => one.id);
    expect(order).toEqual(['flood0', 'x', 'flood1', 'flood2', 'y', 'flood3', 'flood4', 'flood5']);
  });

  it('is a permutation that keeps each tenant in order of arrival', () => {
    const tenants = fc.array(fc.constantFrom('a', 'b', 'c'), { maxLength: 40 });
    fc.assert(
      fc.property(tenants, fc.nat(5), fc.nat(5), (names, a, b) => {
        const queue = names.map((tenant, i) => ({ id: `${i}`, tenant, arrival: i }));
        const running = new Map([
          ['a', a],
          ['b', b],
        ]);
        const order = planAdmission(queue, running);
        expect([...order].sort((x, y) => x.arrival - y.arrival)).toEqual(queue);
        for (const tenant of ['a', 'b', 'c']) {
          const own = order.filter((one) => one.tenant === tenant).map((one) => one.arrival);
          expect(own).toEqual([...own].sort((x, y) => x - y));
        }
        // Served one by one, no tenant gets ahead of another that still waits by more than one.
        const held = new Map(running);
        order.forEach((one, i) => {
          for (const other of order.slice(i + 1)) {
            expect(held.get(one.tenant) ?? 0).toBeLessThanOrEqual(held.get(other.tenant) ?? 0);
          }
          held.set(one.tenant, (held.get(one.tenant) ?? 0) + 1);
        });
      }),
    );
  });
});
