// What a token chooses inside the bottleneck, on plain numbers, for backends that compute it on the host: which of its ranks stay
// (FlyLoRA and MoRA "Little by Little", algorithms.md 28 and 18), and how it mixes shared atoms (Queryable LoRA, 6).
// ggml/native/routing.c does the same. Ranks are compared as f32 so that both make the same choice.

import { mismatch, want } from './check.ts';
import {
  type AtomRouter,
  type AtomUses,
  type RankRouter,
  ranksPerPage,
  type Tensor,
} from './kernels.ts';

/** What native/routing.c has room for: pages of a row; ranks, atoms and numbers of a query; summaries (ggml's sources of a node). */
const pagesMax = 32;
export const routedMax = 256;
export const earlierMax = 6;

type Numbers = Float32Array | Int32Array;
/** A backend's way to the numbers of a tensor. */
type Read = (tensor: Tensor) => Numbers;

/** What one row's use says of its P pages. */
interface RankRules {
  readonly groups: Numbers; // [P]
  readonly temperatures: Numbers; // [P]
  readonly bias: Numbers; // [8P]
}

interface AtomQuery {
  readonly query: Numbers; // [dq, r]
  readonly summary: Numbers; // [r, r]
  readonly context: Numbers; // [dq, r]
  readonly keys: Numbers; // [K, dq]
  readonly bias: Numbers; // [K]
  readonly topK: number;
}

function rowOf(table: Numbers, index: number, size: number): Numbers {
  return table.subarray(index * size, (index + 1) * size);
}

export function checkRouteRanks(x: Tensor, hs: readonly Tensor[], router: RankRouter): number[] {
  const { uses, groups, temperatures, biases } = router;
  const [rows] = x.shape;
  const [count, pages] = groups.shape;
  want('routeRanks x', x, [undefined, undefined]);
  want('routeRanks uses', uses, [rows], 'i32');
  want('routeRanks groups', groups, [undefined, undefined], 'i32');
  want('routeRanks temperatures', temperatures, [count, pages]);
  if (hs.length < 1 || biases.length !== hs.length || pages! > pagesMax) {
    const got = `${biases.length}, ${hs.length}, ${pages}`;
    throw mismatch(
      'routeRanks',
      `a bias for every h and up to ${pagesMax} pages wanted, got ${got}`,
    );
  }
  for (const h of hs) want('routeRanks h', h, [rows, pages! * ranksPerPage]);
  for (const bias of biases) want('routeRanks bias', bias, [count, pages! * ranksPerPage]);
  return [...hs[0]!.shape];
}

export function checkRouteAtoms(
  h: Tensor,
  earlier: readonly Tensor[],
  { query, summary, context }: AtomRouter,
  { uses, keys, bias, topK }: AtomUses,
): number[] {
  const [inner, mixed] = query.shape;
  const [count, atoms] = keys.shape;
  want('routeAtoms h', h, [undefined, undefined]);
  for (const past of earlier) want('routeAtoms earlier', past, h.shape);
  want('routeAtoms query', query, [undefined, undefined]);
  want('routeAtoms summary', summary, [mixed, mixed]);
  want('routeAtoms context', context, [inner, mixed]);
  want('routeAtoms uses', uses, [h.shape[0]], 'i32');
  want('routeAtoms keys', keys, [undefined, undefined, inner]);
  want('routeAtoms bias', bias, [count, atoms]);
  want('routeAtoms topK', topK, [count], 'i32');
  if (mixed! > h.shape[1]! || Math.max(inner!, mixed!, atoms!) > routedMax) {
    const got = `${mixed} ranks, ${inner}, ${atoms}`;
    throw mismatch(
      'routeAtoms',
      `up to ${h.shape[1]} ranks, queries and atoms of ${routedMax} wanted, got ${got}`,
    );
  }
  if (earlier.length > earlierMax) {
    throw mismatch('routeAtoms', `up to ${earlierMax} summaries wanted, got ${earlier.length}`);
  }
  return [h.shape[0]!, 1 + atoms!];
}

/** Ops.routeRanks. */
export function routeRanks(
  read: Read,
  x: Tensor,
  hs: readonly Tensor[],
  { uses, groups, temperatures, biases }: RankRouter,
): Float32Array[] {
  const [inner, pages] = [x.shape[1]!, groups.shape[1]!];
  const ranks = pages * ranksPerPage;
  return hs.map((h, part) => {
    const out = new Float32Array(read(h).length); // [T, 8P]
    read(uses).forEach((use, t) => {
      const rules = {
        groups: rowOf(read(groups), use, pages),
        temperatures: rowOf(read(temperatures), use, pages),
        bias: rowOf(read(biases[part]!), use, ranks),
      };
      const own = rowOf(read(h), t, ranks);
      out.set(routeRow(Float32Array.from(own), rowOf(read(x), t, inner), rules), t * ranks);
    });
    return out;
  });
}

/** Ops.routeAtoms. */
export function routeAtoms(
  read: Read,
  states: { readonly h: Tensor; readonly earlier: readonly Tensor[] },
  { query, summary, context }: AtomRouter,
  { uses, keys, bias, topK }: AtomUses,
): Float32Array {
  const [, atoms, inner] = keys.shape as [number, number, number];
  const [ranks, mixed] = [states.h.shape[1]!, query.shape[1]!];
  const out = new Float32Array(uses.shape[0]! * (1 + atoms)); // [T, 1+K]
  read(uses).forEach((use, t) => {
    const state = (of: Tensor): Numbers => rowOf(read(of), t, ranks).subarray(0, mixed);
    const weights = atomWeights(state(states.h), states.earlier.map(state), {
      query: read(query),
      summary: read(summary),
      context: read(context),
      keys: rowOf(read(keys), use, atoms * inner),
      bias: rowOf(read(bias), use, atoms),
      topK: read(topK)[use]!,
    });
    out.set(weights, t * (1 + atoms));
  });
  return out;
}

/** Whether fewer than `count` come before each: larger scores, and equal ones at lower indices. */
function isAmongLargest(scores: Float32Array, count: number): boolean[] {
  return Array.from(scores, (score, i) => {
    let before = 0;
    for (let j = 0; j < scores.length; j++) {
      if (scores[j]! > score || (scores[j]! === score && j < i)) before += 1;
    }
    return before < count;
  });
}

/** exp of what stays as shares of their sum, 0 elsewhere; `scale` ≥ 0. */
function softmaxOf(scores: Float32Array, stays: readonly boolean[], scale: number): Float64Array {
  const top = scores.reduce((max, score, i) => (stays[i] ? Math.max(max, score) : max), -Infinity);
  const weights = Float64Array.from(scores, (score, i) =>
    stays[i] ? Math.exp((score - top) * scale) : 0,
  );
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return weights.map((weight) => weight / total);
}

/** TrainingOps.softmaxTop of rows of `width` numbers. */
export function softmaxTop(
  x: Float32Array,
  width: number,
  { k, scale }: { readonly k: number; readonly scale: number },
): Float32Array {
  const y = new Float32Array(x.length);
  for (let row = 0; row < x.length; row += width) {
    const scores = x.subarray(row, row + width);
    y.set(softmaxOf(scores, isAmongLargest(scores, k), scale), row);
  }
  return y;
}

/** h [8P] and the input x [K] of one row → what stays of h. */
function routeRow(h: Float32Array, x: Numbers, rules: RankRules): Float32Array {
  const { groups, temperatures, bias } = rules;
  const out = h.slice();
  for (let page = 0, end = 0; page < groups.length; page = end) {
    end = page + 1;
    while (end < groups.length && groups[end] === -1) end += 1;
    const [topK, temperature] = [groups[page]!, temperatures[page]!];
    if (topK <= 0) continue;
    const first = page * ranksPerPage;
    const own = h.subarray(first, end * ranksPerPage);
    const scores = own.map((value, i) => {
      const by = bias[first + i]!;
      return temperature > 0 ? Math.abs(value) * by : Math.abs(value) + by;
    });
    const stays = isAmongLargest(scores, topK);
    if (temperature > 0) {
      const norm = Math.hypot(...x);
      // An input of zeros makes all scores 0.
      const shares = softmaxOf(scores, stays, norm > 0 ? 1 / (norm * temperature) : 0);
      shares.forEach((share, i) => {
        out[first + i] = own[i]! * share;
      });
    } else {
      stays.forEach((kept, i) => {
        if (!kept) out[first + i] = 0;
      });
    }
  }
  return out;
}

function dot(a: ArrayLike<number>, b: ArrayLike<number>): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i]! * b[i]!;
  return sum;
}

/** m [N,r] · v [r]. */
function times(m: Numbers, v: Numbers): Float32Array {
  return Float32Array.from({ length: m.length / v.length }, (_, n) =>
    dot(rowOf(m, n, v.length), v),
  );
}

/** A row's state h [r] and its summaries of earlier blocks [r] each → weights [1+K] of itself and of the atoms. */
function atomWeights(
  h: Numbers,
  earlier: readonly Numbers[],
  { query, summary, context, keys, bias, topK }: AtomQuery,
): Float32Array {
  const count = bias.length; // K
  const weights = new Float32Array(1 + count);
  weights[0] = topK > 0 ? 0 : 1;
  if (topK <= 0) return weights;
  const q = times(query, h); // [dq]
  const scale = 1 / Math.sqrt(q.length);
  if (earlier.length > 0) {
    const sought = times(summary, h); // [r]
    const scores = Float32Array.from(earlier, (past) => dot(past, sought) * scale);
    const shares = softmaxOf(scores, Array(scores.length).fill(true), 1);
    const depth = Float32Array.from(h, (_, s) =>
      dot(
        shares,
        earlier.map((past) => past[s]!),
      ),
    ); // [r]
    times(context, depth).forEach((value, i) => {
      q[i]! += value;
    });
  }
  const logits = Float32Array.from(bias, (by, k) => dot(rowOf(keys, k, q.length), q) * scale + by);
  weights.set(softmaxOf(logits, isAmongLargest(logits, topK), 1), 1);
  return weights;
}
