// The numbers of a benchmark adapter, made from a seed: A uniform of standard deviation 1/sqrt(in), B uniform of 0.08
// (guess: large enough to change the answers within a few tokens). Both sides get the same f16 bits.

import { f32ToF16Bits } from '../src/kernels/half.ts';
import {
  type DecoderConfig,
  type Projection,
  projectionShape,
  projections,
} from '../src/model/decoder-config.ts';

export interface AdapterModule {
  readonly block: number;
  readonly projection: Projection;
  readonly in: number;
  readonly out: number;
  /** f16 bits. */
  readonly a: Uint16Array; // [r, in]
  readonly b: Uint16Array; // [out, r]
}

/** 32-bit xorshift multiply generator (Steele & Vigna's splitmix32 finaliser over a Weyl sequence). */
export function createRandom(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x9e3779b9) >>> 0;
    let z = state;
    z = Math.imul(z ^ (z >>> 16), 0x85ebca6b);
    z = Math.imul(z ^ (z >>> 13), 0xc2b2ae35);
    return (z ^ (z >>> 16)) >>> 0;
  };
}

function uniformF16(random: () => number, count: number, deviation: number): Uint16Array {
  const values = new Float32Array(count);
  const half = deviation * Math.sqrt(3); // a uniform on ±h has the deviation h/sqrt(3)
  for (let i = 0; i < count; i++) values[i] = half * (random() / 2 ** 31 - 1);
  const bits = new Uint16Array(count);
  f32ToF16Bits(values, bits);
  return bits;
}

/** One module after the other, so that no side holds a whole adapter twice. */
export function* adapterModules(
  config: DecoderConfig,
  seed: number,
  rank: number,
): Generator<AdapterModule> {
  const random = createRandom(seed);
  for (let block = 0; block < config.blocks; block++) {
    for (const projection of projections) {
      const shape = projectionShape(config, projection);
      const a = uniformF16(random, rank * shape.in, 1 / Math.sqrt(shape.in));
      const b = uniformF16(random, shape.out * rank, 0.08);
      yield { block, projection, in: shape.in, out: shape.out, a, b };
    }
  }
}
