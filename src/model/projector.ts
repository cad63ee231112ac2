// A projection as rows with adapters see it: the frozen weight, plus each row's own delta B·f(A·x) (design.md section 3).
// What f does is data (use-table.ts): gates per rank, ranks that choose themselves, or a mix of atoms.

import {
  dtypeLayout,
  type Kernels,
  type Ops,
  type PagePool,
  type StoredTensor,
  type Tensor,
} from '../kernels/kernels.ts';
import type { StoredBank } from './atom-memory.ts';
import {
  type DecoderConfig,
  moduleIndex,
  type Projection,
  projectionShape,
  projections,
} from './decoder-config.ts';
import type { UseInputs } from './use-table.ts';

/** Pools of one module's pages. */
export interface ModulePools {
  readonly a: StoredTensor; // [pages, 8, in]
  readonly b: StoredTensor; // [pages, 8, out]
}

export interface PoolOptions {
  readonly config: DecoderConfig;
  readonly kernels: Kernels;
  /** Page 0 included. */
  readonly pages: number;
  /** What their numbers are kept as; f16 where a width is no multiple of q8_0's 32. */
  readonly pageType: 'f16' | 'q8_0';
}

/** By module. */
export function storePools({ config, kernels, pages, pageType }: PoolOptions): ModulePools[] {
  const pool = (use: PagePool['use'], width: number): PagePool => {
    const dtype = width % dtypeLayout[pageType].block === 0 ? pageType : 'f16';
    return { use, dtype, width };
  };
  const modules = Array.from({ length: config.blocks }, () => projections).flat();
  const stored = kernels.storePages(
    pages,
    modules.flatMap((projection) => {
      const shape = projectionShape(config, projection);
      return [pool('shrink', shape.in), pool('expand', shape.out)];
    }),
  );
  return modules.map((_, i) => ({ a: stored[2 * i]!, b: stored[2 * i + 1]! }));
}

export interface ProjectorParts {
  readonly weights: ReadonlyArray<Readonly<Record<Projection, StoredTensor>>>; // by block
  readonly pools: readonly ModulePools[]; // by module
  readonly inputs: UseInputs;
  readonly bank: StoredBank | null;
}

export class Projector {
  /** [T, 1+K] of each block of layers, after its projections were recorded. */
  readonly atomWeights: Tensor[] = [];
  readonly #ops: Ops;
  readonly #parts: ProjectorParts;
  readonly #summaries: Tensor[] = []; // [T, 8P] of each block of layers

  constructor(ops: Ops, parts: ProjectorParts) {
    this.#ops = ops;
    this.#parts = parts;
  }

  /** Projections of x [T,in], which they share. Blocks and their projections come in the order of the forward pass. */
  project(block: number, x: Tensor, names: readonly Projection[]): Tensor[] {
    const { weights, inputs } = this.#parts;
    const ops = this.#ops;
    const pools = names.map((name) => this.#parts.pools[moduleIndex(block, name)]!);
    const parts = pools.map(({ a }, i) => ({ a, gate: inputs.gate(block, names[i]!) }));
    let hs = ops.shrink(x, inputs.pages, parts, inputs.uses); // [T, 8P] each
    if (inputs.routing !== null) {
      const { groups, temperatures, bias } = inputs.routing;
      const biases = names.map((name) => bias(block, name));
      hs = ops.routeRanks(x, hs, { uses: inputs.uses, groups, temperatures, biases });
    }
    hs = this.#mix(block, names, hs);
    const deltas = names.map((name, i) => {
      const y = ops.linear(x, weights[block]![name]); // [T, out]
      return { y, h: hs[i]!, b: pools[i]!.b };
    });
    return ops.expand(inputs.pages, deltas);
  }

  /** The first projection of a block of layers chooses for all of them, from its own h and from what the blocks before made
   *  of theirs: of the token alone, so that prefill and decode agree. */
  #mix(block: number, names: readonly Projection[], hs: Tensor[]): Tensor[] {
    const { inputs, bank } = this.#parts;
    if (inputs.atoms === null || bank === null) return hs;
    const isFirst = block % bank.blockLayers === 0 && names[0] === 'attn_q';
    if (isFirst) {
      const weights = this.#ops.routeAtoms(hs[0]!, this.#summaries, bank, inputs.atoms);
      this.atomWeights.push(weights); // [T, 1+K]
    }
    const weights = this.atomWeights.at(-1)!;
    const mixed = hs.map((h) => this.#ops.mixRanks(h, bank.atoms, weights)); // [T, 8P] each
    if (isFirst) this.#summaries.push(mixed[0]!);
    return mixed;
  }
}
