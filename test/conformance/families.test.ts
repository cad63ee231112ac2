import type { Generation } from '../../src/adapters/adapter.ts';
import { mixAtoms, routeAtoms } from '../../src/adapters/families/atom-routing.ts';
import { flexmore } from '../../src/adapters/families/flexmore.ts';
import { fly, keepTop, sparseA } from '../../src/adapters/families/fly.ts';
import { hydra } from '../../src/adapters/families/hydra.ts';
import { lora } from '../../src/adapters/families/lora.ts';
import { matryoshka } from '../../src/adapters/families/matryoshka.ts';
import { mora, moraWeights } from '../../src/adapters/families/mora.ts';
import { queryable, routerOf } from '../../src/adapters/families/queryable.ts';
import { salt } from '../../src/adapters/families/salt.ts';
import { svfit, svfitBasis } from '../../src/adapters/families/svfit.ts';
import { triangular } from '../../src/adapters/families/triangular.ts';
import { testSite } from '../support/family-site.ts';
import { type FamilyCase, familySuite } from './families.suite.ts';

const site = testSite(); // 12 → 10
const pair = { site, export: true } as const;

const rankSix = { ...pair, ranks: [1, 2, 4, 6], bytes: 2 * 6 * 22, parameters: 6 * 22 };

const otherFile: Generation = `sha256:${'cd'.repeat(32)}`;
const queryableOptions = {
  rank: 4,
  alpha: 8,
  atoms: 5,
  queryWidth: 3,
  topK: 2,
  earlierBlocks: false,
  bias: null,
};
const flyOptions = { rank: 8, topK: 3, alpha: 16, seed: 0xfedcba9876543210n };

const cases: readonly FamilyCase[] = [
  {
    ...rankSix,
    name: 'lora',
    family: lora({ rank: 6, alpha: 12, rslora: false, order: 'svd' }),
    describe: 'LoRA of rank 6, alpha 12',
    import: true,
  },
  {
    ...rankSix,
    name: 'lora (rsLoRA, as trained)',
    family: lora({ rank: 6, alpha: 9, rslora: true, order: 'as-trained' }),
    describe: 'LoRA of rank 6, alpha 9 (rsLoRA)',
    import: true,
  },
  ...(['none', 'rank', 'sqrt'] as const).map((scaling) => ({
    ...rankSix,
    name: `matryoshka (diag, ${scaling})`,
    family: matryoshka({ maxRank: 6, ranks: [1, 2, 4, 6], scaling, mask: 'diag', order: 'svd' }),
    describe: `Matryoshka LoRA trained at ranks 1, 2, 4, 6 (diag, scale ${scaling}), published svd`,
    import: /ranks it was trained at/,
  })),
  {
    ...rankSix,
    name: 'matryoshka (binary)',
    family: matryoshka({
      maxRank: 6,
      ranks: [1, 6],
      mask: 'binary',
      scaling: 'none',
      order: 'svd',
    }),
    describe: 'Matryoshka LoRA trained at ranks 1, 6 (binary, scale none), published svd',
    import: /ranks it was trained at/,
  },
  {
    ...rankSix,
    name: 'matryoshka (prefixes, as trained)',
    family: matryoshka({
      maxRank: 6,
      ranks: [2, 6],
      mask: 'prefix',
      order: 'as-trained',
      scaling: 'none',
    }),
    describe: 'Matryoshka LoRA trained at ranks 2, 6 (prefix, scale none), published as-trained',
    import: /ranks it was trained at/,
  },
  {
    ...pair,
    name: 'triangular',
    family: triangular({ rank: 6, alpha: 12 }),
    ranks: [1, 3, 6],
    describe: 'TriAdaptLoRA from rank 6, alpha 12',
    bytes: 2 * 6 * 22,
    parameters: 6 * 22 + 36,
    import: true,
  },
  {
    ...pair,
    name: 'hydra',
    family: hydra({ rank: 4, alpha: 8 }),
    ranks: [1, 2, 4],
    describe: "Hydra: rank 4 beside and rank 4 after the base's layer, alpha 8",
    bytes: 2 * 8 * 22,
    parameters: 4 * (12 + 3 * 10),
    import: true,
  },
  {
    ...pair,
    name: 'flexmore',
    family: flexmore({
      experts: [
        { name: 'law', rank: 4 },
        { name: 'code', rank: 1 },
        { name: 'full', rank: 64 },
      ],
    }),
    // 4 + 1 + 10 ranks; of 15 directions the module has 10.
    ranks: [1, 3, 5, 9],
    describe: 'FlexMoRE: 3 experts: law (rank 4), code (rank 1), full (rank 64)',
    bytes: 2 * 10 * 22,
    parameters: 15 * 22 + 3,
    import: /one LoRA is one expert, and this mixes 3/,
  },
  {
    ...pair,
    name: 'salt',
    family: salt({ rank: 4, tailRank: 2 }),
    ranks: [1, 2, 4],
    describe: 'SALT: the 4 largest singular values scaled and shifted, the rest by rank 2',
    bytes: 2 * 6 * 22,
    parameters: 2 * 4 + 2 * (6 + 6),
    import: /directions are its own/,
  },
  {
    ...pair,
    name: 'svfit',
    family: svfit({ rank: 6 }),
    ranks: [1, 2, 6],
    describe: 'SVFit of the 6 largest singular values',
    bytes: 4 * 6,
    parameters: 6,
    import: /directions are its own/,
    factors: ({ rank }) => svfitBasis(site, rank) as { a: Float64Array; b: Float64Array },
    packed: { options: { needs: otherFile }, floats: new Map() }, // A and B are in the basis's file.
  },
  {
    ...pair,
    name: 'fly',
    family: fly({ ...flyOptions, score: 'abs_plus_bias' }),
    ranks: [1, 3, 5],
    describe:
      'FlyLoRA: 3 of 8 ranks a token by abs_plus_bias, alpha 16, A from seed fedcba9876543210',
    bytes: 2 * 8 * 10 + 4 * 8,
    parameters: 80,
    export: /only all of them are a LoRA/,
    import: /made from a seed/,
    factors: () => ({ a: sparse, b: sparse }),
    transform: (h, _x, _tensors, { bias }) =>
      keepTop(h, Float64Array.from(bias!), 'abs_plus_bias', [{ first: 0, count: 8, topK: 3 }]).g,
  },
  {
    ...pair,
    name: 'mora',
    family: mora({ rank: 8, topK: 3, temperature: 0.3, frozen: 0 }),
    ranks: [1, 3, 8],
    describe: 'MoRA: 3 of the ranks a token, temperature 0.3, the first 0 frozen',
    bytes: 2 * 8 * 22,
    parameters: 8 * 22,
    export: /weights its ranks by its own scores/,
    import: true,
    transform(h, x, _tensors, { a }) {
      const factor = { rows: 12, columns: 8, data: a! };
      const { weights } = moraWeights({ h, x, a: factor }, { topK: 3, temperature: 0.3 });
      return { ...h, data: h.data.map((value, i) => value * weights.data[i]!) };
    },
  },
  {
    ...pair,
    name: 'queryable',
    family: queryable(queryableOptions),
    ranks: [4],
    describe: 'Queryable LoRA of rank 4, alpha 8: 2 of 5 shared atoms a token',
    bytes: 2 * 4 * 22,
    parameters: 4 * 22 + 5 * 3 + 5 * 16 + 3 * 4,
    export: /mixes the atoms anew/,
    import: /has no keys/,
    transform(h, _x, tensors) {
      const { weights } = routeAtoms(h, [], routerOf(tensors, queryableOptions));
      return mixAtoms(h, tensors.atoms!, weights).g;
    },
    packed: {
      options: { needs: otherFile, labels: ['a', 'b', 'c', 'd', 'e'] },
      floats: new Map([
        ['keys', { shape: [5, 3], values: new Float32Array(15) }],
        ['labels', { shape: [5, 2], values: new Float32Array(10) }],
      ] as const),
    },
  },
];

const sparse = sparseA({ seed: 0xfedcba9876543210n, module: 0, rank: 8, in: 12, topK: 3 });

for (const test of cases) familySuite(test);
