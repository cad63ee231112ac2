// How each family is computed in training: the graph of one module over the family's own numbers, which family.ts defines in f64
// and test/unit/trainer/family-graph.test.ts compares. A file's [count, length] is the tensor; one number a rank is [1, count].

import type { Family, Site, Tensors } from '../adapters/families/family.ts';
import { type FlexmoreOptions, flexmore } from '../adapters/families/flexmore.ts';
import { type FlyOptions, fly } from '../adapters/families/fly.ts';
import { type HydraOptions, hydra } from '../adapters/families/hydra.ts';
import { type LoraOptions, lora } from '../adapters/families/lora.ts';
import { columnsOf, zeros } from '../adapters/families/matrices.ts';
import { type MatryoshkaOptions, matryoshka } from '../adapters/families/matryoshka.ts';
import { type MoraOptions, mora } from '../adapters/families/mora.ts';
import { type SaltOptions, salt } from '../adapters/families/salt.ts';
import { singularBasis } from '../adapters/families/singular-basis.ts';
import { type SvfitOptions, svfit } from '../adapters/families/svfit.ts';
import { type TriangularOptions, triangular } from '../adapters/families/triangular.ts';
import type { Columns } from '../adapters/orthogonal.ts';
import type { ForwardOps, Tensor } from '../kernels/kernels.ts';
import {
  deltaOf,
  everyRow,
  lowRank,
  type ModuleDelta,
  type Shapes,
  type TrainedDelta,
  tensorName,
} from '../model/trained-delta.ts';
import { gatedLora } from './codyra.ts';

/** Queryable adapters are not of single modules: queryable-graph.ts. */
export type FamilyChoice =
  | (LoraOptions & { readonly kind: 'lora' | 'gated-lora' })
  | (MatryoshkaOptions & { readonly kind: 'matryoshka' })
  | (HydraOptions & { readonly kind: 'hydra' })
  | (TriangularOptions & { readonly kind: 'triangular' })
  | (SvfitOptions & { readonly kind: 'svfit' })
  | (SaltOptions & { readonly kind: 'salt' })
  | (FlexmoreOptions & { readonly kind: 'flexmore' })
  | (FlyOptions & { readonly kind: 'fly' })
  | (MoraOptions & { readonly kind: 'mora' });

export interface Numbers {
  readonly shape: readonly number[];
  readonly values: Float32Array;
}
export type NamedNumbers = Readonly<Record<string, Numbers>>;

export interface TrainedModule {
  readonly site: Site;
  readonly tensors: Tensors;
}

export interface FamilyGraph {
  readonly family: Family;
  /** Of modules that have these numbers. */
  readonly over: (modules: readonly TrainedModule[]) => TrainingGraph;
}

export interface TrainingGraph {
  readonly delta: TrainedDelta;
  /** What its tensors begin with, trained and constant. */
  readonly numbers: NamedNumbers;
  /** The same over the same tensors with so many of a token's choice; null where tokens choose nothing. */
  readonly active: ((topK: number) => TrainedDelta) | null;
}

export function familyGraph(choice: FamilyChoice): FamilyGraph {
  const { family, module, active } = moduleGraph(choice);
  return {
    family,
    over(modules) {
      // Not the sites: what a family remembers of one goes with the caller's.
      const made = modules.map(({ site, tensors }) => {
        const { block, projection } = site;
        return { at: { block, projection }, ...module(site, tensors) };
      });
      const numbers = made.flatMap(({ at, numbers: own }) =>
        Object.entries(own).map(([name, of]) => [tensorName(at, name), of] as const),
      );
      const withAdd = (topK: number | null): TrainedDelta => {
        const add = topK === null ? null : active!(topK);
        return deltaOf(
          made.map(({ at, delta }) => [at, add === null ? delta : { ...delta, add }] as const),
        );
      };
      return {
        delta: withAdd(null),
        numbers: Object.fromEntries(numbers),
        active: active === null ? null : withAdd,
      };
    },
  };
}

/** Of a family whose modules have numbers of their own each. */
interface ModuleGraph {
  readonly family: Family;
  readonly module: (
    site: Site,
    tensors: Tensors,
  ) => { readonly delta: ModuleDelta; readonly numbers: NamedNumbers };
  /** With so many ranks of a token's choice. */
  readonly active: ((topK: number) => ModuleDelta['add']) | null;
}

function moduleGraph(choice: FamilyChoice): ModuleGraph {
  switch (choice.kind) {
    case 'lora':
      return pairGraph(lora(choice));
    case 'gated-lora':
      return gatedGraph(gatedLora(choice));
    case 'matryoshka':
      return pairGraph(matryoshka(choice));
    case 'hydra':
      return hydraGraph(choice);
    case 'triangular':
      return triangularGraph(choice);
    case 'svfit':
      return svfitGraph(choice);
    case 'salt':
      return saltGraph(choice);
    case 'flexmore':
      return flexmoreGraph(choice);
    case 'fly':
      return flyGraph(choice);
    case 'mora':
      return moraGraph(choice);
  }
}

export function numbersOf({ rows, columns, data }: Columns): Numbers {
  const shape = rows === 1 ? [1, columns] : [columns, rows];
  return { shape, values: Float32Array.from(data) };
}

function named(tensors: Tensors, names: readonly string[]): NamedNumbers {
  return Object.fromEntries(names.map((name) => [name, numbersOf(tensors[name]!)]));
}

export function shapesOf(numbers: NamedNumbers): Shapes {
  return Object.fromEntries(Object.entries(numbers).map(([name, { shape }]) => [name, shape]));
}

type Constants = (site: Site, tensors: Tensors) => NamedNumbers;

function graphOf(
  family: Family,
  add: ModuleDelta['add'],
  constantsOf: Constants = () => ({}),
): ModuleGraph {
  return {
    family,
    active: null,
    module(site, tensors) {
      const trained = named(tensors, family.trained);
      const constants = constantsOf(site, tensors);
      const shapes = { trained: shapesOf(trained), constants: shapesOf(constants) };
      return { delta: { ...shapes, gateRank: 0, add }, numbers: { ...trained, ...constants } };
    },
  };
}

/** Ranks' scales are the batch's gate: an objective trains prefixes by it. */
function pairGraph(family: Family): ModuleGraph {
  return {
    family,
    active: null,
    module: (site, tensors) => ({
      delta: lowRank({ in: site.in, out: site.out, rank: tensors.a!.columns }),
      numbers: named(tensors, family.trained),
    }),
  };
}

/** The same, each rank's scale times its own gate. */
function gatedGraph(family: Family): ModuleGraph {
  return {
    ...pairGraph(family),
    module(site, tensors) {
      const { delta, numbers } = pairGraph(family).module(site, tensors);
      const add: ModuleDelta['add'] = (ops, at, input) => {
        const own = everyRow(ops, at.g!, input.x.shape[0]!); // [T, R]
        return delta.add(ops, at, { ...input, gate: (ranks) => ops.mul(input.gate(ranks), own) });
      };
      const trained = shapesOf(numbers);
      return { delta: { ...delta, trained, add }, numbers };
    },
  };
}

function times(ops: ForwardOps, x: Tensor, factor: number): Tensor {
  return ops.mul(x, ops.training.fill(x.shape, factor));
}

function sizesOf(ops: ForwardOps, x: Tensor): Tensor {
  return ops.mul(x, ops.training.sign(x)); // |x|
}

/** y + B·h for h [T,R] and B stored as [R,out]. */
function expanded(ops: ForwardOps, y: Tensor, h: Tensor, b: Tensor): Tensor {
  return ops.add(y, ops.training.linearT(h, b));
}

function hydraGraph(options: HydraOptions): ModuleGraph {
  const scale = options.alpha / options.rank;
  return graphOf(hydra(options), (ops, at, { x, y }) => {
    const parallel = times(ops, ops.linear(x, at['parallel.a']!), scale); // [T, r]
    const sequential = times(ops, ops.linear(y, at['sequential.a']!), scale);
    const beside = expanded(ops, y, parallel, at['parallel.b']!);
    return expanded(ops, beside, sequential, at['sequential.b']!);
  });
}

function triangularGraph(options: TriangularOptions): ModuleGraph {
  const scale = options.alpha / (options.rank + 1e-5);
  return graphOf(triangular(options), (ops, { a, b, c }, { x, y }) => {
    const h = ops.linear(ops.linear(x, a!), c!); // C·A·x, [T, R]
    return expanded(ops, y, times(ops, h, scale), b!);
  });
}

function svfitGraph(options: SvfitOptions): ModuleGraph {
  const family = svfit(options);
  const basis: Constants = (site, tensors) => {
    const { a, b } = family.pair(site, tensors, null);
    return { a: numbersOf(a), b: numbersOf(b) };
  };
  const add: ModuleDelta['add'] = (ops, { a, b, deltas }, { x, y }) => {
    const h = ops.mul(ops.linear(x, a!), everyRow(ops, deltas!, x.shape[0]!)); // [T, r]
    return expanded(ops, y, h, b!);
  };
  return graphOf(family, add, basis);
}

/** The whole basis of each module is kept, as large as its weight and the smaller side's square. */
function saltGraph(options: SaltOptions): ModuleGraph {
  const basis: Constants = (site, { alpha, x }) => {
    const { u, v, sigma } = singularBasis(site);
    const [kept, tail] = [alpha!.columns, x!.rows];
    const first = sigma.length - tail;
    return {
      u: numbersOf(columnsOf(u, 0, kept)),
      v: numbersOf(columnsOf(v, 0, kept)),
      sigma: { shape: [1, kept], values: Float32Array.from(sigma.subarray(0, kept)) },
      tailU: numbersOf(columnsOf(u, first, tail)),
      tailV: numbersOf(columnsOf(v, first, tail)),
    };
  };
  const add: ModuleDelta['add'] = (ops, at, input) => {
    const raw = ops.add(ops.mul(at.alpha!, at.sigma!), at.beta!); // [1, k]
    const clipped = times(ops, ops.add(raw, sizesOf(ops, raw)), 0.5); // relu
    const gates = ops.add(clipped, times(ops, at.sigma!, -1));
    const h = ops.mul(ops.linear(input.x, at.v!), everyRow(ops, gates, input.x.shape[0]!)); // [T, k]
    const first = expanded(ops, input.y, h, at.u!);
    const tailA = ops.training.linearT(at.y!, at.tailV!); // [tail, in]
    const tailB = ops.training.linearT(at.x!, at.tailU!); // [tail, out]
    return expanded(ops, first, ops.linear(input.x, tailA), tailB);
  };
  return graphOf(salt(options), add, basis);
}

function flexmoreGraph(options: FlexmoreOptions): ModuleGraph {
  const members: Constants = (_site, { expert, weights }) => {
    const of = zeros(weights!.columns, expert!.columns); // [E, R]
    expert!.data.forEach((e, r) => {
      of.data[e * of.rows + r] = 1;
    });
    return { members: { shape: [of.columns, of.rows], values: Float32Array.from(of.data) } };
  };
  const add: ModuleDelta['add'] = (ops, at, { x, y }) => {
    const gates = ops.training.linearT(at.weights!, at.members!); // [1, R]
    const h = ops.mul(ops.linear(x, at.a!), everyRow(ops, gates, x.shape[0]!));
    return expanded(ops, y, h, at.b!);
  };
  return graphOf(flexmore(options), add, members);
}

/** d is a constant of the graph: family-training.ts moves it by how often ranks were `kept`. */
function flyGraph(options: FlyOptions): ModuleGraph {
  const family = fly(options);
  const scale = options.alpha / options.rank;
  const constants: Constants = (site, tensors) => ({
    a: numbersOf(family.pair(site, tensors, null).a),
    d: numbersOf(tensors.d!),
  });
  const active =
    (topK: number): ModuleDelta['add'] =>
    (ops, { a, b, d }, { x, y, observe }) => {
      const h = ops.linear(x, a!); // [T, R]
      const scores = ops.add(sizesOf(ops, h), everyRow(ops, d!, x.shape[0]!));
      const kept = ops.training.softmaxTop(scores, topK, 0); // 1/k where a rank stays
      observe('kept', kept);
      return expanded(ops, y, times(ops, ops.mul(h, kept), scale * topK), b!);
    };
  return { ...graphOf(family, active(options.topK), constants), active };
}

/** Added to the mean of squares of what is scaled to a length: an input of zeros scores 0 everywhere. */
const nothing = 1e-30;

function moraGraph(options: MoraOptions): ModuleGraph {
  const { temperature } = options;
  const ones: Constants = (site) => ({
    ones: { shape: [site.in], values: new Float32Array(site.in).fill(1) },
  });
  const active =
    (topK: number): ModuleDelta['add'] =>
    (ops, { a, b, ones: unit }, { x, y, observe }) => {
      const width = x.shape[1]!;
      const h = ops.linear(x, a!); // [T, R]
      // Both of length √in, so their products are in·cos.
      const directions = ops.rmsNorm(a!, unit!, nothing);
      const cosines = ops.linear(ops.rmsNorm(x, unit!, nothing), directions); // [T, R]
      const scale = 1 / (width * temperature);
      const shares = ops.training.softmaxTop(sizesOf(ops, cosines), topK, scale);
      observe('shares', shares);
      return expanded(ops, y, ops.mul(h, shares), b!);
    };
  return { ...graphOf(mora(options), active(options.topK), ones), active };
}
