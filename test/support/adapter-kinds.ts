// Uses of every kind that a row can have, over random pages: for what they compute, not for how they were trained.

import { f16Values, f32ToF16Bits } from '../../src/kernels/half.ts';
import type { Kernels } from '../../src/kernels/kernels.ts';
import { Decoder } from '../../src/model/decoder.ts';
import {
  type DecoderConfig,
  projectionShape,
  projections,
  readDecoderConfig,
} from '../../src/model/decoder-config.ts';
import { openGguf } from '../../src/model/gguf.ts';
import {
  type AdapterRows,
  type AtomBank,
  type AtomRouting,
  type RankGroup,
  type Stepper,
  uniformRows,
} from '../../src/model/stepper.ts';
import { loadWeights } from '../../src/model/weights.ts';
import { tinyPath } from './open-test-decoder.ts';
import type { PlainPage } from './plain-decoder.ts';
import { createRng, normals, type Rng } from './random.ts';

export const tinyBlocks = 2;

/** The tiny model with its two blocks over and over: enough layers for blocks of them. */
export function openDeepTiny(
  kernels: Kernels,
  { blocks, pages }: { readonly blocks: number; readonly pages: number },
): Decoder {
  using file = openGguf(tinyPath);
  const config = readDecoderConfig(file);
  const weights = loadWeights(file, config, { kernels, mode: 'exact', cache: null });
  return new Decoder({
    config: { ...config, blocks },
    weights: {
      ...weights,
      blocks: Array.from({ length: blocks }, (_, i) => weights.blocks[i % tinyBlocks]!),
    },
    kernels,
    cells: 2048,
    cellType: 'f32',
    pages,
    pageType: 'f16',
    tokensMax: 128,
    segmentsMax: 32,
  });
}

/** Pages as they were written, of a stepper that keeps them in f16. */
export class PageBook {
  readonly #pages: PlainPage[] = [];
  readonly #stepper: Stepper;
  readonly #rng: Rng;

  constructor(stepper: Stepper, seed: number) {
    this.#stepper = stepper;
    this.#rng = createRng(seed);
  }

  /** From page 1 on. */
  readonly page = (page: number): PlainPage => this.#pages[page - 1]!;

  /** So many new pages, of random numbers. */
  take(count: number): number[] {
    return Array.from({ length: count }, () => {
      const page = this.#pages.length + 1;
      const modules = allModules(this.#stepper.config).map((module) => {
        const shape = projectionShape(this.#stepper.config, module.projection);
        const a = halves(normals(this.#rng, 8 * shape.in, 0.1));
        const b = halves(normals(this.#rng, 8 * shape.out, 0.1));
        this.#stepper.writePage(page, module, { a, b });
        return { a: numbers(a, shape.in), b: numbers(b, shape.out) };
      });
      this.#pages.push({ modules });
      return page;
    });
  }
}

function allModules({ blocks }: DecoderConfig) {
  return Array.from({ length: blocks }, (_, block) =>
    projections.map((projection) => ({ block, projection })),
  ).flat();
}

function halves(values: Float32Array): Uint16Array {
  const bits = new Uint16Array(values.length);
  f32ToF16Bits(values, bits);
  return bits;
}

function numbers(bits: Uint16Array, width: number): Float32Array[] {
  const flat = Float32Array.from(bits, (half) => f16Values[half]!);
  return Array.from({ length: 8 }, (_, i) => flat.subarray(i * width, (i + 1) * width));
}

/** 8 ranks a page of every module: `of` gives each its number. */
export function perModule(
  config: DecoderConfig,
  pages: readonly number[],
  of: (module: number, rank: number) => number,
): Float32Array {
  const ranks = 8 * pages.length;
  return Float32Array.from({ length: config.blocks * projections.length * ranks }, (_, i) =>
    of(Math.floor(i / ranks), i % ranks),
  );
}

/** One group over all pages; mora's bias is what makes a score of |a·x|: 1 / |a|. */
export function routedRows(
  book: PageBook,
  config: DecoderConfig,
  pages: readonly number[],
  group: Pick<RankGroup, 'topK' | 'temperature'>,
): AdapterRows {
  const rng = createRng(pages[0]!);
  const lengthOf = (module: number, rank: number): number => {
    const row = book.page(pages[rank >> 3]!).modules[module]!.a[rank & 7]!;
    return Math.hypot(...Array.from(row));
  };
  const bias = perModule(config, pages, (module, rank) =>
    group.temperature === 0 ? 0.2 * rng.normal() : 1 / lengthOf(module, rank),
  );
  const groups = [{ firstPage: 0, pages: pages.length, ...group }];
  return { ...uniformRows(pages, 8 * pages.length), routing: { groups, bias } };
}

export function randomBank(sizes: Pick<AtomBank, 'r' | 'dq' | 'K' | 'blockLayers'>): AtomBank {
  const { r, dq, K } = sizes;
  const rng = createRng(r * 100 + K);
  // Identity and noise (algorithms.md section 6): a mix of them is near what there was.
  const atoms = normals(rng, K * r * r, 0.3);
  for (let i = 0; i < K * r; i++) atoms[i * r + (i % r)]! += 1;
  return {
    id: `bank ${r} ${dq} ${K}`,
    atoms,
    query: normals(rng, dq * r),
    summary: normals(rng, r * r),
    context: normals(rng, dq * r),
    ...sizes,
  };
}

export function randomAtoms({ id, K, dq }: AtomBank, topK: number, seed: number): AtomRouting {
  const rng = createRng(seed);
  return { bank: id, keys: normals(rng, K * dq), bias: normals(rng, K, 0.5), topK };
}
