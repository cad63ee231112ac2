import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { blobPath } from '../../../src/adapters/blobs.ts';
import { generationOf } from '../../../src/adapters/pack.ts';
import { packPeft } from '../../../src/adapters/pack-peft.ts';
import type { EngineEvent, GenerateRequest } from '../../../src/engine/messages.ts';
import { openLoop } from '../../../src/engine/open-loop.ts';
import {
  Drafter,
  draftAll,
  probeSteps,
  RowCost,
  type SpeculationWish,
} from '../../../src/engine/speculation.ts';
import { sha256OfFile } from '../../../src/model/file-hash.ts';
import { useOf } from '../../support/adapter-use.ts';
import { FakeStepper } from '../../support/fake-stepper.ts';
import { greedy, idsOf, LoopHarness, makeRequest, nextTick } from '../../support/loop-harness.ts';
import { createManualClock } from '../../support/manual-clock.ts';
import { openTiny, tinyPath } from '../../support/open-test-decoder.ts';
import { createRng } from '../../support/random.ts';

/** A model that repeats a text of 12 tokens for ever. */
function copyingHarness(speculation: SpeculationWish): LoopHarness {
  const stepper = new FakeStepper({
    cells: 4096,
    pages: 2,
    onLogits: (_, logits, token) => {
      logits[(token * 5 + 3) % 64]! += 20;
    },
  });
  return new LoopHarness({ stepper, speculation });
}

describe('speculation in the loop', () => {
  it('a text that repeats itself comes in far fewer steps, event for event the same', async () => {
    const request = makeRequest({ id: 'r', tokensMax: 200, topLogprobs: 1 });
    const [auto, off] = (['auto', 'off'] as const).map(copyingHarness);
    const [fast, slow] = [auto!.submit(request), off!.submit(request)];
    await auto!.drain();
    await off!.drain();
    expect(fast).toEqual(slow);
    expect(idsOf(fast)).toHaveLength(200);
    expect(auto!.stepper.steps).toBeLessThan(200 / 1.5);
    expect(off!.stepper.steps).toBe(200);
    const { draftTokens, draftTokensAccepted, tokensGenerated } = auto!.loop.stats();
    expect(draftTokensAccepted).toBe(200 - auto!.stepper.steps);
    expect(draftTokens).toBeGreaterThanOrEqual(draftTokensAccepted);
    expect(tokensGenerated).toBe(200);
    const rows = auto!.reports.reduce((sum, report) => sum + report.decodeRows, 0);
    expect(rows).toBe(draftTokens + auto!.stepper.steps - 1); // but for the prompt's
  });

  it('a text that never repeats is guessed at no more often than the probes', async () => {
    const stepper = new FakeStepper({ cells: 4096, pages: 2 });
    const harness = new LoopHarness({ stepper });
    harness.submit(makeRequest({ id: 'r', tokensMax: 2000 }));
    await harness.drain();
    const { draftTokens, draftTokensAccepted } = harness.loop.stats();
    // Until the rate has fallen from a half below a row's cost, and then one in so many steps.
    expect(draftTokens - 2 * draftTokensAccepted).toBeLessThan(45 + 2000 / probeSteps);
    expect(draftTokens).toBeGreaterThan(10);
  });

  it('guesses beside no prompt, and stays in the stepper’s limits', async () => {
    const rows: number[] = [];
    const stepper = new FakeStepper({
      cells: 4096,
      pages: 2,
      segmentsMax: 6,
      onLogits: (_, logits, token) => {
        logits[(token * 5 + 3) % 64]! += 20;
      },
      onStep: (segments) => {
        const drafts = segments.reduce((sum, one) => sum + (one.drafts ?? 0), 0);
        if (drafts > 0) expect(segments.every((one) => one.wantsLogits)).toBe(true);
        rows.push(drafts + segments.length);
      },
    });
    const harness = new LoopHarness({ stepper });
    for (let i = 0; i < 9; i++) {
      const tokens = Int32Array.from({ length: 1 + 20 * i }, (_, at) => (at * i) % 64);
      harness.submit(makeRequest({ id: `r${i}`, tokens, tokensMax: 20 + 9 * i }));
    }
    await harness.drain(); // the stepper refuses what breaks a limit
    expect([...harness.heard.values()].every((one) => one.failure === null)).toBe(true);
    expect(Math.max(...rows)).toBeLessThanOrEqual(6);
    expect(harness.loop.stats().draftTokensAccepted).toBeGreaterThan(20);
  });

  it('a reader that leaves between guessed tokens leaves cells that the next one can use', async () => {
    const harness = copyingHarness('auto');
    const first = harness.submit(makeRequest({ id: 'a', tokensMax: 200 }));
    while (harness.loop.stats().draftTokensAccepted < 20) await nextTick();
    harness.loop.cancel('a');
    const told = idsOf(first);
    expect(harness.loop.stats()).toMatchObject({ running: 0, kvCellsUsed: 0 });
    await harness.drain();
    expect(idsOf(first)).toEqual(told);
    const next = makeRequest({
      id: 'b',
      tokens: Int32Array.of(1, 2, 3, ...told, 50),
      tokensMax: 30,
    });
    const again = harness.submit(next);
    await harness.drain();
    expect(again.events[0]).toMatchObject({ kind: 'start' });
    expect((again.events[0] as EngineEvent & { kind: 'start' }).cachedTokens).toBeGreaterThan(15);
    const fresh = copyingHarness('off');
    const want = fresh.submit(next);
    await fresh.drain();
    expect(idsOf(again)).toEqual(idsOf(want));
  });
});

describe('draftAll', () => {
  const drafting = (rate: 'good' | 'bad', count = 40) => {
    const tokens = Int32Array.from({ length: 400 }, (_, i) => i % 4);
    const drafter = new Drafter(tokens);
    for (let i = 0; i < 20; i++) drafter.learn(rate === 'good' ? 3 : 0, rate === 'bad');
    return { count, drafter };
  };

  it('guesses further where guesses come true and rows are cheap, not at all where they do not', () => {
    const alone = (rate: 'good' | 'bad', rowShare: number): number => {
      const one = drafting(rate);
      return draftAll([one], 31, rowShare).get(one)!;
    };
    expect(alone('good', 0.02)).toBe(7);
    expect(alone('good', 0.9)).toBeGreaterThan(0);
    expect(alone('bad', 0.02)).toBeLessThan(2);
    expect(alone('bad', 0.3)).toBe(0);
  });

  it('lets the guesses of some delay the others by a quarter of a step at most', () => {
    const good = [drafting('good'), drafting('good'), drafting('good')];
    const bad = [drafting('bad'), drafting('bad')];
    const drafts = draftAll([...bad, ...good], 27, 0.05);
    const total = [...drafts.values()].reduce((a, b) => a + b, 0);
    expect(total).toBeGreaterThan(2);
    expect(total).toBeLessThanOrEqual(5);
    for (const one of bad) expect(drafts.get(one)).toBe(0); // the good ones chose first
  });

  it('never guesses past the end of the answer', () => {
    for (const left of [1, 2, 3, 5]) {
      const one = drafting('good', 400 - left);
      expect(draftAll([one], 31, 0.01).get(one)).toBeLessThanOrEqual(left - 1);
    }
  });
});

describe('RowCost', () => {
  it('learns what a row costs from steps of several sizes, whatever pauses come between', () => {
    const rng = createRng(3);
    const cost = new RowCost();
    for (let i = 0; i < 400; i++) {
      const rows = 1 + rng.below(8);
      cost.observe(rows, (10 + 2 * rows) * (0.95 + 0.1 * rng.next()));
      if (i % 90 === 50) cost.observe(rows, 500);
    }
    for (const rows of [1, 4, 8]) {
      const want = 2 / (10 + 2 * rows);
      expect(Math.abs(cost.share(rows) / want - 1)).toBeLessThan(0.35);
    }
  });

  it('says what was measured elsewhere before it saw anything, and while it sees one size only', () => {
    const cost = new RowCost();
    const before = cost.share(1);
    cost.observe(1, 0); // a clock that stands
    expect(cost.share(1)).toBe(before);
    for (let i = 0; i < 100; i++) cost.observe(1, 7);
    expect(cost.share(1)).toBeCloseTo(before, 6);
    expect(cost.share(30)).toBeLessThan(before);
  });
});

describe('speculation over a model', () => {
  const blobDirectory = mkdtempSync(join(tmpdir(), 'rankgate-speculation-'));
  afterAll(() => rmSync(blobDirectory, { recursive: true, force: true }));

  async function storeAdapter(modelHash: string): Promise<`sha256:${string}`> {
    const folder = join(import.meta.dirname, '../../golden/adapters/rslora-r8');
    const { decoder, config } = await openTiny({ backend: 'reference' });
    decoder[Symbol.dispose]();
    const { bytes } = packPeft({
      config: readFileSync(join(folder, 'adapter_config.json'), 'utf8'),
      weights: readFileSync(join(folder, 'adapter_model.safetensors')),
      base: { config, hash: modelHash, names: ['tiny-random'] },
      acceptBaseName: null,
    });
    const generation = generationOf(bytes);
    writeFileSync(blobPath(blobDirectory, generation), bytes);
    return generation;
  }

  async function answer(
    requests: readonly GenerateRequest[],
    speculation: SpeculationWish,
    modelHash: string,
  ): Promise<{ readonly told: unknown[]; readonly accepted: number; readonly drafts: number }> {
    const told: unknown[] = [];
    let open = 0;
    const loop = await openLoop(
      {
        ...{ modelPath: tinyPath, modelHash, weights: 'exact', backend: 'reference', threads: 1 },
        ...{ device: 'cpu', libraryDirectory: null, cacheDirectory: null, blobDirectory },
        ...{ cells: 1024, pages: 4, tokensMax: 64, segmentsMax: 16, tenantShareMax: 0.5 },
        limits: {
          waitingMax: 100,
          waitingTokensMax: 10_000,
          waitingMsMax: 60_000,
          prefillTokensMax: 64,
        },
        speculation,
      },
      createManualClock(), // steps take no time: what a row costs stays as it was assumed
      (message) => {
        if (message.kind === 'failed') throw new Error(message.message);
        if (message.kind !== 'events') return;
        for (const { id, event } of message.batch) {
          if (event.kind === 'piece') told.push([id, event]);
          if (event.kind === 'end') told.push([id, event.reason, event.completionTokens]);
          if (event.kind === 'end') open -= 1;
        }
      },
    );
    // Two at a time: rows with guesses beside rows without, and few enough that guesses pay.
    for (let i = 0; i < requests.length; i += 2) {
      const pair = requests.slice(i, i + 2);
      open = pair.length;
      for (const request of pair) loop.submit(request);
      while (open > 0) await nextTick();
    }
    const { draftTokensAccepted: accepted, draftTokens: drafts } = loop.stats();
    loop.stop();
    const inOrder = requests.map(({ id }) => told.filter((one) => (one as [string])[0] === id));
    return { told: inOrder, accepted, drafts };
  }

  it('is bit for bit what it is without, log-probabilities too: reference kernels, tiny model', async () => {
    const modelHash = await sha256OfFile(tinyPath);
    const generation = await storeAdapter(modelHash);
    const tokens = Int32Array.from({ length: 24 }, (_, i) => 40 + (i % 6));
    // The tiny model's numbers are random: among five tokens it repeats itself sometimes.
    const logitBias = [40, 41, 42, 43, 44].map((token) => [token, 60] as const);
    const requests = [0, 1, 4].flatMap((temperature, i) =>
      [null, useOf(generation, 8), useOf(generation, 3)].map((adapter, j) =>
        makeRequest({
          id: `${i}.${j}`,
          tokens,
          tokensMax: 60,
          topLogprobs: 2,
          adapter,
          sampling: {
            ...greedy,
            temperature,
            seed: 10 * i + j,
            topP: j === 1 ? 0.9 : 1,
            logitBias,
          },
        }),
      ),
    );
    const off = await answer(requests, 'off', modelHash);
    const auto = await answer(requests, 'auto', modelHash);
    expect(auto.told).toEqual(off.told);
    expect(off.drafts).toBe(0);
    expect(auto.accepted).toBeGreaterThan(20);
    expect(auto.drafts).toBeGreaterThan(auto.accepted);
  }, 120_000);
});
