// Queryable LoRA in training (algorithms.md section 6, adapters/families/queryable.ts): bank and keys are shared by all modules,
// and a group of blocks routes once, by the low-rank state of its first q projection, with all earlier groups' summaries.

import type { QueryableOptions } from '../adapters/families/queryable.ts';
import { GatewayError } from '../errors.ts';
import type { ForwardOps, Tensor } from '../kernels/kernels.ts';
import { type DecoderConfig, type Projection, projectionShape } from '../model/decoder-config.ts';
import {
  type DeltaInput,
  type Shapes,
  type TrainedDelta,
  tensorName,
} from '../model/trained-delta.ts';
import { type NamedNumbers, shapesOf } from './family-graph.ts';

export interface QueryableTraining extends Omit<QueryableOptions, 'earlierBlocks' | 'bias'> {
  /** Blocks that route together. */
  readonly blockLayers: number;
  /** With attn_q, which routes. */
  readonly targets: readonly Projection[];
}

/** What a pass has found so far. */
interface Routing {
  /** Of the group that is computed, [T,1+K]. */
  weights: Tensor | null;
  readonly summaries: Tensor[]; // [T, r] of each group
}

type At = Parameters<TrainedDelta['add']>[1];

/** An instruction's prior is not trained with: λ = 0. */
export function queryableDelta(config: DecoderConfig, options: QueryableTraining): TrainedDelta {
  const { rank, alpha, blockLayers, targets } = options;
  if (!targets.includes('attn_q')) {
    throw new GatewayError('INVALID_REQUEST', 'queryable: targets must have attn_q, which routes');
  }
  const groups = Math.ceil(config.blocks / blockLayers);
  let routing: Routing = { weights: null, summaries: [] };
  return {
    trained: trainedShapes(config, options, groups),
    constants: shapesOf(queryableConstants(options, groups)),
    gateRanks: [],
    isLocal: false,
    add(ops, at, input) {
      const { block, projection, x, y } = input;
      if (!targets.includes(projection)) return y;
      const h = ops.linear(x, at(tensorName(input, 'a'))); // [T, r]
      const routes = projection === 'attn_q' && block % blockLayers === 0;
      if (routes) {
        if (block === 0) routing = { weights: null, summaries: [] };
        routing.weights = route(ops, at, { h, options, summaries: routing.summaries, input });
      }
      const { weights, summaries } = routing;
      if (weights === null) throw new GatewayError('INTERNAL', 'queryable: no group has begun');
      const mixed = ops.mixRanks(h, at('atoms'), weights); // [T, r]
      if (routes) summaries.push(mixed);
      const g = ops.mul(mixed, ops.training.fill(mixed.shape, alpha / rank));
      return ops.add(y, ops.training.linearT(g, at(tensorName(input, 'b'))));
    },
  };
}

function trainedShapes(config: DecoderConfig, options: QueryableTraining, groups: number): Shapes {
  const { rank, atoms, queryWidth, targets } = options;
  const factors = Array.from({ length: config.blocks }, (_, block) =>
    targets.flatMap((projection): [string, number[]][] => {
      const shape = projectionShape(config, projection);
      return [
        [tensorName({ block, projection }, 'a'), [rank, shape.in]],
        [tensorName({ block, projection }, 'b'), [rank, shape.out]],
      ];
    }),
  ).flat();
  const depth = groups > 1 ? { summary: [rank, rank], context: [queryWidth, rank] } : {};
  const shared = {
    keys: [atoms, queryWidth],
    atoms: [atoms, rank, rank],
    query: [queryWidth, rank],
  };
  return { ...Object.fromEntries(factors), ...shared, ...depth };
}

/** Numbers of the graph that do not train: sums and places as products. */
export function queryableConstants(
  { rank, atoms }: Pick<QueryableTraining, 'rank' | 'atoms'>,
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
    ...Object.fromEntries(places),
  };
}

function placeName(count: number, j: number): string {
  return `place.${count}.${j}`;
}

interface RouteArguments {
  readonly h: Tensor; // [T, r]
  readonly options: QueryableTraining;
  readonly summaries: readonly Tensor[]; // [T, r] each
  readonly input: DeltaInput;
}

/** Weights [T,1+K] for mixRanks: 0 of h itself, then π. */
function route(ops: ForwardOps, at: At, { h, options, summaries, input }: RouteArguments): Tensor {
  const scale = 1 / Math.sqrt(options.queryWidth);
  const own = ops.linear(h, at('query')); // [T, dq]
  const q =
    summaries.length === 0
      ? own
      : ops.add(own, ops.linear(lookedBack(ops, at, { h, summaries, scale }), at('context')));
  const shares = ops.training.softmaxTop(ops.linear(q, at('keys')), options.topK, scale); // [T, K]
  input.observe('shares', shares);
  return ops.training.linearT(shares, at('shift'));
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
