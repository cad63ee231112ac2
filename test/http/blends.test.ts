import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { AdapterKind, AdapterManifest, Generation } from '../../src/adapters/adapter.ts';
import type { EngineEvent } from '../../src/engine/messages.ts';
import { blendOf, useOf } from '../support/adapter-use.ts';
import { fakeGeneration, fakeManifest } from '../support/fake-registry.ts';
import {
  createHarness,
  generationA,
  generationB,
  type Harness,
  type Json,
  parseFrames,
} from '../support/http-harness.ts';
import { echoScript, endEvent, pieceEvent, startEvent } from '../support/scripted-engine.ts';

// Several adapters in one request, over the scripted engine: it answers with the generation, rank and weight of each part
// that it was asked for, so a part that is lost, doubled or at another rank shows in the text.

const path = '/v1/chat/completions';
const messages = [{ role: 'user', content: 'Hi' }];
const tail = `prompt ${'user: Hi\n'.length}`;
const both = [
  { id: 'support', weight: 0.5 },
  { id: 'legal', weight: -2 },
];

let harness: Harness;

function add(name: string, digits: string, change: Partial<AdapterManifest>): Generation {
  const generation = fakeGeneration(digits);
  harness.registry.store(generation, { ...fakeManifest(8), ...change }, 1);
  harness.registry.create(name, generation);
  return generation;
}

function open(systemAdapter: string | null): void {
  harness = createHarness({ systemAdapter });
  harness.registry.create('legal', generationB); // rank 8
}

beforeEach(() => open(null));
afterEach(() => harness.close());

async function ask(body: object): Promise<{ status: number; headers: Headers; body: Json }> {
  const response = await harness.post(path, { model: 'tiny-base', messages, seed: 7, ...body });
  return { status: response.status, headers: response.headers, body: await response.json() };
}

const textOf = (answer: { body: Json }): string => answer.body.choices[0].message.content;

describe('a blend', () => {
  it('reaches the engine part by part, each at its own largest rank', async () => {
    const answer = await ask({ adapters: both });
    expect(textOf(answer)).toBe(`a1a1 at 16 by 0.5 + b2b2 at 8 by -2 seed 7 ${tail}`);
    expect(harness.engine.requests[0]!.adapter).toEqual(
      blendOf([
        [generationA, 16, 0.5],
        [generationB, 8, -2],
      ]),
    );
    expect(answer.body.model).toBe('tiny-base');
  });

  it('says in headers and body what each part was', async () => {
    const { headers, body } = await ask({ adapters: both, latency: { rank: 12 } });
    expect(headers.get('x-adapter-id')).toBe('support,legal');
    expect(headers.get('x-adapter-generation')).toBe(`${generationA},${generationB}`);
    expect(headers.get('x-adapter-rank')).toBe('12/16,8/8');
    expect(headers.get('x-rank-reason')).toBe('fixed');
    expect(body.rankgate).toMatchObject({
      adapter: 'support,legal',
      generation: `${generationA},${generationB}`,
      rank: 12,
      rank_max: 16,
      adapters: [
        { id: 'support', generation: generationA, rank: 12, rank_max: 16, weight: 0.5 },
        { id: 'legal', generation: generationB, rank: 8, rank_max: 8, weight: -2 },
      ],
    });
  });

  it('counts its parts as asked for, but those of a merge, which are not loaded', async () => {
    const asked: unknown[] = [];
    const stop = harness.inFlight.onAdd(({ adapters }) =>
      asked.push(adapters.map(({ id, rank }) => [id, rank])),
    );
    await ask({ adapters: both });
    await ask({ adapters: both, merge: 'ties', density: 0.5 });
    stop();
    await ask({ adapters: both });
    expect(asked).toEqual([
      [
        ['support', 16],
        ['legal', 8],
      ],
      [],
    ]);
  });

  it('says the same at the end of a stream', async () => {
    const response = await harness.post(path, {
      ...{ model: 'tiny-base', messages, seed: 7, stream: true, adapters: both },
    });
    const frames = parseFrames(await response.text());
    expect(frames.at(-1)).toBe('[DONE]');
    expect(frames.at(-2).rankgate.adapters.map((one: Json) => [one.id, one.rank])).toEqual([
      ['support', 16],
      ['legal', 8],
    ]);
    expect(response.headers.get('x-adapter-rank')).toBe('16/16,8/8');
  });

  it('gives the router the ranks and pages of all its parts', async () => {
    await ask({ adapters: both });
    const { adapter } = harness.routed[0]!;
    expect(adapter).toMatchObject({ name: 'support,legal', rankMax: 16 });
    expect(adapter?.ranks).toEqual([2, 4, 6, 8, 10, 12, 14, 16, 17, 18, 19, 20, 21, 22, 23, 24]);
    expect(adapter?.pages).toEqual([...Array(8).fill(2), ...Array(8).fill(3)]);
    expect(adapter?.rankCurve[7]).toBe((0.5 + 1) / 2);
    expect(harness.outcomes[0]).toMatchObject({ adapter: 'support,legal' });
  });

  it('counts the pages of a level by the module that has most ranks at it', async () => {
    const modules = [0, 1].map((block) => ({ ...fakeManifest(16).modules[0]!, block, rank: 16 }));
    // Block 0 has twelve ranks at level 4 already, block 1 has one.
    const levels = [
      [1, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 9, 9, 9, 16],
      [1, 5, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 9, 9, 9, 16],
    ];
    add('levelled', 'c3', { ...fakeManifest(16), modules, levels });
    await ask({ model: 'levelled' });
    expect(harness.routed[0]?.adapter?.pages.slice(0, 5)).toEqual([1, 1, 1, 2, 2]);
    expect(harness.routed[0]?.adapter?.ranks.slice(0, 5)).toEqual([1, 2, 3, 4, 5]);
  });

  it('takes a fixed generation, a tier of the base, n and one weighted adapter', async () => {
    const adapters = [{ id: `support@${generationA}`, weight: 0.25 }];
    const answer = await ask({ model: 'tiny-base:instant', adapters, n: 2 });
    expect(answer.body.choices.map((one: Json) => one.message.content)).toEqual([
      `a1a1 at 4 by 0.25 seed 7 ${tail}`,
      `a1a1 at 4 by 0.25 seed 8 ${tail}`,
    ]);
    expect(answer.body.model).toBe('tiny-base:instant');
  });

  it('keeps the generations that it started with', async () => {
    const adapters = [...both].reverse();
    const encode = harness.text.encode.bind(harness.text);
    harness.text.encode = (text) => {
      harness.registry.swap('legal', generationA, null);
      harness.registry.remove('support', null);
      return encode(text);
    };
    expect(textOf(await ask({ adapters }))).toContain('b2b2 at 8 by -2 + a1a1 at 16 by 0.5');
  });

  it.each([
    ['ties', 0.5],
    ['dare_linear', 0.1],
    ['dare_ties', 1],
  ])('is merged by %s', async (merge, density) => {
    expect((await ask({ adapters: both, merge, density })).status).toBe(200);
    expect(harness.engine.requests[0]!.adapter).toMatchObject({ merge, density });
    expect(harness.routed[0]?.adapter?.ranks.at(-1)).toBe(16); // as large as the largest part
  });
});

describe('a part that is missing is a 404, never an answer without it', () => {
  it.each([
    [[{ id: 'nobody', weight: 1 }], 'adapters[0].id'],
    [[both[0], { id: 'nobody', weight: 1 }], 'adapters[1].id'],
    [[both[0], { id: `support@${fakeGeneration('ee')}`, weight: 1 }], 'adapters[1].id'],
    [[both[0], { id: 'support:nosuchtier', weight: 1 }], 'adapters[1].id'],
    [[both[0], { id: '../legal', weight: 0 }], 'adapters[1].id'],
  ])('%j', async (adapters, param) => {
    const { status, body } = await ask({ adapters });
    expect([status, body.error.code, body.error.param]).toEqual([404, 'model_not_found', param]);
    expect(harness.engine.requests).toEqual([]);
  });

  it('also when the model itself is unknown', async () => {
    const { status, body } = await ask({ model: 'nobody', adapters: both });
    expect([status, body.error.param]).toEqual([404, 'model']);
  });
});

describe('what does not go together is a 400 that names it', () => {
  const one = { id: 'support', weight: 1 };
  const kinds: ReadonlyArray<[AdapterKind, string]> = [
    ['fly', 'f1'],
    ['queryable', 'f2'],
    ['mora', 'f3'],
    ['svfit', 'f4'],
  ];
  it.each<[object, string]>([
    [{ model: 'support', adapters: [{ id: 'legal', weight: 1 }] }, 'adapters'],
    [{ adapters: [] }, 'adapters'],
    [{ adapters: Array(9).fill(one) }, 'adapters'],
    [{ adapters: { id: 'support', weight: 1 } }, 'adapters'],
    [{ adapters: [one, one] }, 'adapters[1].id'],
    [{ adapters: [one, { id: `support@${generationA}`, weight: 1 }] }, 'adapters[1].id'],
    [{ adapters: [{ id: 'tiny-base', weight: 1 }] }, 'adapters[0].id'],
    [{ adapters: [{ id: 'support:instant', weight: 1 }] }, 'adapters[0].id'],
    [{ adapters: [{ id: 'support' }] }, 'adapters[0].weight'],
    [{ adapters: [{ id: 'support', weight: '1' }] }, 'adapters[0].weight'],
    [{ adapters: [{ id: 'support', weight: 16.1 }] }, 'adapters[0].weight'],
    [{ adapters: [{ id: 'support', weight: -17 }] }, 'adapters[0].weight'],
    [{ adapters: [{ id: 'support', weight: null }] }, 'adapters[0].weight'],
    [{ adapters: [{ id: '', weight: 1 }] }, 'adapters[0].id'],
    [{ adapters: [{ ...one, rank: 3 }] }, 'adapters[0].rank'],
    [{ merge: 'linear' }, 'merge'],
    [{ adapters: both, merge: 'average' }, 'merge'],
    [{ adapters: both, merge: 'ties' }, 'density'],
    [{ adapters: both, density: 0.5 }, 'density'],
    [{ adapters: both, merge: 'linear', density: 0.5 }, 'density'],
    [{ adapters: both, merge: 'ties', density: 0 }, 'density'],
    [{ adapters: both, merge: 'ties', density: 1.01 }, 'density'],
    [{ adapters: [one, { id: 'fly', weight: 1 }], merge: 'ties', density: 0.5 }, 'merge'],
    [{ adapters: [one, { id: 'queryable', weight: 1 }], merge: 'dare_ties', density: 1 }, 'merge'],
    [{ adapters: [{ id: 'mora', weight: 1 }], merge: 'dare_linear', density: 1 }, 'merge'],
    [{ adapters: [{ id: 'svfit', weight: 1 }], merge: 'ties', density: 1 }, 'merge'],
    [{ model: 'support', fly_top_k: 4 }, 'fly_top_k'],
    [{ fly_top_k: 4 }, 'fly_top_k'],
    [{ model: 'fly', fly_top_k: 0 }, 'fly_top_k'],
    [{ model: 'fly', fly_top_k: 257 }, 'fly_top_k'],
    [{ model: 'fly', fly_top_k: 1.5 }, 'fly_top_k'],
    [{ model: 'support', instruction_prior: 'legal' }, 'instruction_prior'],
    [{ instruction_prior: 'legal' }, 'instruction_prior'],
    [{ model: 'queryable', instruction_prior: '' }, 'instruction_prior'],
    [{ model: 'queryable', instruction_prior: 'x'.repeat(2001) }, 'instruction_prior'],
    [{ model: 'queryable', prior_strength: 1 }, 'prior_strength'],
    [{ model: 'queryable', instruction_prior: 'a', prior_strength: -1 }, 'prior_strength'],
    [{ model: 'queryable', instruction_prior: 'a', prior_strength: 101 }, 'prior_strength'],
  ])('row %#', async (body, param) => {
    for (const [kind, digits] of kinds) add(kind, digits, { kind });
    const answer = await ask(body);
    expect([answer.status, answer.body.error.param]).toEqual([400, param]);
    expect(harness.engine.requests).toEqual([]);
  });
});

describe('options of a family', () => {
  it('reach the engine where a part is of that kind', async () => {
    const fly = add('fly', 'f1', { kind: 'fly' });
    const queryable = add('asks', 'f2', { kind: 'queryable' });
    await ask({ model: 'fly', fly_top_k: 4 });
    expect(harness.engine.requests[0]!.adapter).toEqual({ ...useOf(fly, 8), flyTopK: 4 });
    await ask({ model: 'asks', instruction_prior: 'ab' });
    const tokens = Array.from(await harness.text.encode('ab'));
    expect(harness.engine.requests[1]!.adapter).toEqual({
      ...useOf(queryable, 8),
      prior: { tokens, strength: 0.5 },
    });
    await ask({ model: 'asks', instruction_prior: 'ab', prior_strength: 0 });
    expect(harness.engine.requests[2]!.adapter?.prior).toEqual({ tokens, strength: 0 });
    await ask({ adapters: [{ id: 'fly', weight: 1 }, both[0]], fly_top_k: 256 });
    expect(harness.engine.requests[3]!.adapter?.flyTopK).toBe(256);
  });
});

it('tells which atoms an answer was made with, choice by choice', async () => {
  add('asks', 'f2', { kind: 'queryable' });
  harness.engine.script = async function* script({ sampling }) {
    yield startEvent();
    yield pieceEvent('a');
    yield {
      ...endEvent(1),
      kind: 'end',
      atoms: [[1, 0], sampling.seed === 7 ? [0.25, 0.75] : [0, 1]],
    } as EngineEvent;
  };
  const { body } = await ask({ model: 'asks', n: 2 });
  expect(body.rankgate.atoms).toEqual([
    [
      [1, 0],
      [0.25, 0.75],
    ],
    [
      [1, 0],
      [0, 1],
    ],
  ]);
  harness.engine.script = echoScript;
  expect((await ask({ model: 'support' })).body.rankgate).not.toHaveProperty('atoms');
});

it('a queryable adapter is used with all its ranks or not at all, and fly computes all to choose some', async () => {
  const asks = add('asks', 'f2', { kind: 'queryable' });
  const fly = add('fly', 'f1', { kind: 'fly' });
  const { headers } = await ask({ model: 'asks', latency: { rank: 3 } });
  expect(headers.get('x-adapter-rank')).toBe('8/8');
  await ask({ model: 'asks', latency: { rank: 0 } });
  await ask({ model: 'fly', latency: { rank: 3 } });
  expect(harness.engine.requests.map(({ adapter }) => adapter)).toEqual([
    useOf(asks, 8),
    useOf(asks, 0),
    useOf(fly, 3),
  ]);
  expect(harness.routed.map(({ adapter }) => adapter?.ranks)).toEqual([
    Array(8).fill(8),
    Array(8).fill(8),
    Array(8).fill(8),
  ]);
});

describe('a system adapter', () => {
  let repair: Generation;
  beforeEach(() => {
    harness.close();
    open('repair');
    repair = add('repair', 'e0', { kind: 'eora' });
  });

  it('lies under every request, the base model included', async () => {
    expect(textOf(await ask({}))).toBe(`e0e0 at 8 seed 7 ${tail}`);
    const one = await ask({ model: 'support' });
    expect(textOf(one)).toBe(`a1a1 at 16 + e0e0 at 8 seed 7 ${tail}`);
    expect(one.headers.get('x-adapter-id')).toBe('support,repair');
    expect(one.headers.get('x-adapter-rank')).toBe('16/16,8/8');
    const system = { generation: repair, rank: 8, weight: 1 };
    expect(harness.engine.requests.map((request) => request.adapter?.system)).toEqual([
      system,
      system,
    ]);
    await ask({ adapters: both, merge: 'ties', density: 0.5 });
    expect(harness.engine.requests[2]!.adapter).toMatchObject({ merge: 'ties', system });
  });

  it('is known to the router, which may leave it out', async () => {
    const answer = await ask({ model: 'support', latency: { total_ms: 200 } });
    expect(harness.routed[0]?.system).toEqual({ ranks: 8, pages: 1 });
    expect(textOf(answer)).toBe(`a1a1 at 4 seed 7 ${tail}`);
    expect(answer.headers.get('x-adapter-id')).toBe('support');
    expect(answer.body.rankgate.adapters).toHaveLength(1);
  });

  it('is not doubled where it is asked for by name', async () => {
    expect(textOf(await ask({ model: 'repair' }))).toBe(`e0e0 at 8 seed 7 ${tail}`);
    const adapters = [{ id: 'repair', weight: 0.5 }];
    expect(textOf(await ask({ adapters }))).toBe(`e0e0 at 8 by 0.5 seed 7 ${tail}`);
  });

  it('is waited for: without it there is no answer, and no lease is left', async () => {
    harness.registry.remove('repair', null);
    const gone = await ask({ model: 'support' });
    expect([gone.status, gone.headers.get('retry-after')]).toEqual([503, '1']);
    harness.registry.create('repair', generationB); // a lora
    expect((await ask({})).status).toBe(503);
    expect(harness.engine.requests).toEqual([]);
  });
});
