// What is trained over a frozen decoder: tensors by name, and what they add to each projection. The graph of loss-graph.ts
// knows no kind of adapter; kinds are made of these (trainer/family-graph.ts). `lowRank` is the plain pair.

import type { ForwardOps, Tensor } from '../kernels/kernels.ts';
import { type DecoderConfig, moduleIndex, projectionShape, projections } from './decoder-config.ts';
import type { ModuleRef } from './stepper.ts';

/** f32, outermost axis first. */
export type Shapes = Readonly<Record<string, readonly number[]>>;

/** A projection in a pass. */
export interface DeltaInput extends ModuleRef {
  readonly x: Tensor; // [T, in]
  readonly y: Tensor; // [T, out]: the base's
  /** The batch's gate for the first so many ranks, [T, ranks]. */
  readonly gate: (ranks: number) => Tensor;
  /** Makes a value readable after each step, under its tensorName. */
  readonly observe: (name: string, value: Tensor) => void;
}

export interface TrainedDelta {
  readonly trained: Shapes;
  /** Written by the caller, and not trained. */
  readonly constants: Shapes;
  /** What `gate` is asked for. */
  readonly gateRanks: readonly number[];
  /** Whether a block can be computed again by itself. */
  readonly isLocal: boolean;
  /** Observed values of one number that are minimised beside the loss: their weights. */
  readonly penalties?: Readonly<Record<string, number>>;
  /** y and what is trained, [T, out]. Projections come in the order of the pass. */
  readonly add: (ops: ForwardOps, at: (name: string) => Tensor, input: DeltaInput) => Tensor;
}

/** The same for one projection, by names of its own. */
export interface ModuleDelta extends Pick<TrainedDelta, 'trained' | 'constants'> {
  /** 0: `gate` is not asked for. */
  readonly gateRank: number;
  readonly add: (ops: ForwardOps, at: ModuleTensors, input: DeltaInput) => Tensor;
}
type ModuleTensors = Readonly<Record<string, Tensor>>;

export function tensorName({ block, projection }: ModuleRef, name: string): string {
  return `blk.${block}.${projection}.${name}`;
}

/** Projections that are not among the modules stay the base's. */
export function deltaOf(modules: ReadonlyArray<readonly [ModuleRef, ModuleDelta]>): TrainedDelta {
  const byModule = new Map(modules.map(([ref, delta]) => [indexOf(ref), delta]));
  const named = (of: 'trained' | 'constants'): Shapes =>
    Object.fromEntries(
      modules.flatMap(([ref, delta]) =>
        Object.entries(delta[of]).map(([name, shape]) => [tensorName(ref, name), shape]),
      ),
    );
  const gateRanks = new Set(modules.map(([, { gateRank }]) => gateRank));
  gateRanks.delete(0);
  return {
    trained: named('trained'),
    constants: named('constants'),
    gateRanks: [...gateRanks],
    isLocal: true,
    add(ops, at, input) {
      const delta = byModule.get(indexOf(input));
      if (delta === undefined) return input.y;
      const names = Object.keys({ ...delta.trained, ...delta.constants });
      const own = names.map((name) => [name, at(tensorName(input, name))] as const);
      return delta.add(ops, Object.fromEntries(own), input);
    },
  };
}

function indexOf({ block, projection }: ModuleRef): number {
  return moduleIndex(block, projection);
}

export interface LowRankSizes {
  readonly in: number;
  readonly out: number;
  readonly rank: number;
}

/** y += B·(gate ⊙ A·x). A x goes in, Bᵀ comes out: both rank-major, so a prefix is one range. */
export function lowRank({ rank, ...shape }: LowRankSizes): ModuleDelta {
  return {
    trained: { a: [rank, shape.in], b: [rank, shape.out] },
    constants: {},
    gateRank: rank,
    add(ops, { a, b }, { x, y, gate }) {
      const h = ops.mul(ops.linear(x, a!), gate(rank)); // [T, R]
      return ops.add(y, ops.training.linearT(h, b!));
    },
  };
}

/** v [1, N] in each of T rows: [T, N]. */
export function everyRow(ops: ForwardOps, v: Tensor, rows: number): Tensor {
  return ops.training.linearT(ops.training.fill([rows, 1], 1), v);
}

/** Nothing is added anywhere. */
export const noDelta: TrainedDelta = deltaOf([]);

/** A plain pair in every module; none where `rankOf` says 0. */
export function lowRankDelta(
  config: DecoderConfig,
  rankOf: (module: ModuleRef) => number,
): TrainedDelta {
  const modules = Array.from({ length: config.blocks }, (_, block) =>
    projections.map((projection) => {
      const module = { block, projection };
      const sizes = { ...projectionShape(config, projection), rank: rankOf(module) };
      return [module, sizes] as const;
    }),
  ).flat();
  return deltaOf(
    modules
      .filter(([, { rank }]) => rank > 0)
      .map(([module, sizes]) => [module, lowRank(sizes)] as const),
  );
}
