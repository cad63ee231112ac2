import { afterAll, describe, expect, it } from 'vitest';
import type { PackedAdapter } from '../../../src/adapters/pack.ts';
import {
  type RunRecipe,
  type SessionOptions,
  TrainingSession,
} from '../../../src/trainer/session.ts';
import { type Imported, importFiles } from '../../support/served-adapter.ts';
import {
  openTinyBase,
  resume,
  takeSteps,
  tinyExamples,
  tinyRecipe,
} from '../../support/training-base.ts';

// Queryable adapters through the whole of training: with a bank of their own, over another's, and with more atoms for it.

const base = await openTinyBase();
afterAll(() => base.kernels[Symbol.dispose]());
const training = tinyExamples(16, 48);
const breathe = async (): Promise<void> => {};
const bank = { atoms: 4, queryWidth: 6, blockLayers: 1 };

function recipeOf(more: Readonly<Record<string, unknown>> = {}, stepsMax = 40): RunRecipe {
  return tinyRecipe({
    ...{ kind: 'queryable', rank: 8, stepsMax, bank, accumulation: 16 },
    ...{ learningRate: 1e-2, schedule: 'constant', ...more },
  });
}

function open(recipe: RunRecipe, more: Partial<SessionOptions> = {}): TrainingSession {
  return new TrainingSession({ base, recipe, training, heldOut: training, start: null, ...more });
}

async function trained(
  recipe: RunRecipe,
  from: Imported | null = null,
): Promise<Imported & { readonly losses: readonly number[]; readonly bank: PackedAdapter }> {
  using session = open(recipe, from === null ? {} : { start: from.adapter, bank: from.bank });
  const losses = await takeSteps(session, recipe.stepsMax!);
  const { adapter, bank: made } = await importFiles(session.files(), base);
  return { adapter, bank: made!, losses };
}

const first = await trained(recipeOf());

const numbers = ({ floats }: PackedAdapter, name: 'keys' | 'atoms'): Float32Array =>
  floats.get(name)!.values;
const halves = ({ manifest, page }: PackedAdapter): Uint16Array[] =>
  manifest.modules.flatMap((module) => [page(module, 0)!.a.slice(), page(module, 0)!.b.slice()]);

describe('a training session of queryable', () => {
  it('begins as nothing, learns, and is measured at all of its ranks', async () => {
    using session = open(recipeOf());
    const before = await session.baseLoss(breathe);
    const losses = await takeSteps(session, 40);
    expect(losses[0]).toBeCloseTo(before!, 4);
    expect(losses.at(-1)).toBeLessThan(before! - 0.15);
    const [only, ...more] = await session.evaluate(session.files(), breathe);
    expect([only!.rank, more]).toEqual([8, []]);
    expect(only!.loss).toBeLessThan(losses.at(-1)! + 0.03);
  });

  it('moves everything that it has', () => {
    using session = open(recipeOf());
    const names = session.parameters.map(({ name }) => name);
    const shared = ['keys', 'atoms', 'query', 'summary', 'context'];
    expect(names.filter((name) => !name.startsWith('blk.'))).toEqual(shared);
    expect(names.length).toBe(2 * 14 + shared.length);
    expect(numbers(first.adapter, 'keys')).not.toEqual(
      session.parameters.find(({ name }) => name === 'keys')!.values,
    );
    expect(numbers(first.bank, 'atoms')).not.toEqual(
      session.parameters.find(({ name }) => name === 'atoms')!.values,
    );
  });

  it('goes on from a checkpoint with the bytes it would have had, also out of the dense steps', async () => {
    const recipe = recipeOf(
      { bank: { ...bank, denseShare: 0.5 }, optimizer: { name: 'adamw' } },
      12,
    );
    using run = await resume(() => open(recipe), { cut: 5, lost: 3, steps: 12 });
    expect(run.second.files()).toEqual(run.straight.files());
  });

  it('mixes all atoms at first, and then as many as are served', async () => {
    const [dense, sparse] = [1, 0].map((denseShare) =>
      recipeOf({ bank: { ...bank, denseShare, balance: 0 }, topK: 1 }, 3),
    );
    const loss = async (recipe: RunRecipe): Promise<number> => {
      using session = open(recipe, { heldOut: [] });
      return (await takeSteps(session, 3)).at(-1)!;
    };
    const whole = recipeOf({ bank: { ...bank, balance: 0 }, topK: 4 }, 3);
    expect(await loss(dense!)).toBe(await loss(whole));
    expect(await loss(sparse!)).not.toBe(await loss(whole));
  });

  it('over a bank that is there trains A, B and keys, and no number of the bank', async () => {
    const rest = { bank: { labels: ['law', 'code', 'song', 'talk'] } };
    const tenant = await trained(recipeOf(rest, 10), first);
    expect(tenant.bank.generation).toBe(first.bank.generation);
    expect(tenant.adapter.manifest.options.needs).toBe(first.bank.generation);
    expect(tenant.adapter.manifest.options.labels).toEqual(rest.bank.labels);
    expect(numbers(tenant.adapter, 'keys')).not.toEqual(numbers(first.adapter, 'keys'));
    expect(halves(tenant.adapter)).not.toEqual(halves(first.adapter));
    // It went on from where the other was.
    expect(tenant.losses[0]).toBeLessThan(first.losses.at(-1)! + 0.05);
  });

  it('with more atoms trains these and their keys: every old byte stays', async () => {
    const grown = await trained(
      tinyRecipe({
        ...{ kind: 'queryable', rank: 8, stepsMax: 12, bank: { atoms: 6 }, learningRate: 3e-2 },
        ...{ weightDecay: 0.1, schedule: 'constant' },
      }),
      first,
    );
    expect(halves(grown.adapter)).toEqual(halves(first.adapter));
    const [keys, atoms] = [numbers(grown.adapter, 'keys'), numbers(grown.bank, 'atoms')];
    expect(keys.subarray(0, 4 * 6)).toEqual(numbers(first.adapter, 'keys'));
    expect(atoms.subarray(0, 4 * 64)).toEqual(numbers(first.bank, 'atoms'));
    for (const name of ['query', 'summary', 'context'] as const) {
      expect(grown.bank.floats.get(name)).toEqual(first.bank.floats.get(name));
    }
    const labels = grown.adapter.floats.get('labels')!.values;
    const old = first.adapter.floats.get('labels')!.values;
    expect(labels.subarray(0, old.length)).toEqual(old);
    expect(grown.adapter.manifest.options.labels!.slice(4)).toEqual(['atom 5', 'atom 6']);
    // The new ones have moved from what was drawn for them.
    using untrained = open(recipeOf({ bank: { atoms: 6 } }, 1), {
      ...{ start: first.adapter, bank: first.bank },
    });
    const drawn = untrained.parameters;
    expect(drawn.map(({ name }) => name)).toEqual(['keys', 'atoms']);
    expect(keys.subarray(24)).not.toEqual(drawn[0]!.values.subarray(24));
    expect(atoms.subarray(256)).not.toEqual(drawn[1]!.values.subarray(256));
  });

  it.each([
    [{ rank: 16 }, "rank: 16, the adapter's is 8"],
    [{ rank: 4 }, 'it has 8 ranks, the recipe 4'],
    [{ bank: { atoms: 3 } }, 'bank.atoms: 3, the bank has 4'],
    [{ bank: { queryWidth: 7 } }, "bank.queryWidth: 7, the bank's is 6"],
    [{ bank: { blockLayers: 2 } }, "bank.blockLayers: 2, the bank's is 1"],
    [{ bank: { labels: ['one'] } }, 'bank.labels: 1 labels of 4 atoms'],
    [{ targets: ['attn_q'] }, 'which targets leaves out'],
    [{ kind: 'lora', bank: null }, 'a queryable is no low-rank pair'],
  ])('refuses what the adapter or its bank cannot be: %j', (more, message) => {
    const recipe = recipeOf({ bank: {}, ...more });
    const from = { start: first.adapter, bank: first.bank };
    expect(() => open(recipe, from)).toThrow(message);
  });

  it('refuses a plain pair to begin with', async () => {
    using plain = open(tinyRecipe({ kind: 'lora', rank: 8, stepsMax: 1 }));
    const { adapter } = await importFiles(plain.files(), base);
    expect(() => open(recipeOf(), { start: adapter })).toThrow('a lora has no atoms');
  });

  it('refuses more groups of blocks than are served, before anything is computed', () => {
    const deep = { ...base, config: { ...base.config, blocks: 36 } };
    expect(() => open(recipeOf({ bank: { blockLayers: 5 } }), { base: deep })).toThrow(
      'bank.blockLayers: 5 makes 8 blocks of layers, at most 7 are served',
    );
  });
});
