// What a run begins with: the base's modules as families see them, and their numbers, from the recipe's initialisation or an adapter.

import { type BlockMoments, inputMoments } from '../adapters/calibration.ts';
import type { Site, Tensors } from '../adapters/families/family.ts';
import { zeros } from '../adapters/families/matrices.ts';
import type { Columns } from '../adapters/orthogonal.ts';
import type { FloatName, PackedAdapter } from '../adapters/pack.ts';
import type { Recipe } from '../jobs/recipe.ts';
import { moduleIndex, type Projection, projectionShape } from '../model/decoder-config.ts';
import { tensorName } from '../model/trained-delta.ts';
import { readWeight } from '../model/training-decoder.ts';
import { type QueryableStart, queryableChoice, queryableStart } from './atom-bank.ts';
import type { Bases } from './continual.ts';
import { freedRanks } from './coso.ts';
import { evaModules } from './eva.ts';
import type { Example } from './examples.ts';
import type { TrainedModule } from './family-graph.ts';
import { graphOf } from './family-training.ts';
import { layOut, packWindows } from './packing.ts';
import { continuedFrom, initialTensors, randomOf, servedFactors } from './publish.ts';
import type { QueryableTraining } from './queryable-graph.ts';
import type { TrainingBase } from './session.ts';

export interface Start {
  readonly base: TrainingBase;
  readonly recipe: Recipe;
  readonly training: readonly Example[];
  readonly start: PackedAdapter | null;
  readonly modules?: ReadonlySet<number> | null;
  /** Of what `start` must keep, where the recipe has coso. */
  readonly bases?: Bases;
  /** The bank that `start` is over, of a queryable adapter. */
  readonly bank?: PackedAdapter | null;
}

export function startModules(from: Start): TrainedModule[] {
  const { base, recipe, training, start, modules = null, bases = new Map() } = from;
  if (recipe.kind === 'queryable') return startOverBank(from);
  if (recipe.init.kind === 'eva') return evaStart({ base, recipe, training }, recipe.init);
  return Array.from({ length: base.config.blocks }, (_, block) =>
    recipe.targets
      .filter((projection) => modules?.has(moduleIndex(block, projection)) ?? true)
      .map((projection) => {
        const site = siteOf(base, block, projection);
        const module = { site, tensors: initialTensors(recipe, site) };
        if (start === null) return module;
        const { tensors } = continuedFrom(recipe, module, start);
        const basis = bases.get(tensorName(site, 'a'));
        if (basis === undefined) return { site, tensors };
        return { site, tensors: { ...tensors, a: freedRanks(tensors.a!, tensors.b!, basis) } };
      }),
  ).flat();
}

/** What modules share is the same object in each. */
function startOverBank({ base, recipe, ...from }: Start): TrainedModule[] {
  const start = queryableStart(from);
  const choice = queryableChoice(recipe, start);
  const { family } = graphOf(choice);
  const modules = Array.from({ length: base.config.blocks }, (_, block) =>
    recipe.targets.map((projection) => {
      const site = siteOf(base, block, projection);
      return { site, tensors: family.init(site, randomOf(recipe, site)) };
    }),
  ).flat();
  const { a: _, b: __, ...drawn } = modules[0]!.tensors;
  const shared = start === null ? drawn : overKnown(drawn, start);
  return modules.map(({ site, tensors: { a, b } }) => {
    const own = start === null ? { a: a!, b: b! } : factorsOf(choice, site, start.adapter);
    return { site, tensors: { ...own, ...shared } };
  });
}

/** The first atoms and keys are those that are there: nothing is left of what was drawn for them. */
function overKnown(drawn: Tensors, { adapter, bank }: QueryableStart): Tensors {
  const known = new Map([...adapter.floats, ...bank.floats]);
  return Object.fromEntries(
    Object.entries(drawn).map(([name, start]): [string, Columns] => {
      const data = start.data.slice();
      data.set(known.get(name as FloatName)!.values);
      return [name, { ...start, data }];
    }),
  );
}

/** α/r is in a packed B. */
function factorsOf({ rank, alpha }: QueryableTraining, site: Site, packed: PackedAdapter) {
  const { a, b } = servedFactors(packed, site, { level: rank, ranks: rank });
  const unscaled = Float64Array.from(b, (value) => (value * rank) / alpha);
  return {
    a: { rows: site.in, columns: rank, data: Float64Array.from(a) },
    b: { rows: site.out, columns: rank, data: unscaled },
  };
}

function siteOf(
  { config, weights, kernels }: TrainingBase,
  block: number,
  projection: Projection,
): Site {
  const shape = projectionShape(config, projection);
  const weight = (): Columns => ({
    rows: shape.in,
    columns: shape.out,
    data: Float64Array.from(readWeight(kernels, weights.blocks[block]![projection])),
  });
  return { block, projection, ...shape, weight };
}

type From = Pick<Start, 'base' | 'recipe' | 'training'>;

/** Of the rows that learn, in as many windows as have so many tokens. */
function momentsOf({ base, recipe, training }: From, count: number): Iterable<BlockMoments> {
  const { config, weights, kernels } = base;
  const { windowTokens: windowRows } = recipe;
  const most = Math.max(1, Math.floor(count / windowRows));
  const windows = packWindows(training, windowRows, null).slice(0, most);
  const sizes = { windows: windows.length, windowRows, weight: 1 };
  const { tokens, sequences, answers } = layOut(training, windows, sizes);
  const learnt = new Uint8Array(tokens.length);
  for (const { row } of answers) learnt[row] = 1;
  return inputMoments({ config, weights, kernels, tokens, windowRows, learnt, sequences });
}

/** Modules without a rank are not there. */
function evaStart(
  from: From,
  { rho, tokens }: Recipe['init'] & { readonly kind: 'eva' },
): TrainedModule[] {
  const { base, recipe } = from;
  const { rank, targets } = recipe;
  return evaModules(momentsOf(from, tokens), { rank, rho, targets })
    .filter(({ a }) => a.columns > 0)
    .map(({ block, projection, a }) => {
      const site = siteOf(base, block, projection);
      return { site, tensors: { a, b: zeros(a.columns, site.out) } };
    });
}
