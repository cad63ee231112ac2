// How a queryable adapter's atoms are chosen and mixed (arXiv 2605.08423; algorithms.md section 6), with gradients. π comes from
// the token's own low-rank state h = A·x of a block's first module and from earlier blocks' summaries s_j = M_j·h_j of the
// same token, never from another token: prefill and decode agree.

import { type Columns, multiplyTransposed } from '../orthogonal.ts';
import type { Tensors } from './family.ts';
import { added, beside, columnsOf, scaled, times, transposedTimes, zeros } from './matrices.ts';

/** Keys are the adapter's; W_q, W_s and W_c the bank's, each with row i as column i. Keys may be fewer than atoms: those
 *  added later are not for this adapter. */
export interface Router {
  readonly keys: Columns; // [dq, K]
  readonly query: Columns; // [r, dq]
  readonly summary: Columns | null; // [r, r]
  readonly context: Columns | null; // [r, dq]
  readonly bias: readonly number[] | null;
  readonly topK: number;
}

export interface AtomRoute {
  readonly weights: Columns; // π [K, T]
  gradient(dWeights: Columns): {
    readonly dh: Columns;
    readonly earlier: readonly Columns[];
    readonly tensors: Tensors;
  };
}

/** π for h [r, T] and the summaries [r, T] of earlier blocks. */
export function routeAtoms(h: Columns, earlier: readonly Columns[], router: Router): AtomRoute {
  const { keys, query, context, bias, topK } = router;
  const root = Math.sqrt(keys.rows);
  const depth =
    router.summary === null || context === null ? null : attendDepth(h, earlier, router);
  const own = transposedTimes(query, h); // [dq, T]
  const q = depth === null ? own : added(own, transposedTimes(context!, depth.c));
  const logits = scaled(transposedTimes(keys, q), 1 / root); // [K, T]
  for (let i = 0; bias !== null && i < logits.data.length; i++) {
    logits.data[i]! += bias[i % keys.columns]!;
  }
  const weights = softmaxTop(logits, topK);
  return {
    weights,
    gradient(dWeights) {
      const dLogits = scaled(softmaxGradient(weights, dWeights), 1 / root); // [K, T]
      const dq = times(keys, dLogits); // [dq, T]
      const tensors = { keys: multiplyTransposed(q, dLogits), query: multiplyTransposed(h, dq) };
      const dh = times(query, dq);
      if (depth === null)
        return { dh, earlier: earlier.map((s) => zeros(s.columns, s.rows)), tensors };
      const back = depth.gradient(times(context!, dq));
      return {
        dh: added(dh, back.dh),
        earlier: back.earlier,
        tensors: { ...tensors, context: multiplyTransposed(depth.c, dq), summary: back.summary },
      };
    },
  };
}

interface Depth {
  readonly c: Columns; // [r, T]
  gradient(dc: Columns): { dh: Columns; earlier: Columns[]; summary: Columns };
}

/** c = Σ_j softmax_j(⟨W_s·h, s_j⟩/√dq)·s_j; 0 for the first block. */
function attendDepth(h: Columns, earlier: readonly Columns[], { keys, summary }: Router): Depth {
  const root = Math.sqrt(keys.rows);
  const [T, J, r] = [h.columns, earlier.length, h.rows];
  const e = transposedTimes(summary!, h); // [r, T]
  const logits = zeros(T, J);
  const inner = (x: Columns, y: Columns, t: number): number => {
    let total = 0;
    for (let i = t * r; i < (t + 1) * r; i++) total += x.data[i]! * y.data[i]!;
    return total;
  };
  earlier.forEach((s, j) => {
    for (let t = 0; t < T; t++) logits.data[t * J + j] = inner(e, s, t) / root;
  });
  const p = softmaxTop(logits, J); // [J, T]
  /** Σ_j of factor_jt · columns of what. */
  const mixed = (factors: Columns, what: readonly Columns[]): Columns => {
    const result = zeros(T, r);
    what.forEach((s, j) => {
      s.data.forEach((value, i) => {
        result.data[i]! += factors.data[Math.floor(i / r) * J + j]! * value;
      });
    });
    return result;
  };
  return {
    c: mixed(p, earlier),
    gradient(dc) {
      const dp = zeros(T, J);
      earlier.forEach((s, j) => {
        for (let t = 0; t < T; t++) dp.data[t * J + j] = inner(dc, s, t);
      });
      const dLogits = scaled(softmaxGradient(p, dp), 1 / root); // [J, T]
      const de = mixed(dLogits, earlier);
      const back = earlier.map((s, j) => ({
        ...s,
        data: s.data.map((_, i) => {
          const at = Math.floor(i / r) * J + j;
          return p.data[at]! * dc.data[i]! + dLogits.data[at]! * e.data[i]!;
        }),
      }));
      return { dh: times(summary!, de), earlier: back, summary: multiplyTransposed(h, de) };
    },
  };
}

/** Per column: softmax over its k largest entries (of equal ones the first), 0 elsewhere. */
export function softmaxTop(logits: Columns, k: number): Columns {
  const { rows, columns } = logits;
  const result = zeros(columns, rows);
  for (let t = 0; t < columns; t++) {
    const column = logits.data.subarray(t * rows, (t + 1) * rows);
    const order = Array.from(column.keys()).sort((i, j) => column[j]! - column[i]! || i - j);
    const kept = order.slice(0, k);
    const masses = kept.map((i) => Math.exp(column[i]! - column[kept[0]!]!));
    const total = masses.reduce((sum, mass) => sum + mass, 0);
    kept.forEach((i, n) => {
      result.data[t * rows + i] = masses[n]! / total;
    });
  }
  return result;
}

function softmaxGradient({ rows, columns, data }: Columns, d: Columns): Columns {
  const result = zeros(columns, rows);
  for (let t = 0; t < columns; t++) {
    let mean = 0;
    for (let i = t * rows; i < (t + 1) * rows; i++) mean += data[i]! * d.data[i]!;
    for (let i = t * rows; i < (t + 1) * rows; i++) result.data[i] = data[i]! * (d.data[i]! - mean);
  }
  return result;
}

export interface Mix {
  readonly g: Columns; // [r, T]
  gradient(dg: Columns): { dh: Columns; weights: Columns; atoms: Columns };
}

/** g = Σ π_k·M_k·h. Column k·r+i of `atoms` is row i of M_k: a file's [K, r, r]. */
export function mixAtoms(h: Columns, atoms: Columns, weights: Columns): Mix {
  const { rows: r, columns: T } = h;
  const K = weights.rows;
  const images = Array.from({ length: K }, (_, k) =>
    transposedTimes(columnsOf(atoms, k * r, r), h),
  );
  const weighted = (k: number, x: Columns): Columns => ({
    ...x,
    data: x.data.map((value, i) => weights.data[Math.floor(i / r) * K + k]! * value),
  });
  const sum = (parts: readonly Columns[]): Columns => parts.reduce(added, zeros(T, r));
  return {
    g: sum(images.map((image, k) => weighted(k, image))),
    gradient(dg) {
      const dWeights = zeros(T, K);
      images.forEach((image, k) => {
        image.data.forEach((value, i) => {
          dWeights.data[Math.floor(i / r) * K + k]! += dg.data[i]! * value;
        });
      });
      const back = images.map((_, k) => weighted(k, dg)); // [r, T]
      const unused = zeros(atoms.columns - K * r, r);
      return {
        dh: sum(back.map((d, k) => times(columnsOf(atoms, k * r, r), d))),
        weights: dWeights,
        atoms: back
          .map((d) => multiplyTransposed(h, d))
          .reduceRight((all, d) => beside(d, all), unused),
      };
    },
  };
}
