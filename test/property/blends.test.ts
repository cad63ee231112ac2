import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { blendKey } from '../../src/adapters/blend-key.ts';
import type { ResidentKey } from '../../src/adapters/residency.ts';
import { type AdapterUse, merges } from '../../src/engine/messages.ts';
import { blendOf } from '../support/adapter-use.ts';
import { fakeGeneration } from '../support/fake-stepper.ts';
import { idleAnswer } from '../support/idle-answer.ts';
import { fakeRankOf, idsOf, LoopHarness, makeRequest } from '../support/loop-harness.ts';

// Requests that want several adapters each, over a memory that holds few of them: whoever held some and waited for the
// rest could wait for somebody who does the same. Every request must end, as the model alone answers it; only those whose
// adapters fit into no memory of this size may be refused, and those must be.

const kinds = 7;
const part = fc.record({
  n: fc.nat(kinds - 1),
  /** Of its own ranks: 0 leaves it out. */
  share: fc.constantFrom(0, 0.1, 0.3, 1),
  weight: fc.constantFrom(1, 1, 0.5, -2, 0),
});
const job = fc.record({
  parts: fc.uniqueArray(part, { minLength: 1, maxLength: 4, selector: ({ n }) => n }),
  merge: fc.constantFrom('linear' as const, 'linear' as const, ...merges),
  system: fc.option(part, { freq: 3 }),
  tenant: fc.constantFrom('a', 'b', 'c'),
  tokensMax: fc.integer({ min: 1, max: 12 }),
  prompt: fc.integer({ min: 1, max: 40 }),
  /** Ticks between it and the one before it, and until it is cancelled. */
  after: fc.nat(3),
  cancelAfter: fc.option(fc.nat(12), { freq: 4 }),
});
type Job = typeof job extends fc.Arbitrary<infer T> ? T : never;

function useOfJob({ parts, merge, system }: Job): AdapterUse {
  const made = parts.map(({ n, share, weight }) => {
    const generation = fakeGeneration(n);
    return [generation, Math.ceil(share * fakeRankOf(generation)), weight] as const;
  });
  const repair = fakeGeneration(system?.n ?? 0);
  const rank = Math.min(3, fakeRankOf(repair));
  const under = system === null ? null : { generation: repair, rank, weight: 1 };
  const isLinear = merge === 'linear';
  return blendOf(made, { merge, density: isLinear ? 1 : 0.5, system: under });
}

/** Pages that nothing but it needs. */
function pagesOf({ parts, merge, density, system }: AdapterUse): number {
  const active = parts.filter(({ rank }) => rank > 0);
  const ranks = new Map<ResidentKey, number>();
  const need = (key: ResidentKey, rank: number): void =>
    void ranks.set(key, Math.max(rank, ranks.get(key) ?? 0));
  if (merge !== 'linear' && active.length > 0) {
    const key = blendKey({ merge, density, parts: active });
    need(key, fakeRankOf(key));
  } else for (const { generation, rank } of active) need(generation, rank);
  if (system !== null) need(system.generation, system.rank);
  return [...ranks.values()].reduce((sum, rank) => sum + Math.ceil(rank / 8), 0);
}

describe('sequences of several adapters', () => {
  it('all end, as the model alone answers them, whatever the memory holds', async () => {
    let [blends, refused] = [0, 0];
    await fc.assert(
      fc.asyncProperty(
        fc.array(job, { minLength: 4, maxLength: 12, size: 'max' }),
        fc.integer({ min: 4, max: 13 }),
        async (jobs, pages) => {
          const harness = new LoopHarness({ pages, cells: 20 * 16 });
          const requests = jobs.map((one, i) =>
            makeRequest({
              id: `r${i}`,
              tokens: Int32Array.from({ length: one.prompt }, (_, at) => (at * 7) % 50),
              tokensMax: one.tokensMax,
              tenant: one.tenant,
              adapter: useOfJob(one),
            }),
          );
          const cancels = new Map<number, string[]>();
          let tick = 0;
          for (const [i, request] of requests.entries()) {
            const { after, cancelAfter } = jobs[i]!;
            for (let t = 0; t < after; t++, tick++) {
              for (const id of cancels.get(tick) ?? []) harness.loop.cancel(id);
              await harness.ticks(1);
            }
            harness.submit(request);
            if (cancelAfter !== null) {
              cancels.set(tick + cancelAfter, [
                ...(cancels.get(tick + cancelAfter) ?? []),
                request.id,
              ]);
            }
          }
          for (let t = 0; t < 16; t++, tick++) {
            for (const id of cancels.get(tick) ?? []) harness.loop.cancel(id);
            await harness.ticks(1);
          }
          await harness.drain();
          for (const [i, request] of requests.entries()) {
            const { failure, events } = harness.heard.get(request.id)!;
            const fits = pagesOf(request.adapter!) <= pages - 1;
            const got = idsOf({ events, failure });
            const want = idleAnswer(request, fakeRankOf, []).tokens;
            if (jobs[i]!.cancelAfter !== null) {
              expect(got).toEqual(want.slice(0, got.length));
              continue;
            }
            expect(failure?.code ?? null, request.id).toBe(fits ? null : 'UNSUPPORTED');
            if (!fits) refused += 1;
            else {
              expect(got, request.id).toEqual(want);
              if (pagesOf(request.adapter!) > 1) blends += 1;
            }
          }
          expect(harness.residency.list().filter(({ uses }) => uses > 0)).toEqual([]);
          expect(harness.loop.stats()).toMatchObject({ running: 0, waiting: 0, kvCellsUsed: 0 });
        },
      ),
      { numRuns: 200 },
    );
    // It was about what it says.
    expect(blends).toBeGreaterThan(200);
    expect(refused).toBeGreaterThan(10);
  });
});
