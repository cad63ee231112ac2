import { readFileSync } from 'node:fs';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { blendContents, mergeTensors } from '../../../src/adapters/blend.ts';
import { type BlendSpec, blendKey, parseBlendKey } from '../../../src/adapters/blend-key.ts';
import { openPacked, type PackedContents, packedAdapter } from '../../../src/adapters/pack.ts';
import { f16Values } from '../../../src/kernels/half.ts';
import { type MadeOptions, makePacked, tinyModules } from '../../support/make-packed.ts';

interface MergeCase {
  readonly method: BlendSpec['merge'];
  readonly density: number;
  readonly weights: readonly number[];
  readonly tensors: readonly (readonly number[])[];
  readonly masks: readonly (readonly number[])[];
  readonly merged: readonly number[];
}

const golden = JSON.parse(
  readFileSync(new URL('../../golden/adapters/merges.json', import.meta.url), 'utf8'),
) as { readonly cases: readonly MergeCase[] };

const all = (): boolean => true;

describe('mergeTensors', () => {
  it('equals PEFT’s merge_utils, DARE’s coins given', () => {
    expect(golden.cases).toHaveLength(36);
    for (const { method: merge, density, weights, tensors, masks, merged } of golden.cases) {
      const keeps = (part: number, i: number): boolean => masks[part]![i] === 1;
      const given = tensors.map((tensor) => Float64Array.from(tensor));
      const got = mergeTensors(given, { merge, density, weights, keeps });
      expect(got).toHaveLength(merged.length);
      got.forEach((value, i) => {
        expect(value).toBeCloseTo(merged[i]!, 12);
      });
    }
  });

  // [[3, -1], [0.5, -2]] and [[-1, 4], [1, -1]], weights 1 and 2.
  const [x, y] = [Float64Array.of(3, -1, 0.5, -2), Float64Array.of(-1, 4, 1, -1)];

  it('ties by hand: trim, elect, and the mean of those that agree', () => {
    // Half of each by size: [3, 0, 0, -2] and [-1, 4, 0, 0]: of y's three ones the first stays. Signs: 2 +, 4 +, 0 +, -2 -.
    const rule = { merge: 'ties', density: 0.5, weights: [1, 2], keeps: all } as const;
    expect([...mergeTensors([x, y], rule)]).toEqual([3, 8, 0, -2]);
    // Nothing trimmed: signs of 2, 3, 1.5, -3; y is 8 at 1, both agree on 2 and 3: (0.5 + 2)/2 and (-2 - 2)/2.
    expect([...mergeTensors([x, y], { ...rule, density: 1 })]).toEqual([3, 8, 1.25, -2]);
  });

  it('dare by hand: drop, rescale, and the sum, or the election', () => {
    const keeps = (part: number, i: number): boolean => (part + i) % 2 === 0; // x: 3, 0.5; y: 4, -1
    const rule = { merge: 'dare_linear', density: 0.5, weights: [1, 2], keeps } as const;
    expect([...mergeTensors([x, y], rule)]).toEqual([6, 16, 1, -4]);
    const both = { ...rule, weights: [1, -1], keeps: all };
    expect([...mergeTensors([x, y], both)]).toEqual([8, -10, -1, -2]);
    expect([...mergeTensors([x, y], { ...both, merge: 'dare_ties' })]).toEqual([6, -8, -0.5, -1]);
  });

  it('takes a shorter tensor as one that ends in zeros', () => {
    const rule = { merge: 'dare_linear', density: 1, weights: [1, 1], keeps: all } as const;
    expect([...mergeTensors([x, y.subarray(0, 1)], rule)]).toEqual([2, -1, 0.5, -2]);
  });
});

function contentsOf(
  options: MadeOptions,
): PackedContents & { readonly generation: `sha256:${string}` } {
  const { bytes, generation } = makePacked(options);
  const packed = openPacked(bytes, generation);
  const modules = new Map(
    packed.manifest.modules.flatMap((module) => {
      const name = `blk.${module.block}.${module.projection}.a`;
      const pages = Array.from({ length: packed.pages }, (_, i) => packed.page(module, i)!);
      const join = (side: 'a' | 'b') => Uint16Array.from(pages.flatMap((page) => [...page[side]]));
      return [[name, { pages: pages.length, a: join('a'), b: join('b') }] as const];
    }),
  );
  return { manifest: packed.manifest, modules, floats: packed.floats, generation };
}

function blended(spec: BlendSpec, parts: readonly PackedContents[]) {
  const key = blendKey(spec);
  return packedAdapter(key, blendContents(key, parts));
}

const q0 = { block: 0, projection: 'attn_q' } as const;
const lora = (seed: number, rank: number, over: Partial<MadeOptions> = {}) =>
  contentsOf({ kind: 'lora', rank, seed, ...over });

describe('blendContents', () => {
  const one = lora(1, 12);
  const two = lora(2, 8, { modules: tinyModules.slice(1) });
  const spec = (over: Partial<BlendSpec> = {}): BlendSpec => ({
    merge: 'ties',
    density: 1,
    parts: [
      { generation: one.generation, rank: 12, weight: 1 },
      { generation: two.generation, rank: 3, weight: 1 },
    ],
    ...over,
  });

  it('has the modules of all parts, each at the most ranks that a part has of it', () => {
    const { manifest, pages } = blended(spec(), [one, two]);
    expect(manifest.modules).toHaveLength(14);
    expect([manifest.rankMax, pages]).toEqual([12, 2]);
    const few = spec({ parts: spec().parts.map((part) => ({ ...part, rank: 3 })) });
    expect(blended(few, [one, two]).manifest.modules.map(({ rank }) => rank)).toEqual(
      Array(14).fill(3),
    );
  });

  it('leaves a module that one part has alone as it is', () => {
    const merged = blended(spec(), [one, two]);
    for (const page of [0, 1]) {
      expect(merged.page(q0, page)).toEqual(packedAdapter(one.generation, one).page(q0, page));
    }
  });

  it('puts √|w| on both factors and the sign of w on A', () => {
    const parts = [{ generation: one.generation, rank: 12, weight: -4 }];
    const merged = blended(spec({ parts }), [one]).page(q0, 0)!;
    const plain = packedAdapter(one.generation, one).page(q0, 0)!;
    const numbers = (bits: Uint16Array): number[] => Array.from(bits, (half) => f16Values[half]!);
    expect(numbers(merged.a)).toEqual(numbers(plain.a).map((value) => -2 * value));
    expect(numbers(merged.b)).toEqual(numbers(plain.b).map((value) => 2 * value));
  });

  it('draws the same coins for the same blend, others for another, and keeps the share that was asked for', () => {
    const dare = spec({ merge: 'dare_linear', density: 0.25, parts: spec().parts.slice(0, 1) });
    const a = (over: BlendSpec): Uint16Array => blended(over, [one]).page(q0, 0)!.a;
    expect(a(dare)).toEqual(a(dare));
    expect(a(dare)).not.toEqual(a({ ...dare, density: 0.26 }));
    const kept = a(dare).filter((bits) => bits !== 0).length;
    expect(kept / a(dare).length).toBeGreaterThan(0.18);
    expect(kept / a(dare).length).toBeLessThan(0.32);
  });

  it('follows levels: what a level has on is what is merged', () => {
    const levels = tinyModules.map((_, i) =>
      Array.from({ length: 4 }, (__, k) => Math.min(4, k + 1 + (i % 2))),
    );
    const part = lora(3, 4, { levels });
    const parts = [{ generation: part.generation, rank: 1, weight: 1 }];
    const { manifest } = blended(spec({ parts }), [part]);
    expect(manifest.modules.map(({ rank }) => rank)).toEqual(Array(7).fill(1));
  });

  it.each(['fly', 'mora', 'svfit', 'queryable'] as const)('refuses %s', (kind) => {
    const { bytes, generation } = makePacked({ kind, rank: 8, seed: 1 });
    const { manifest } = openPacked(bytes, generation);
    const part = { manifest, modules: new Map(), floats: new Map() };
    const parts = [{ generation, rank: 8, weight: 1 }];
    expect(() => blended(spec({ parts }), [part])).toThrow(
      expect.objectContaining({
        code: 'UNSUPPORTED',
        message: `ties of a ${kind} adapter; linear is served`,
      }),
    );
  });

  it('refuses parts of two bases, and numbers that leave f16', () => {
    const other = { ...two, manifest: { ...two.manifest, baseHash: 'c'.repeat(64) } };
    expect(() => blended(spec(), [one, other])).toThrow('different bases');
    const loud = spec({ parts: [{ generation: one.generation, rank: 12, weight: 1e12 }] });
    expect(() => blended(loud, [one])).toThrow(
      expect.objectContaining({ code: 'INVALID_ADAPTER' }),
    );
  });
});

describe('the key of a blend', () => {
  it('says all that the blend is made of', () => {
    const digit = fc.constantFrom(...'0123456789abcdef');
    const part = fc.record({
      generation: fc
        .string({ unit: digit, minLength: 64, maxLength: 64 })
        .map((hex) => `sha256:${hex}` as const),
      rank: fc.integer({ min: 1, max: 256 }),
      weight: fc.double({ min: -16, max: 16, noNaN: true }).map((weight) => weight + 0),
    });
    fc.assert(
      fc.property(
        fc.record({
          merge: fc.constantFrom('ties' as const, 'dare_linear' as const, 'dare_ties' as const),
          density: fc.double({ min: 1e-6, max: 1, noNaN: true }),
          parts: fc.array(part, { minLength: 1, maxLength: 8 }),
        }),
        (spec) => {
          expect(parseBlendKey(blendKey(spec))).toEqual(spec);
        },
      ),
    );
  });
});
