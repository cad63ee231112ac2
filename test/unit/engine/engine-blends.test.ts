import { describe, expect, it } from 'vitest';
import { type Generation, noOptions } from '../../../src/adapters/adapter.ts';
import { blendKey } from '../../../src/adapters/blend-key.ts';
import type { PackedAdapter } from '../../../src/adapters/pack.ts';
import type { ResidentKey } from '../../../src/adapters/residency.ts';
import { atomLogits } from '../../../src/engine/instruction-prior.ts';
import type { AdapterUse, GenerateRequest } from '../../../src/engine/messages.ts';
import { GatewayError } from '../../../src/errors.ts';
import type { AdapterRows, Segment } from '../../../src/model/stepper.ts';
import { blendOf, useOf } from '../../support/adapter-use.ts';
import { FakeStepper, fakeConfig, fakeGeneration, fakePacked } from '../../support/fake-stepper.ts';
import { heldBytes } from '../../support/held-bytes.ts';
import { idleAnswer } from '../../support/idle-answer.ts';
import { fakeRankOf, idsOf, LoopHarness, makeRequest } from '../../support/loop-harness.ts';

// Requests of several adapters through the loop. Generations 1, 2 and 3 of the fakes have ranks 8, 15 and 22.

const [one, two, three] = [fakeGeneration(1), fakeGeneration(2), fakeGeneration(3)];
const range = (length: number, from = 0): Int32Array =>
  Int32Array.from({ length }, (_, i) => (from + i * 7) % 64);
const idle = (request: GenerateRequest) => idleAnswer(request, fakeRankOf, []).tokens;

function expectClean(harness: LoopHarness): void {
  expect(harness.loop.stats()).toMatchObject({ running: 0, waiting: 0, kvCellsUsed: 0 });
  expect(harness.residency.list().filter(({ uses }) => uses > 0)).toEqual([]);
}

/** Remembers what each step was given. */
function watched(pages = 12): { stepper: FakeStepper; seen: AdapterRows[] } {
  const seen: AdapterRows[] = [];
  const onStep = (segments: readonly Segment[]): void => {
    for (const { adapter } of segments) if (adapter !== null) seen.push(adapter);
  };
  return { seen, stepper: new FakeStepper({ cells: 1024, pages, onStep }) };
}

describe('blends in the loop', () => {
  it('answer as the model alone does, beside their parts and the base in one batch', async () => {
    const { stepper, seen } = watched();
    const harness = new LoopHarness({ stepper });
    const uses: ReadonlyArray<AdapterUse | null> = [
      null,
      useOf(one, 8),
      blendOf([
        [one, 8, 0.5],
        [two, 9, -2],
      ]),
      blendOf([
        [two, 15, 1],
        [one, 0, 1],
        [three, 4, 1],
      ]),
      blendOf([[two, 3, 0.25]]),
      blendOf([[one, 8, 1]], { system: { generation: three, rank: 22, weight: 1 } }),
      blendOf([], { system: { generation: two, rank: 15, weight: 1 } }),
    ];
    const requests = uses.map((adapter, i) =>
      makeRequest({ id: `r${i}`, tokens: range(20 + i), tokensMax: 40, adapter }),
    );
    const heard = requests.map((request) => harness.submit(request));
    await harness.drain();
    for (const [i, request] of requests.entries()) {
      expect(idsOf(heard[i]!), request.id).toEqual(idle(request));
    }
    expect(new Set(requests.map((request) => idle(request).join())).size).toBe(uses.length);
    expect(Math.max(...harness.reports.map(({ decodeRows }) => decodeRows))).toBe(uses.length);
    // The decoder compares uses by identity: one object each, from the first step to the last.
    expect(new Set(seen).size).toBe(uses.length - 1);
    expectClean(harness);
  });

  it('cost the ranks of all their parts', async () => {
    const harness = new LoopHarness();
    const adapter = blendOf(
      [
        [one, 5, 1],
        [two, 6, 0.5],
      ],
      { system: { generation: three, rank: 7, weight: 1 } },
    );
    harness.submit(makeRequest({ id: 'r', tokens: range(10), tokensMax: 2, adapter }));
    await harness.drain();
    const merged = { ...adapter, merge: 'dare_linear', density: 0.5 } as const;
    harness.submit(makeRequest({ id: 'm', tokens: range(10, 1), tokensMax: 2, adapter: merged }));
    await harness.drain();
    // What it was merged into, and the system adapter.
    const ranks = fakeRankOf(blendKey(merged)) + 7;
    expect(harness.reports).toMatchObject([
      { prefillTokens: 10, prefillRanks: 180 },
      { decodeRows: 1, decodeRanks: 18 },
      { prefillTokens: 10, prefillRanks: 10 * ranks },
      { decodeRows: 1, decodeRanks: ranks },
    ]);
  });

  it('merge into one resident under a name of what they are made of', async () => {
    const opened: ResidentKey[] = [];
    const open = (key: ResidentKey) => {
      opened.push(key);
      return Promise.resolve(fakePacked(key, fakeRankOf(key)));
    };
    const harness = new LoopHarness({ open, pages: 40 });
    const parts = [
      [one, 8, 0.5],
      [two, 4, 1],
    ] as const;
    const ask = async (id: string, over: Partial<AdapterUse>) => {
      const adapter = blendOf(parts, { merge: 'ties', density: 0.5, ...over });
      const request = makeRequest({ id, tokens: range(20), adapter });
      const heard = harness.submit(request);
      await harness.drain();
      expect(idsOf(heard), id).toEqual(idle(request));
    };
    await ask('first', {});
    await ask('again', {});
    await ask('another density', { density: 0.25 });
    await ask('another merge', { merge: 'dare_ties' });
    await ask('on a system adapter', { system: { generation: three, rank: 2, weight: 1 } });
    const name = `${one}*8*0.5,${two}*4*1`;
    expect(opened).toEqual([
      `blend:ties:0.5:${name}`,
      `blend:ties:0.25:${name}`,
      `blend:dare_ties:0.5:${name}`,
      three,
    ]);
    expectClean(harness);
  });

  it('of a thousand weights leave nothing behind that those before had not', async () => {
    const harness = new LoopHarness({ pages: 12 });
    const run = async (from: number, count: number): Promise<number> => {
      for (let i = from; i < from + count; i++) {
        const parts = [[one, 8, 1 + i / 1000] as const, [two, 4, 1] as const];
        const adapter = blendOf(parts, { merge: 'dare_ties', density: 0.5 });
        const heard = harness.submit(makeRequest({ id: `r${i}`, tokens: range(20, i), adapter }));
        await harness.drain();
        expect(heard.failure).toBeNull();
      }
      for (const told of [harness.messages, harness.reports]) told.length = 0;
      harness.heard.clear();
      return heldBytes();
    };
    const before = await run(0, 300); // caches are full
    const after = await run(300, 1000);
    expect(after - before).toBeLessThan(1e6);
    expect(harness.residency.list().length).toBeLessThanOrEqual(11);
    expectClean(harness);
  });

  it('are not served without a part: it fails the request alone, and the other part is free', async () => {
    const harness = new LoopHarness({
      open: (key) =>
        key === two
          ? Promise.reject(new GatewayError('ADAPTER_CORRUPT', 'planted'))
          : Promise.resolve(fakePacked(key, fakeRankOf(key))),
    });
    const broken = blendOf([
      [one, 8, 1],
      [two, 1, 1],
      [three, 1, 1],
    ]);
    const whole = blendOf([
      [one, 8, 1],
      [three, 1, 1],
    ]);
    const requests = [broken, whole, useOf(one, 8)].map((adapter, i) =>
      makeRequest({ id: `r${i}`, tokens: range(9), adapter }),
    );
    const heard = requests.map((request) => harness.submit(request));
    await harness.drain();
    expect(heard[0]).toEqual({
      events: [],
      failure: { code: 'ADAPTER_CORRUPT', message: 'planted' },
    });
    expect(idsOf(heard[1]!)).toEqual(idle(requests[1]!));
    expect(idsOf(heard[2]!)).toEqual(idle(requests[2]!));
    expectClean(harness);
  });

  it('give back what they hold when cancelled between two loads', async () => {
    const reading: Array<() => void> = [];
    const harness = new LoopHarness({
      open: async (key) => {
        await new Promise<void>((resolve) => reading.push(resolve));
        return fakePacked(key, fakeRankOf(key));
      },
    });
    const adapter = blendOf([
      [one, 8, 1],
      [two, 8, 1],
    ]);
    harness.submit(makeRequest({ id: 'r', adapter }));
    await harness.ticks(3);
    reading.shift()!();
    await harness.ticks(4);
    expect(harness.residency.list()).toMatchObject([{ generation: one, uses: 1 }]);
    expect(reading).toHaveLength(1); // the second load
    harness.loop.cancel('r');
    expectClean(harness);
    await harness.ticks(2);
    expect(harness.loop.stats().waiting).toBe(0);
  });

  it('reload a part that holds more ranks than they want, when it is in the way', async () => {
    const harness = new LoopHarness({ pages: 6 }); // five to give
    const whole = makeRequest({ id: 'whole', adapter: useOf(three, 22) }); // three of them
    harness.submit(whole);
    await harness.drain();
    const adapter = blendOf([
      [three, 1, 1],
      [fakeGeneration(4), 29, 1], // four
    ]);
    const request = makeRequest({ id: 'r', tokens: range(12), adapter });
    const heard = harness.submit(request);
    await harness.drain();
    expect(idsOf(heard)).toEqual(idle(request));
    const tooMuch = blendOf([
      [three, 9, 1],
      [fakeGeneration(4), 29, 1],
    ]);
    const refused = harness.submit(makeRequest({ id: 'refused', adapter: tooMuch }));
    await harness.drain();
    expect(refused.failure).toEqual({
      code: 'UNSUPPORTED',
      message: 'the engine has no room for 2 adapters together',
    });
    expectClean(harness);
  });

  it('are refused for a weight or a rank that is none', async () => {
    const harness = new LoopHarness();
    const codes = [
      blendOf([[one, 8, Number.NaN]]),
      blendOf([[one, 8, 17]]),
      blendOf([[one, -1, 1]]),
      blendOf([[one, 9, 1]]),
      blendOf([[one, 8, 1]], { system: { generation: two, rank: 16, weight: 1 } }),
      blendOf([[one, 8, 1]], { prior: { tokens: [1], strength: 1 } }),
      blendOf([[one, 8, 1]], { prior: { tokens: [64], strength: 1 } }),
    ].map((adapter, i) => harness.submit(makeRequest({ id: `r${i}`, adapter })));
    await harness.drain();
    for (const { failure } of codes) expect(failure?.code).toBe('INVALID_REQUEST');
    expectClean(harness);
  });
});

describe("an instruction's prior", () => {
  const bank = fakeGeneration(99);
  const [rank, dq, atoms] = [8, 2, 3];
  const numbers = (shape: readonly number[]) => ({
    shape,
    values: Float32Array.from({ length: shape.reduce((a, b) => a * b) }, (_, i) => (i % 7) / 7),
  });
  const keys = numbers([atoms, dq]);
  const labels = numbers([atoms, fakeConfig.width]);
  const open = (key: ResidentKey): Promise<PackedAdapter> => {
    const packed = fakePacked(key, rank);
    const { manifest } = packed;
    const banked = {
      atoms: numbers([atoms, rank, rank]),
      query: numbers([dq, rank]),
      summary: numbers([rank, rank]),
      context: numbers([dq, rank]),
    };
    if (key === bank) {
      const options = { ...noOptions, blockLayers: 1 };
      const floats = new Map(Object.entries(banked)) as PackedAdapter['floats'];
      return Promise.resolve({
        ...packed,
        pages: 0,
        floats,
        manifest: { ...manifest, kind: 'bank', modules: [], options },
      });
    }
    const options = { ...noOptions, needs: bank, topK: 2, labels: ['a', 'b', 'c'] };
    const floats = new Map(Object.entries({ keys, labels })) as PackedAdapter['floats'];
    return Promise.resolve({
      ...packed,
      floats,
      manifest: { ...manifest, kind: 'queryable', options },
    });
  };
  const asked = (generation: Generation, prior: AdapterUse['prior']): AdapterUse => ({
    ...useOf(generation, rank),
    prior,
  });

  it('beside adapters of another bank takes turns with them: none fails, each is as it is alone', async () => {
    const other = fakeGeneration(98);
    const openBoth = async (key: ResidentKey): Promise<PackedAdapter> => {
      if (key !== other && key !== two) return open(key);
      const packed = await open(key === other ? bank : key);
      const { manifest } = packed;
      if (key === two) {
        return {
          ...packed,
          manifest: { ...manifest, options: { ...manifest.options, needs: other } },
        };
      }
      const { shape, values } = packed.floats.get('atoms')!;
      const turned = { shape, values: values.map((value) => -value) };
      return {
        ...packed,
        generation: other,
        floats: new Map([...packed.floats, ['atoms', turned]]),
      };
    };
    const request = (i: number): GenerateRequest =>
      makeRequest({
        ...{ id: `r${i}`, tokens: range(12 + i), tokensMax: 6 },
        adapter: asked(i % 2 === 0 ? one : two, null),
      });
    const harness = new LoopHarness({ open: openBoth });
    const heard = Array.from({ length: 8 }, (_, i) => harness.submit(request(i)));
    await harness.drain();
    for (const [i, told] of heard.entries()) {
      expect(told.failure).toBeNull();
      const alone = new LoopHarness({ open: openBoth });
      const only = alone.submit(request(i));
      await alone.drain();
      expect(idsOf(told)).toEqual(idsOf(only));
    }
    expectClean(harness);
  });

  it('reaches the rows as logits of atoms, made of token embeddings', async () => {
    const { stepper, seen } = watched();
    const harness = new LoopHarness({ stepper, open });
    const priors = [null, { tokens: [5, 9], strength: 0.5 }, { tokens: [5, 9], strength: 0 }];
    for (const [i, prior] of priors.entries()) {
      harness.submit(makeRequest({ id: `r${i}`, tokens: range(30), adapter: asked(one, prior) }));
      await harness.drain();
    }
    const biases = [...new Set(seen)].map(({ atoms }) => [...atoms!.bias]);
    const words = stepper.embeddings(Int32Array.of(5, 9));
    const want = atomLogits(words, labels, 0.5);
    expect(biases[0]).toEqual([0, 0, 0]);
    for (const [k, bias] of biases[1]!.entries()) expect(bias).toBeCloseTo(want[k]!, 6);
    expect(new Set(want).size).toBe(atoms);
    // Who reads the answer is told which atoms made it: the fake's two, equally, in its one block.
    for (const { events } of harness.heard.values()) {
      expect(events.at(-1)).toMatchObject({ kind: 'end', atoms: [[0.5, 0.5, 0]] });
    }
    // Cells are never shared across priors.
    const cached = [...harness.heard.values()].map(({ events: [start] }) =>
      start?.kind === 'start' ? start.cachedTokens : null,
    );
    expect(cached).toEqual([0, 0, 0]);
    expectClean(harness);
  });

  it('of an adapter at rank 0 is of no account', async () => {
    const harness = new LoopHarness({ open });
    const prior = { tokens: [5], strength: 1 };
    const base = makeRequest({ id: 'base' });
    const zero = makeRequest({
      id: 'zero',
      adapter: { ...asked(one, prior), ...useOf(one, 0), prior },
    });
    const heard = [base, zero].map((request) => harness.submit(request));
    await harness.drain();
    expect(idsOf(heard[1]!)).toEqual(idsOf(heard[0]!));
  });
});
