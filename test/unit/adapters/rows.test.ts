import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { openPacked } from '../../../src/adapters/pack.ts';
import { composeRows, createRowMaker, type RowsSource } from '../../../src/adapters/rows.ts';
import { moduleIndex } from '../../../src/model/decoder-config.ts';
import type { AdapterRows } from '../../../src/model/stepper.ts';
import { type MadeOptions, makePacked, tinyModules } from '../../support/make-packed.ts';
import { createRng } from '../../support/random.ts';

const moduleCount = 14;

/** Its pages are numbered from `firstPage` on; the same object for a rank, as residency gives it. */
function source(made: MadeOptions, firstPage = 1): RowsSource {
  const file = makePacked(made);
  const bank = made.kind === 'queryable' ? { K: made.atoms ?? 3, dq: 4 } : null;
  const maker = createRowMaker(openPacked(file.bytes, file.generation), 2, bank);
  const known = new Map<number, AdapterRows>();
  return {
    moduleCount,
    rows(rank) {
      const pages = Array.from({ length: maker.pagesFor(rank) }, (_, i) => firstPage + i);
      const rows = known.get(rank) ?? maker.make(rank, pages);
      known.set(rank, rows);
      return rows;
    },
  };
}

/** The equation of design.md section 3 for one module: what each rank's h is before B, by page. `norm` = ‖x‖. */
function apply(
  rows: AdapterRows,
  module: number,
  hOf: (page: number, lane: number) => number,
  norm: number,
) {
  const width = 8 * rows.pages.length;
  const h = Float64Array.from({ length: width }, (_, i) => {
    const gate =
      rows.gates === null ? (i < rows.rank ? rows.scale : 0) : rows.gates[module * width + i]!;
    return gate * hOf(rows.pages[Math.floor(i / 8)]!, i % 8);
  });
  const result = h.slice();
  for (const { firstPage, pages, topK, temperature } of rows.routing?.groups ?? []) {
    const bias = (i: number): number => rows.routing!.bias[module * width + i]!;
    const score = (i: number): number =>
      temperature === 0 ? Math.abs(h[i]!) + bias(i) : (Math.abs(h[i]!) * bias(i)) / norm;
    const all = Array.from({ length: 8 * pages }, (_, i) => 8 * firstPage + i);
    const kept = [...all].sort((i, j) => score(j) - score(i) || i - j).slice(0, topK);
    const exp = (i: number): number => (temperature === 0 ? 1 : Math.exp(score(i) / temperature));
    const total = temperature === 0 ? 1 : kept.reduce((sum, i) => sum + exp(i), 0);
    for (const i of all) result[i] = kept.includes(i) ? (h[i]! * exp(i)) / total : 0;
  }
  return new Map(
    Array.from(result, (value, i) => [`${rows.pages[Math.floor(i / 8)]}.${i % 8}`, value]),
  );
}

describe('rows of a rank', () => {
  it('are plain where every module has the first ranks', () => {
    const { rows } = source({ kind: 'lora', rank: 20, seed: 1 });
    expect(rows(9)).toMatchObject({ pages: [1, 2], rank: 9, scale: 1, gates: null, routing: null });
    expect(rows(20)).toMatchObject({ pages: [1, 2, 3], rank: 20, gates: null });
  });

  it('follow the levels: a prefix of its own in each module, and plain where that is uniform', () => {
    const modules = tinyModules.slice(5, 7);
    const levels = [
      [1, 1, 1, 1, 1, 1, 1, 1, 2, 3],
      [3, 3, 3, 4, 5, 6, 7, 8, 9, 10],
    ];
    const { rows } = source({ kind: 'lora', rank: 10, seed: 2, modules, levels });
    const on = (rank: number, module: number): number[] => {
      const { gates, pages } = rows(rank);
      const width = 8 * pages.length;
      return [...gates!.subarray(module * width, (module + 1) * width)];
    };
    expect(rows(1)).toMatchObject({ pages: [1], rank: 1 });
    expect(on(1, 5)).toEqual(Array(8).fill(1));
    expect(on(1, 6)).toEqual(Array(8).fill(0));
    expect(on(1, 0)).toEqual(Array(8).fill(0));
    expect(rows(3).pages).toEqual([1, 2]);
    expect(on(3, 5)).toEqual([...Array(10).fill(1), ...Array(6).fill(0)]);
    expect(on(3, 6)).toEqual([1, 1, 1, ...Array(13).fill(0)]);
    expect(rows(10)).toMatchObject({ gates: null, rank: 10 });
  });

  it('let a fly or mora adapter keep k, its own number at most, of its own ranks', () => {
    for (const kind of ['fly', 'mora'] as const) {
      const { rows } = source({ kind, rank: 12, seed: 3 });
      expect(rows(2).routing?.groups).toMatchObject([{ firstPage: 0, pages: 2, topK: 2 }]);
      const { pages, rank, gates, routing } = rows(12);
      expect({ pages, rank, gates }).toEqual({ pages: [1, 2], rank: 12, gates: null });
      expect(routing!.groups[0]).toMatchObject({ topK: 3, temperature: kind === 'fly' ? 0 : 0.1 });
      const kept = apply(rows(12), 0, () => 1e-3, 1);
      expect([...kept.values()].filter((value) => value !== 0)).toHaveLength(3);
      for (const lane of [4, 5, 6, 7]) expect(kept.get(`2.${lane}`)).toBe(0); // The last page's padding.
    }
  });
});

describe('composeRows', () => {
  const parts: readonly RowsSource[] = [
    source({ kind: 'lora', rank: 20, seed: 4 }, 1),
    source({ kind: 'fly', rank: 12, seed: 5 }, 10),
    source({ kind: 'mora', rank: 16, seed: 6 }, 20),
    source({ kind: 'svfit', rank: 12, seed: 7 }, 30),
    source({ kind: 'lora', rank: 8, seed: 8, modules: tinyModules.slice(2, 4) }, 40),
  ];

  it('is the sum of the parts, each times its weight', () => {
    const weight = fc.constantFrom(1, -1, 0.5, 2, -0.25, 16, 0);
    const chosen = fc.uniqueArray(fc.nat(4), { minLength: 1, maxLength: 5 });
    fc.assert(
      fc.property(
        chosen,
        fc.array(weight, { minLength: 5, maxLength: 5 }),
        fc.integer({ min: 1, max: 8 }),
        fc.nat(1e6),
        (which, weights, rank, seed) => {
          const rng = createRng(seed);
          const numbers = new Map<string, number>();
          const hOf = (page: number, lane: number): number => {
            const key = `${page}.${lane}`;
            if (!numbers.has(key)) numbers.set(key, 4 * rng.next() - 2);
            return numbers.get(key)!;
          };
          const whole = composeRows(
            which.map((i) => ({ use: parts[i]!, rank, weight: weights[i]! })),
          );
          for (let module = 0; module < moduleCount; module++) {
            const got = apply(whole, module, hOf, 3);
            for (const i of which) {
              for (const [key, value] of apply(parts[i]!.rows(rank), module, hOf, 3)) {
                expect(got.get(key)! - weights[i]! * value).toBeCloseTo(0, 5);
              }
            }
          }
        },
      ),
      { numRuns: 100 },
    );
  });

  it('keeps a group for each part, at its own pages', () => {
    const flies = [
      source({ kind: 'fly', rank: 16, seed: 1 }, 3),
      source({ kind: 'fly', rank: 8, seed: 2 }, 7),
    ];
    const give = (flyTopK: number | null) =>
      composeRows(
        [parts[0]!, ...flies].map((use) => ({ use, rank: 8, weight: 1 })),
        { flyTopK, atomBias: null },
      );
    expect(give(null).pages).toEqual([1, 3, 4, 7]);
    expect(give(null).routing?.groups).toEqual([
      { firstPage: 1, pages: 2, topK: 4, temperature: 0 },
      { firstPage: 3, pages: 1, topK: 2, temperature: 0 },
    ]);
    expect(give(12).routing?.groups.map(({ topK }) => topK)).toEqual([12, 8]);
    expect(give(null).rank).toBe(8 + 16 + 8);
  });

  it('gives one part as it is, and the same object for the same use', () => {
    const [one, two] = [parts[0]!, parts[1]!];
    const part = (use: RowsSource, rank: number, weight = 1) => ({ use, rank, weight });
    expect(composeRows([part(one, 8)])).toBe(one.rows(8));
    expect(composeRows([part(one, 8, 0.5)])).toMatchObject({ pages: [1], scale: 0.5, gates: null });
    const blend = composeRows([part(one, 8), part(two, 4)]);
    expect(composeRows([part(one, 8), part(two, 4)])).toBe(blend);
    expect(composeRows([part(one, 9), part(two, 4)])).not.toBe(blend);
    expect(composeRows([part(one, 8), part(two, 4, 2)])).not.toBe(blend);
    expect(composeRows([part(two, 4), part(one, 8)])).not.toBe(blend);
    expect(composeRows([part(one, 8), part(two, 4)], { flyTopK: 1, atomBias: null })).not.toBe(
      blend,
    );
  });

  it('puts a queryable part first, adds the prior to its atoms, and has it once and unweighted', () => {
    const query = source({ kind: 'queryable', rank: 8, seed: 9, atoms: 3 }, 50);
    const part = (use: RowsSource, weight = 1) => ({ use, rank: 8, weight });
    const bias = { flyTopK: null, atomBias: [1, 2, 3] };
    const rows = composeRows([part(parts[0]!), part(query)], bias);
    expect(rows.pages).toEqual([50, 1]);
    expect([...rows.atoms!.bias]).toEqual([1, 2, 3]);
    expect(rows.atoms!.keys).toBe(query.rows(8).atoms!.keys);
    expect(query.rows(8).atoms!.bias.every((value) => value === 0)).toBe(true);
    const isRefused = expect.objectContaining({ code: 'UNSUPPORTED' });
    expect(() => composeRows([part(query), part(query)])).toThrow(isRefused);
    expect(() => composeRows([part(parts[0]!), part(query, 0.5)])).toThrow(isRefused);
  });

  it('refuses more ranks than a row may have', () => {
    const wide = [1, 2, 3].map((i) => ({
      use: source({ kind: 'lora', rank: 96, seed: i }, 100 * i),
      rank: 96,
      weight: 1,
    }));
    expect(() => composeRows(wide)).toThrow('a blend of 288 ranks, at most 256 are served');
    expect(composeRows(wide.map((part) => ({ ...part, rank: 80 }))).pages).toHaveLength(30);
  });

  it('writes a module’s numbers where the module is', () => {
    const narrow = composeRows([
      { use: parts[4]!, rank: 8, weight: 1 },
      { use: parts[3]!, rank: 8, weight: 1 },
    ]);
    const gates = (module: number) => [...narrow.gates!.subarray(module * 16, module * 16 + 16)];
    const third = moduleIndex(0, 'attn_v');
    const svfit = parts[3]!.rows(8).gates!;
    expect(gates(third)).toEqual([
      ...Array(8).fill(1),
      ...svfit.subarray(third * 8, third * 8 + 8),
    ]);
  });
});
