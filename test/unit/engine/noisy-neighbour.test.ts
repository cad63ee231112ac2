import { describe, expect, it } from 'vitest';
import type { StepCosts } from '../../../src/engine/messages.ts';
import { drawUniform } from '../../../src/engine/random-draw.ts';
import { FakeStepper } from '../../support/fake-stepper.ts';
import { LoopHarness, makeRequest, nextTick } from '../../support/loop-harness.ts';

// faults.md S9: what one tenant's flood does to the answers of the others. Open loop: requests come when they come, by a
// seeded Poisson process, and time passes by what steps cost, as on the machine of docs/benchmarks.md.

const costs: StepCosts = {
  ...{ step: 8, decodeRow: 2.5, prefillToken: 2.5, decodeRank: 0, prefillRank: 0, kvCell: 0 },
};
const calm = ['a', 'b', 'c', 'd'];
/** Of each calm tenant, and of the fifth before it floods: together a third of what the machine could do. */
const perSecond = 0.2;
const secondsMax = 250;

interface Arrival {
  readonly atMs: number;
  readonly tenant: string;
  readonly prompt: number;
  readonly answer: number;
}

function arrivals(tenant: string, rate: number, seed: number): Arrival[] {
  const list: Arrival[] = [];
  let draws = 0;
  const draw = (): number => {
    draws += 1;
    return drawUniform(seed, draws);
  };
  for (let atMs = 0; ; ) {
    atMs += (-Math.log(1 - draw()) * 1000) / rate;
    if (atMs > secondsMax * 1000) return list;
    const prompt = 8 + Math.floor(56 * draw());
    list.push({ atMs, tenant, prompt, answer: 8 + Math.floor(40 * draw()) });
  }
}

/** Total times of the calm tenants' requests, ascending; Infinity of those that were refused. */
async function run(factor: number, isTold: boolean): Promise<number[]> {
  const harness = new LoopHarness({
    stepper: new FakeStepper({ cells: 4096, pages: 2, tokensMax: 256, segmentsMax: 32 }),
    limits: { waitingMax: 64, prefillTokensMax: 224 },
    speculation: 'off',
  });
  if (isTold) harness.loop.setCosts(costs);
  harness.advanceBy(costs);
  const all = [
    ...calm.flatMap((tenant, i) => arrivals(tenant, perSecond, i + 1)),
    ...arrivals('flood', perSecond * factor, 99),
  ].sort((a, b) => a.atMs - b.atMs);
  const startMs = harness.clock.nowMs();
  for (const [i, { atMs, tenant, prompt, answer }] of all.entries()) {
    while (harness.clock.nowMs() - startMs < atMs) {
      const { running, waiting } = harness.loop.stats();
      if (running + waiting > 0) await nextTick();
      else harness.clock.advance(atMs - (harness.clock.nowMs() - startMs));
    }
    const tokens = Int32Array.from({ length: prompt }, (_, k) => (i + 7 * k) % 64);
    harness.submit(makeRequest({ id: `${tenant}-${i}`, tenant, tokens, tokensMax: answer }));
  }
  await harness.drain(100_000);
  const times = [...harness.heard].flatMap(([id, { events }]) => {
    if (id.startsWith('flood')) return [];
    const end = events.at(-1);
    return [end?.kind === 'end' ? end.totalMs : Number.POSITIVE_INFINITY];
  });
  return times.sort((a, b) => a - b);
}

const at = (times: readonly number[], share: number): number =>
  times[Math.ceil(share * times.length) - 1]!;

describe('a noisy neighbour', () => {
  it('at 50 times the load raises the p99 of the others by half at most', async () => {
    const [quiet, noisy] = [await run(1, true), await run(50, true)];
    console.log(
      quiet.length,
      [0.5, 0.9, 0.99].map((s) => [at(quiet, s), at(noisy, s)]),
    );
    expect(quiet.length).toBeGreaterThan(150);
    expect(noisy).toHaveLength(quiet.length);
    const ratios = [0.5, 0.9, 0.99].map((share) => at(noisy, share) / at(quiet, share));
    expect(ratios[2], ratios.join()).toBeLessThanOrEqual(1.5);
    // The same flood, and nobody knows what a step costs: what it would be without.
    const unbounded = await run(50, false);
    expect(at(unbounded, 0.99) / at(quiet, 0.99)).toBeGreaterThan(2);
  }, 60_000);
});
