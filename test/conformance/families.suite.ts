// What every family of adapters must keep, in f64 on one module: it starts as nothing, its gradients are right, what is sliced,
// saved and exported is the same function, and what it says of itself is exact.

import { describe, expect, it } from 'vitest';
import { adapterKinds, type FamilyOptions, noOptions } from '../../src/adapters/adapter.ts';
import {
  bytesOf,
  checkTensors,
  type Family,
  forward,
  type PeftPair,
  parameterCount,
  type Site,
  slice,
  type Tensors,
} from '../../src/adapters/families/family.ts';
import { columnsOf, times, transposedTimes } from '../../src/adapters/families/matrices.ts';
import { createRandom } from '../../src/adapters/families/seeded-random.ts';
import { type Columns, transpose } from '../../src/adapters/orthogonal.ts';
import {
  createPacker,
  type FloatName,
  type Floats,
  generationOf,
  openPacked,
  type PackedAdapter,
} from '../../src/adapters/pack.ts';
import type { ServedModule } from '../../src/adapters/served.ts';
import type { LoraModule } from '../../src/adapters/squeeze.ts';
import { f16Values } from '../../src/kernels/half.ts';
import {
  largestDifference,
  normalColumns,
  numericGradient,
  sumOfProducts,
  trainedTensors,
} from '../support/family-site.ts';

export interface FamilyCase {
  readonly name: string;
  readonly family: Family;
  readonly site: Site;
  readonly ranks: readonly number[];
  readonly describe: string;
  /** Of a served module at full rank. */
  readonly bytes: number;
  readonly parameters: number;
  /** Whether the pair at a rank is a LoRA for PEFT; else the reason that is given contains this. */
  readonly export: true | RegExp;
  readonly import: true | RegExp;
  /** A and B where a served module has none. */
  readonly factors?: (served: ServedModule) => { a: Float64Array; b: Float64Array };
  /** f on h = A·x, where it is more than the gates. */
  readonly transform?: (h: Columns, x: Columns, tensors: Tensors, served: ServedModule) => Columns;
  /** What the packed file has beyond the modules' own numbers. */
  readonly packed?: {
    readonly options: Partial<FamilyOptions>;
    readonly floats: ReadonlyMap<FloatName, Floats>;
  };
}

const tokens = 5;

export function familySuite(test: FamilyCase): void {
  const { family, site } = test;
  const start = (): Tensors => family.init(site, createRandom(3n));
  const trained = (): Tensors => trainedTensors(family, site, createRandom(4n));
  const inputs = normalColumns(createRandom(5n), tokens, site.in);
  const at = (tensors: Tensors, x: Columns, rank: number | null): Columns =>
    forward(family, site, tensors, { x, rank }).y;

  describe(`family: ${test.name}`, () => {
    it('starts as the identity: every output is exactly 0, at every rank and as served', () => {
      const tensors = start();
      checkTensors(family, site, tensors);
      for (const rank of [null, ...test.ranks]) {
        expect(at(tensors, inputs, rank).data.every((value) => value === 0)).toBe(true);
      }
      const served = deltaOf(test, tensors, family.serve(site, tensors), inputs);
      expect(served.data.every((value) => value === 0)).toBe(true);
    });

    it('is not the identity once it is trained', () => {
      for (const rank of [null, ...test.ranks]) {
        expect(at(trained(), inputs, rank).data.some((value) => Math.abs(value) > 1e-3)).toBe(true);
      }
    });

    it('has gradients as central differences have them, to 1e-4', () => {
      const tensors = trained();
      const x = { ...inputs, data: Float64Array.from(inputs.data) };
      const weights = normalColumns(createRandom(6n), tokens, site.out);
      const loss = (): number => sumOfProducts(at(tensors, x, null), weights);
      const gradient = forward(family, site, tensors, { x, rank: null }).gradient(weights);
      expect(new Set(Object.keys(gradient.tensors))).toEqual(new Set(family.trained));
      const checks = [
        { name: 'x', of: x, got: gradient.dx },
        ...family.trained.map((name) => ({
          name,
          of: tensors[name]!,
          got: gradient.tensors[name]!,
        })),
      ];
      for (const { name, of, got } of checks) {
        const size = Math.max(...got.data.map(Math.abs));
        expect(size, `${name} moves`).toBeGreaterThan(1e-4);
        got.data.forEach((value, i) => {
          const wanted = numericGradient(loss, of.data, i);
          expect(Math.abs(value - wanted), `${name}[${i}]`).toBeLessThan(1e-4 * size);
        });
      }
    });

    it('slices to a rank without changing what that rank is, and to fewer bytes', () => {
      const tensors = trained();
      let before = 0;
      for (const rank of test.ranks) {
        const sliced = slice(family, tensors, rank);
        expect(at(sliced, inputs, rank).data).toEqual(at(tensors, inputs, rank).data);
        const bytes = bytesOf(family.serve(site, sliced));
        if (family.slicing === 'prefix') expect(bytes).toBeGreaterThan(before);
        else expect(bytes).toBeGreaterThanOrEqual(before);
        before = bytes;
      }
    });

    it('computes rows together as it computes them alone, bit for bit', () => {
      const tensors = trained();
      for (const rank of [null, ...test.ranks]) {
        const together = at(tensors, inputs, rank);
        for (let t = 0; t < tokens; t++) {
          const alone = at(tensors, columnsOf(inputs, t, 1), rank);
          expect(alone.data).toEqual(columnsOf(together, t, 1).data);
        }
      }
    });

    it('serves what it was trained to be', () => {
      const tensors = storable(trained());
      const served = family.serve(site, tensors);
      expect([served.block, served.projection, served.in, served.out]).toEqual([
        site.block,
        site.projection,
        site.in,
        site.out,
      ]);
      const got = deltaOf(test, tensors, served, inputs);
      expect(largestDifference(got.data, at(tensors, inputs, null).data)).toBeLessThan(1e-9);
    });

    it('comes back from its packed file, but for the rounding to f16', () => {
      const tensors = storable(trained());
      const served = family.serve(site, tensors);
      const back = unpacked(packedFile(test, served), served);
      const got = deltaOf(test, tensors, back, inputs);
      const wanted = at(tensors, inputs, null);
      const size = Math.max(...wanted.data.map(Math.abs));
      expect(largestDifference(got.data, wanted.data)).toBeLessThan(4e-3 * size);
    });

    it('exports to PEFT with the same delta, or says why it cannot', () => {
      const tensors = trained();
      for (const rank of test.ranks) {
        const pair = family.toPeft(site, tensors, rank);
        if (typeof pair === 'string') {
          expect(test.export).toBeInstanceOf(RegExp);
          expect(pair).toMatch(test.export as RegExp);
          continue;
        }
        expect(test.export, `a pair of rank ${rank}`).toBe(true);
        const got = peftDelta(pair, site, inputs);
        expect(largestDifference(got.data, at(tensors, inputs, rank).data)).toBeLessThan(1e-10);
      }
    });

    it('takes a LoRA as its own numbers, or says why it cannot', () => {
      const random = createRandom(8n);
      const rank = test.ranks.at(-1)!;
      const lora: LoraModule = {
        rank,
        in: site.in,
        out: site.out,
        a: normalColumns(random, rank, site.in).data,
        b: normalColumns(random, site.out, rank).data,
        scale: 0.75,
      };
      const tensors = family.fromPeft(site, lora);
      if (typeof tensors === 'string') {
        expect(tensors).toMatch(test.import as RegExp);
        return;
      }
      expect(test.import).toBe(true);
      checkTensors(family, site, tensors);
      if (family.route !== null) return; // The same numbers under another f: not the LoRA's function.
      const wanted = peftDelta({ ...lora, alpha: 0.75 * rank, rslora: false }, site, inputs);
      const got = at(tensors, inputs, null);
      expect(largestDifference(got.data, wanted.data)).toBeLessThan(1e-10);
    });

    it('says exactly what it is, how many numbers it trains and what it takes', () => {
      const tensors = trained();
      expect(family.describe).toBe(test.describe);
      expect(parameterCount(family, tensors)).toBe(test.parameters);
      expect(bytesOf(family.serve(site, tensors))).toBe(test.bytes);
      expect(adapterKinds).toContain(family.kind);
    });

    it('refuses tensors that are missing, strange, misshapen or not finite', () => {
      const tensors = trained();
      const names = Object.keys(family.axes);
      for (const name of names) {
        const tensor = tensors[name]!;
        const { [name]: _, ...missing } = tensors;
        const longer = {
          ...tensor,
          rows: tensor.rows + 1,
          data: new Float64Array(tensor.columns * (tensor.rows + 1)),
        };
        const bad = { ...tensor, data: tensor.data.map((v, i) => (i === 0 ? Number.NaN : v)) };
        for (const broken of [missing, { ...tensors, [name]: bad }]) {
          expect(() => checkTensors(family, site, broken)).toThrow(name);
        }
        // A length that no other tensor has to agree with is free.
        const axis = family.axes[name]![1];
        const isFree =
          typeof axis === 'string' &&
          !['in', 'out'].includes(axis) &&
          Object.values(family.axes)
            .flat()
            .filter((other) => other === axis).length === 1;
        if (isFree) continue;
        const stretched = (): void => checkTensors(family, site, { ...tensors, [name]: longer });
        expect(stretched).toThrow(/want \[/);
      }
      const strange = { ...tensors, lora_magnitude: tensors[names[0]!]! };
      expect(() => checkTensors(family, site, strange)).toThrow('unknown tensor "lora_magnitude"');
    });
  });
}

/** Gates and biases are stored in f32; here they are given numbers that fit. */
function storable(tensors: Tensors): Tensors {
  const rounded = (x: Columns): Columns => ({ ...x, data: x.data.map(Math.fround) });
  return Object.fromEntries(Object.entries(tensors).map(([name, x]) => [name, rounded(x)]));
}

/** y of a served module as the kernels read it: y = B·f(gates ⊙ A·x). */
function deltaOf(test: FamilyCase, tensors: Tensors, served: ServedModule, x: Columns): Columns {
  const { rank, in: width, out, gates } = served;
  const own = { a: served.a, b: served.b };
  const { a, b } = { ...test.factors?.(served), ...withoutNull(own) } as {
    a: Float64Array;
    b: Float64Array;
  };
  const h = transposedTimes({ rows: width, columns: rank, data: a }, x);
  const gated = { ...h, data: h.data.map((value, i) => value * (gates?.[i % rank] ?? 1)) };
  const g = test.transform?.(gated, x, tensors, served) ?? gated;
  return times({ rows: out, columns: rank, data: b }, g);
}

function withoutNull(factors: Record<string, Float64Array | null>): object {
  return Object.fromEntries(Object.entries(factors).filter(([, value]) => value !== null));
}

function packedFile({ family, site, packed }: FamilyCase, served: ServedModule): PackedAdapter {
  const packer = createPacker();
  packer.add(served);
  const manifest = {
    format: 'rankgate-adapter/3',
    kind: family.kind,
    describe: family.describe,
    baseHash: 'ab'.repeat(32),
    rankMax: served.rank,
    rankCurve: Array.from({ length: served.rank }, (_, i) => (i + 1) / served.rank),
    levels: null,
    options: { ...noOptions, ...family.options, ...packed?.options },
    source: { format: 'rankgate', by: `families.suite.ts at block ${site.block}`, from: [] },
  } as const;
  const { bytes } = packer.finish(manifest, packed?.floats);
  return openPacked(bytes, generationOf(bytes));
}

function unpacked({ floats, page }: PackedAdapter, served: ServedModule): ServedModule {
  const { rank } = served;
  const rows = (side: 'a' | 'b', width: number): Float64Array | null => {
    if (page(served, 0) === null) return null;
    const values = new Float64Array(rank * width);
    for (let i = 0; i < values.length; i++) {
      const r = Math.floor(i / width);
      const halves = page(served, Math.floor(r / 8))![side];
      values[i] = f16Values[halves[(r % 8) * width + (i % width)]!]!;
    }
    return values;
  };
  const gates = floats.get('gates')?.values ?? null;
  const bias = served.bias === null ? null : floats.get('bias')!.values;
  return { ...served, a: rows('a', served.in), b: rows('b', served.out), gates, bias };
}

/** What PEFT adds: B·A·x times alpha/r, or alpha/√r. */
function peftDelta(
  { rank, alpha, rslora, a, b }: PeftPair,
  site: Pick<Site, 'in' | 'out'>,
  x: Columns,
): Columns {
  const scale = alpha / (rslora ? Math.sqrt(rank) : rank);
  const h = transposedTimes({ rows: site.in, columns: rank, data: a }, x);
  const rankMajor = transpose({ rows: rank, columns: site.out, data: b });
  return times(rankMajor, { ...h, data: h.data.map((value) => value * scale) });
}
