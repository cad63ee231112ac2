import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import type { GenerateRequest } from '../../src/engine/messages.ts';
import { type CellHold, PrefixCache } from '../../src/engine/prefix-cache.ts';
import type { SpeculationWish } from '../../src/engine/speculation.ts';
import { useOf } from '../support/adapter-use.ts';
import { FakeStepper, fakeGeneration } from '../support/fake-stepper.ts';
import {
  fakeRankOf,
  type Heard,
  idsOf,
  LoopHarness,
  makeRequest,
  textOf,
} from '../support/loop-harness.ts';

// Busy loops with and without speculation over the same requests: what a reader is told must be the same, event by
// event, whatever is guessed. The stepper's next token follows the last one as often as `strength` says, so guesses are
// right, wrong and half right.

interface Job {
  readonly request: GenerateRequest;
  /** Its tokens after which its reader goes away. */
  readonly cancelAfter: number | null;
}

const samplingArbitrary = fc.record({
  temperature: fc.constantFrom(0, 0, 0.3, 1),
  topP: fc.constantFrom(1, 0.8),
  topK: fc.constantFrom(0, 5),
  minP: fc.constant(0),
  seed: fc.nat(0xffffffff),
  presencePenalty: fc.constantFrom(0, 0, 0.4),
  frequencyPenalty: fc.constantFrom(0, 0, 0.3),
  repetitionPenalty: fc.constantFrom(1, 1, 1.2),
  logitBias: fc.constantFrom([], [[9, 2] as const]),
});

const jobArbitrary = fc.record({
  prompt: fc.constantFrom(0, 0, 1, 2), // the first is asked for often: n > 1, and cells used again
  sampling: samplingArbitrary,
  tokensMax: fc.integer({ min: 1, max: 60 }),
  stop: fc.constantFrom([], [], ['ab'], ['kf', 'zaz'], ['é']),
  topLogprobs: fc.constantFrom(null, null, 2),
  adapter: fc.constantFrom(null, null, 1, 2),
  cancelAfter: fc.constantFrom(null, null, null, 1, 7, 20),
});

const casesArbitrary = fc.record({
  prompts: fc.array(fc.array(fc.nat(7), { minLength: 1, maxLength: 40 }), {
    minLength: 3,
    maxLength: 3,
  }),
  jobs: fc.array(jobArbitrary, { minLength: 1, maxLength: 6 }),
  strength: fc.constantFrom(0, 5, 9),
  endTokens: fc.constantFrom([], [11]),
});
type Case = typeof casesArbitrary extends fc.Arbitrary<infer T> ? T : never;

function jobsOf({ prompts, jobs }: Case): Job[] {
  return jobs.map(({ prompt, adapter, cancelAfter, ...rest }, i) => {
    const generation = adapter === null ? null : fakeGeneration(adapter);
    return {
      cancelAfter,
      request: makeRequest({
        ...rest,
        id: `r${i}`,
        tokens: Int32Array.from(prompts[prompt]!),
        adapter: generation === null ? null : useOf(generation, fakeRankOf(generation)),
      }),
    };
  });
}

/** Remembers every prefix that was called computed. */
class WatchedCache extends PrefixCache {
  readonly published: number[][] = [];

  override fill(hold: CellHold, tokens: Int32Array, count: number): void {
    this.published.push([...tokens.subarray(0, count)]);
    super.fill(hold, tokens, count);
  }
}

interface Run {
  readonly harness: LoopHarness;
  readonly cache: WatchedCache;
  readonly heard: Heard[];
}

async function run(one: Case, speculation: SpeculationWish): Promise<Run> {
  const strength = one.strength;
  const stepper = new FakeStepper({
    cells: 1024,
    pages: 12,
    onLogits: (_, logits, token) => {
      logits[(token * 5 + 3) % 12]! += strength;
    },
  });
  let cache: WatchedCache | undefined;
  const harness = new LoopHarness({
    stepper,
    speculation,
    base: { endTokens: one.endTokens },
    createCache: (options) => {
      cache = new WatchedCache(options);
      return cache;
    },
  });
  const jobs = jobsOf(one);
  const heard = jobs.map(({ request }) => harness.submit(request));
  harness.onMessage = () => {
    for (const [i, { request, cancelAfter }] of jobs.entries()) {
      if (cancelAfter !== null && idsOf(heard[i]!).length >= cancelAfter) {
        harness.loop.cancel(request.id);
      }
    }
  };
  await harness.drain();
  // Each conversation goes on, out of cells that were left behind.
  for (const [i, { request }] of jobs.entries()) {
    if (heard[i]!.failure !== null || request.adapter !== null) continue;
    const tokens = Int32Array.of(...request.tokens, ...idsOf(heard[i]!).slice(0, 18), 3);
    heard.push(harness.submit({ ...request, id: `${request.id}'`, tokens }));
  }
  await harness.drain();
  return { harness, cache: cache!, heard };
}

let drafted = 0;
let accepted = 0;

describe('speculation', () => {
  it('tells every reader what it would have been told without', async () => {
    await fc.assert(
      fc.asyncProperty(casesArbitrary, async (one) => {
        const off = await run(one, 'off');
        const auto = await run(one, 'auto');
        expect(off.harness.loop.stats().draftTokens).toBe(0);
        const jobs = jobsOf(one);
        for (const [i, { events, failure }] of auto.heard.entries()) {
          const want = off.heard[i]!;
          expect(failure).toEqual(want.failure);
          if (jobs[i] === undefined || jobs[i].cancelAfter === null) {
            // How much of a prompt lay in cells depends on when others ended.
            const told = (heard: Heard) => heard.events.filter((event) => event.kind !== 'start');
            if (jobs[i] !== undefined) expect(told(auto.heard[i]!)).toEqual(told(want));
            continue;
          }
          // Cancelled: both got a beginning of the same answer, of the length that their steps made it.
          const [a, b] = [idsOf(auto.heard[i]!), idsOf(want)];
          const least = Math.min(a.length, b.length);
          expect(a.slice(0, least)).toEqual(b.slice(0, least));
          expect(events.length).toBeGreaterThan(0);
        }
        const { draftTokens, draftTokensAccepted } = auto.harness.loop.stats();
        drafted += draftTokens;
        accepted += draftTokensAccepted;
      }),
      { numRuns: 40 },
    );
  }, 60_000);

  it('publishes and reuses cells of tokens that were decided, never of guesses', async () => {
    await fc.assert(
      fc.asyncProperty(casesArbitrary, async (one) => {
        const whole = { ...one, jobs: one.jobs.map((job) => ({ ...job, cancelAfter: null })) };
        const { harness, cache, heard } = await run(whole, 'auto');
        const jobs = jobsOf(whole);
        const answers = heard.map((each, i) => {
          const prompt = jobs[i]?.request.tokens ?? [];
          return [...prompt, ...idsOf(each)];
        });
        // The second round, whose prompts are made of the first.
        const again = jobs.flatMap(({ request }, i) =>
          request.adapter === null
            ? [[...request.tokens, ...idsOf(heard[i]!).slice(0, 18), 3]]
            : [],
        );
        again.forEach((prompt, i) => {
          answers[jobs.length + i] = [...prompt, ...idsOf(heard[jobs.length + i]!)];
        });
        const texts = answers.map((tokens) => `${tokens.join()},`);
        for (const tokens of cache.published) {
          const text = tokens.length === 0 ? '' : `${tokens.join()},`;
          expect(texts.some((answer) => answer.startsWith(text))).toBe(true);
        }
        // And what lay in the cells is what a loop without speculation computes from nothing.
        const fresh = await run(whole, 'off');
        expect(heard.map(idsOf)).toEqual(fresh.heard.map(idsOf));
        expect(heard.map(textOf)).toEqual(fresh.heard.map(textOf));
        expect(harness.loop.stats()).toMatchObject({ running: 0, waiting: 0, kvCellsUsed: 0 });
      }),
      { numRuns: 30 },
    );
  }, 60_000);

  afterAll(() => {
    // The cases above guessed right and wrong.
    expect(accepted).toBeGreaterThan(50);
    expect(drafted - accepted).toBeGreaterThan(20);
  });
});
