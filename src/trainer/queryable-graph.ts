// Queryable LoRA in training (algorithms.md section 6, adapters/families/queryable.ts): bank and keys are shared by all modules,
// and a group of blocks routes once, by the low-rank state of its first q projection, with all earlier groups' summaries.
// Everything is differentiated, through the softmax of the atoms that are chosen and the summaries; the choice itself is not,
// nor how often an atom is chosen in what evens that out. An instruction's prior is the same for all rows.

import { type QueryableOptions, queryable } from '../adapters/families/queryable.ts';
import { GatewayError } from '../errors.ts';
import type { ForwardOps, Tensor } from '../kernels/kernels.ts';
import { moduleIndex } from '../model/decoder-config.ts';
import type { ModuleRef } from '../model/stepper.ts';
import {
  type DeltaInput,
  everyRow,
  type Shapes,
  type TrainedDelta,
  tensorName,
} from '../model/trained-delta.ts';
import { type FamilyGraph, type NamedNumbers, numbersOf, shapesOf } from './family-graph.ts';

export interface QueryableTraining extends Omit<QueryableOptions, 'earlierBlocks'> {
  /** Blocks that route together. */
  readonly blockLayers: number;
  /** `bank`: everything. `adapter`: A, B and keys over a bank that stays. `new-atoms`: atoms after the first `kept`, and their keys. */
  readonly part: 'bank' | 'adapter' | 'new-atoms';
  readonly kept: number;
  /** Weight in the loss of how unevenly atoms are chosen. */
  readonly balance: number;
}

/** A module's place and sizes. */
export interface Place extends ModuleRef {
  readonly in: number;
  readonly out: number;
}

/** What a pass has found so far. */
interface Routing {
  /** Of the group that is computed, [T,1+K]. */
  weights: Tensor | null;
  readonly summaries: Tensor[]; // [T, r] of each group
}

type At = Parameters<TrainedDelta['add']>[1];

/** Shared by all modules: with the adapter's keys, the bank. */
const sharedNames = ['keys', 'atoms', 'query', 'summary', 'context'] as const;

export function queryableGraph(choice: QueryableTraining): FamilyGraph {
  return {
    family: queryable({ ...choice, earlierBlocks: true }),
    over(modules) {
      const places = modules.map(({ site: { weight: _, ...place } }) => place);
      const own = modules.flatMap(({ site, tensors }) =>
        (['a', 'b'] as const).map((name) => [tensorName(site, name), numbersOf(tensors[name]!)]),
      );
      const { tensors } = modules[0]!;
      const shared = sharedNames.map((name) => [name, numbersOf(tensors[name]!)]);
      const fixed = queryableConstants(choice, groupCount(places, choice.blockLayers));
      return {
        delta: queryableDelta(places, choice),
        numbers: { ...Object.fromEntries([...own, ...shared]), ...fixed },
        active: (topK) => queryableDelta(places, choice, topK),
      };
    },
  };
}

export function groupCount(places: readonly ModuleRef[], blockLayers: number): number {
  return Math.ceil((1 + Math.max(...places.map(({ block }) => block))) / blockLayers);
}

/** `topK`: atoms that are mixed for a token. */
export function queryableDelta(
  places: readonly Place[],
  options: QueryableTraining,
  topK: number = options.topK,
): TrainedDelta {
  const { rank, alpha, atoms, blockLayers, balance } = options;
  const targets = new Set(places.map(({ block, projection }) => moduleIndex(block, projection)));
  const groups = groupCount(places, blockLayers);
  const routers = Array.from({ length: groups }, (_, group): ModuleRef => {
    const router = { block: group * blockLayers, projection: 'attn_q' } as const;
    if (targets.has(moduleIndex(router.block, router.projection))) return router;
    throw new GatewayError('INVALID_REQUEST', 'queryable: targets must have attn_q, which routes');
  });
  const all = allShapes(places, options);
  const isTrained = trainedBy(options, groups);
  const chosen = (wanted: boolean): Shapes =>
    Object.fromEntries(Object.entries(all).filter(([name]) => isTrained(name) === wanted));
  const isBalanced = balance > 0 && topK < atoms;
  let routing: Routing = { weights: null, summaries: [] };
  return {
    trained: chosen(true),
    constants: { ...chosen(false), ...shapesOf(queryableConstants(options, groups)) },
    gateRanks: [],
    isLocal: false,
    ...(isBalanced
      ? {
          penalties: Object.fromEntries(
            routers.map((router) => [tensorName(router, 'balance'), balance / groups]),
          ),
        }
      : {}),
    add(ops, at, input) {
      const { block, projection, x, y } = input;
      if (!targets.has(moduleIndex(block, projection))) return y;
      const h = ops.linear(x, at(tensorName(input, 'a'))); // [T, r]
      const routes = projection === 'attn_q' && block % blockLayers === 0;
      if (routes) {
        if (block === 0) routing = { weights: null, summaries: [] };
        const { summaries } = routing;
        routing.weights = route(ops, at, { h, options, topK, isBalanced, summaries, input });
      }
      const { weights, summaries } = routing;
      if (weights === null) throw new GatewayError('INTERNAL', 'queryable: no group has begun');
      const mixed = ops.mixRanks(h, at('atoms'), weights); // [T, r]
      if (routes) summaries.push(mixed);
      const scale = alpha / rank;
      const g = scale === 1 ? mixed : ops.mul(mixed, ops.training.fill(mixed.shape, scale));
      return ops.add(y, ops.training.linearT(g, at(tensorName(input, 'b'))));
    },
  };
}

function allShapes(places: readonly Place[], options: QueryableTraining): Shapes {
  const { rank, atoms, queryWidth } = options;
  const factors = places.flatMap((place): [string, number[]][] => [
    [tensorName(place, 'a'), [rank, place.in]],
    [tensorName(place, 'b'), [rank, place.out]],
  ]);
  return {
    ...Object.fromEntries(factors),
    keys: [atoms, queryWidth],
    atoms: [atoms, rank, rank],
    query: [queryWidth, rank],
    summary: [rank, rank],
    context: [queryWidth, rank],
  };
}

/** A lone group looks back at nothing: how it would is not trained. */
function trainedBy({ part }: QueryableTraining, groups: number): (name: string) => boolean {
  switch (part) {
    case 'bank':
      return (name) => groups > 1 || (name !== 'summary' && name !== 'context');
    case 'adapter':
      return (name) => name === 'keys' || name.endsWith('.a') || name.endsWith('.b');
    case 'new-atoms':
      return (name) => name === 'keys' || name === 'atoms';
  }
}

/** Numbers of the graph that do not train: sums and places as products. */
export function queryableConstants(
  { rank, atoms, queryWidth, bias }: QueryableTraining,
  groups: number,
): NamedNumbers {
  const oneAt = (length: number, i: number): Float32Array =>
    Float32Array.from({ length }, (_, j) => (i === j ? 1 : 0));
  const shift = Float32Array.from({ length: atoms * (1 + atoms) }, (_, i) =>
    i % (1 + atoms) === 1 + Math.floor(i / (1 + atoms)) ? 1 : 0,
  );
  const places = Array.from({ length: groups }, (_, count) =>
    Array.from({ length: count }, (_, j) => [
      placeName(count, j),
      { shape: [1, count], values: oneAt(count, j) },
    ]),
  ).flat();
  return {
    shift: { shape: [atoms, 1 + atoms], values: shift },
    ones: { shape: [1, rank], values: new Float32Array(rank).fill(1) },
    // Before the division by √dq.
    ...(bias === null
      ? {}
      : { prior: { shape: [1, atoms], values: scaledBias(bias, queryWidth) } }),
    ...Object.fromEntries(places),
  };
}

function scaledBias(bias: readonly number[], queryWidth: number): Float32Array {
  return Float32Array.from(bias, (value) => value * Math.sqrt(queryWidth));
}

function placeName(count: number, j: number): string {
  return `place.${count}.${j}`;
}

interface RouteArguments {
  readonly h: Tensor; // [T, r]
  readonly options: QueryableTraining;
  readonly topK: number;
  readonly isBalanced: boolean;
  readonly summaries: readonly Tensor[]; // [T, r] each
  readonly input: DeltaInput;
}

/** Weights [T,1+K] for mixRanks: 0 of h itself, then π. */
function route(ops: ForwardOps, at: At, parts: RouteArguments): Tensor {
  const { h, options, topK, isBalanced, summaries, input } = parts;
  const scale = 1 / Math.sqrt(options.queryWidth);
  const own = ops.linear(h, at('query')); // [T, dq]
  const q =
    summaries.length === 0
      ? own
      : ops.add(own, ops.linear(lookedBack(ops, at, { h, summaries, scale }), at('context')));
  const asked = ops.linear(q, at('keys')); // [T, K]
  const logits =
    options.bias === null ? asked : ops.add(asked, everyRow(ops, at('prior'), h.shape[0]!));
  const shares = ops.training.softmaxTop(logits, topK, scale); // [T, K]
  input.observe('shares', shares);
  if (isBalanced) {
    const whole = ops.training.softmaxTop(logits, options.atoms, scale); // [T, K]
    input.observe('balance', unevenness(ops, shares, whole, topK));
  }
  return ops.training.linearT(shares, at('shift'));
}

/** K·Σ_k f_k·p_k [1,1]: 1 where all atoms are chosen alike. f is an atom's part of all choices, p its mean weight if all
 *  were mixed, so that those that are never chosen rise too. */
function unevenness(ops: ForwardOps, shares: Tensor, whole: Tensor, topK: number): Tensor {
  const { training } = ops;
  const [rows, atoms] = shares.shape as [number, number];
  const sums = (of: Tensor, factor: number): Tensor =>
    training.linearT(training.fill([1, rows], factor / rows), of); // [1, K]
  const products = ops.mul(sums(training.sign(shares), 1 / topK), sums(whole, 1)); // [1, K]
  return training.linearT(products, training.fill([atoms, 1], atoms));
}

/** c = Σ_j softmax_j(⟨W_s·h, s_j⟩/√dq)·s_j, [T, r]. */
function lookedBack(
  ops: ForwardOps,
  at: At,
  { h, summaries, scale }: Pick<RouteArguments, 'h' | 'summaries'> & { readonly scale: number },
): Tensor {
  const { training } = ops;
  const count = summaries.length;
  const sought = ops.linear(h, at('summary')); // [T, r]
  const scores = summaries
    .map((s, j) => {
      const dot = ops.linear(ops.mul(sought, s), at('ones')); // [T, 1]
      return training.linearT(dot, at(placeName(count, j))); // [T, J], the others 0
    })
    .reduce((sum, score) => ops.add(sum, score));
  const shares = training.softmaxTop(scores, count, scale); // [T, J]
  return summaries
    .map((s, j) => {
      const share = ops.linear(shares, at(placeName(count, j))); // [T, 1]
      return ops.mul(s, training.linearT(share, at('ones')));
    })
    .reduce((sum, part) => ops.add(sum, part));
}
