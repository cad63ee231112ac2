// Queryable LoRA (arXiv 2605.08423), design `queryable/1` of algorithms.md section 6: y += (α/r)·B·M·(A·x) with M = Σ π_k·M_k, a
// convex mix of r×r atoms that all adapters of a base share. π comes from the token's own low-rank state h = A·x of a
// block's first module and from earlier blocks' summaries s_j = M_j·h_j of the same token: prefill and decode agree.

import { noOptions } from '../adapter.ts';
import type { Columns } from '../orthogonal.ts';
import { servedPair } from '../served.ts';
import { mixAtoms, type Router, routeAtoms, softmaxTop } from './atom-routing.ts';
import { constantGates, type Family, refuse, type Site, type Tensors } from './family.ts';
import {
  added,
  beside,
  filled,
  scaled,
  times,
  transposedTimes,
  uniform,
  zeros,
} from './matrices.ts';
import type { Random } from './seeded-random.ts';

export interface QueryableOptions {
  readonly rank: number;
  readonly alpha: number;
  /** K. */
  readonly atoms: number;
  /** dq. */
  readonly queryWidth: number;
  /** Atoms that are mixed for a token. */
  readonly topK: number;
  /** Whether there are earlier blocks to look at: W_s and W_c exist. */
  readonly earlierBlocks: boolean;
  /** [K], added to the logits: the instruction and its prior. */
  readonly bias: readonly number[] | null;
}

/** A block of one module: `route` has no earlier summaries. Blocks are composed of the functions above. */
export function queryable(options: QueryableOptions): Family {
  const { rank, alpha, atoms, queryWidth, topK, earlierBlocks } = options;
  const scale = alpha / rank;
  const depth = { summary: [rank, rank], context: [queryWidth, rank] } as const;
  return {
    kind: 'queryable',
    describe: `Queryable LoRA of rank ${rank}, alpha ${alpha}: ${topK} of ${atoms} shared atoms a token`,
    options: { ...noOptions, topK },
    slicing: 'whole',
    axes: {
      a: [rank, 'in'],
      b: [rank, 'out'],
      keys: [atoms, queryWidth],
      atoms: ['atoms', rank],
      query: [queryWidth, rank],
      ...(earlierBlocks ? depth : {}),
    },
    trained: ['a', 'b', 'keys', 'atoms', 'query', ...(earlierBlocks ? ['summary', 'context'] : [])],
    init(site: Site, random) {
      const bank = initialBank(options, random);
      return {
        a: filled(rank, site.in, uniform(1 / Math.sqrt(site.in), random)),
        b: zeros(rank, site.out),
        keys: filled(atoms, queryWidth, () => random.normal()),
        ...bank,
      };
    },
    pair(_site, { a, b }) {
      // α/r is B's: the routing query looks at h itself.
      const pair = constantGates(a!, scaled(b!, scale), 1);
      return { ...pair, gradient: (d) => ({ a: d.a, b: scaled(d.b, scale) }) };
    },
    route({ h, tensors }) {
      const found = routeAtoms(h, [], routerOf(tensors, options));
      const mix = mixAtoms(h, tensors.atoms!, found.weights);
      return {
        g: mix.g,
        gradient(dg) {
          const mixed = mix.gradient(dg);
          const routed = found.gradient(mixed.weights);
          return {
            dh: added(mixed.dh, routed.dh),
            tensors: { ...routed.tensors, atoms: mixed.atoms },
          };
        },
      };
    },
    serve: (site, { a, b }) => servedPair(site, { rank, a: a!.data, b: scaled(b!, scale).data }),
    toPeft: () =>
      'every token mixes the atoms anew; frozen weights are a LoRA with A = M·A (frozenAtoms)',
    fromPeft: () => 'a LoRA has no keys, and its ranks were not trained for the bank',
  };
}

export function routerOf(tensors: Tensors, { bias, topK }: QueryableOptions): Router {
  const { keys, query, summary, context, atoms } = tensors;
  if (atoms!.columns % atoms!.rows !== 0 || keys!.columns > atoms!.columns / atoms!.rows) {
    const shape = `${atoms!.columns} rows of ${atoms!.rows}`;
    refuse('queryable:', `atoms are ${shape}, and there are ${keys!.columns} keys`);
  }
  return {
    keys: keys!,
    query: query!,
    summary: summary ?? null,
    context: context ?? null,
    bias,
    topK,
  };
}

/** Atoms I + 0.3·N(0,1), and routers of unit-variance outputs for unit-variance states. */
function initialBank(options: QueryableOptions, random: Random): Tensors {
  const { rank, atoms, queryWidth, earlierBlocks } = options;
  const matrix = (count: number): Columns =>
    filled(count, rank, () => random.normal() / Math.sqrt(rank));
  const bank = { atoms: newAtoms(rank, atoms, random), query: matrix(queryWidth) };
  return earlierBlocks ? { ...bank, summary: matrix(rank), context: matrix(queryWidth) } : bank;
}

function newAtoms(rank: number, count: number, random: Random): Columns {
  const result = filled(count * rank, rank, () => 0.3 * random.normal());
  for (let i = 0; i < count * rank; i++) result.data[i * rank + (i % rank)]! += 1;
  return result;
}

/** The bank with `count` atoms more. Nothing that was there changes, nor does an adapter that has no keys for them. */
export function withMoreAtoms(bank: Tensors, count: number, random: Random): Tensors {
  const { atoms } = bank;
  return { ...bank, atoms: beside(atoms!, newAtoms(atoms!.rows, count, random)) };
}

/** p over atoms: softmax(⟨e, τ_k⟩/T) of the instruction's embedding with the labels' [de, K]. */
export function instructionPrior(
  instruction: Float64Array,
  labels: Columns,
  temperature: number,
): Float64Array {
  const e = { rows: labels.rows, columns: 1, data: instruction };
  return softmaxTop(scaled(transposedTimes(labels, e), 1 / temperature), labels.columns).data;
}

/** λ·log p: what a prior adds to the logits; nothing at λ = 0. */
export function priorBias(p: Float64Array, strength: number): number[] {
  return Array.from(p, (value) => (strength === 0 ? 0 : strength * Math.log(value)));
}

/** A of the LoRA that the adapter is when π is held at `weights` [K]: M·A. */
export function frozenAtoms({ a, atoms }: Tensors, weights: Float64Array): Columns {
  const r = atoms!.rows;
  const mixed = zeros(r, r);
  weights.forEach((weight, k) => {
    for (let i = 0; i < r * r; i++) mixed.data[i]! += weight * atoms!.data[k * r * r + i]!;
  });
  return times(a!, mixed); // Column i: Σ_j M_ij·a_j.
}
