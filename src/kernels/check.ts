// Shape and type checks shared by all backends: each returns the result's shape or throws SHAPE_MISMATCH naming the op
// and both shapes. They run while a program is recorded, so that no backend ever computes over wrong shapes.

import { GatewayError } from '../errors.ts';
import {
  type AttentionSegment,
  type DType,
  dtypeLayout,
  type ExpandPart,
  type RopeOptions,
  ranksPerPage,
  type ShrinkPart,
  type Tensor,
} from './kernels.ts';

const dimensionMax = 2 ** 31 - 1; // ggml row counts cross C ints in places

const poolTypes: ReadonlySet<DType> = new Set(['f32', 'f16', 'bf16', 'q8_0']);
/** q, k and v; or gate and up. */
const lowRankPartsMax = 3;

function show(tensor: Tensor): string {
  return `${tensor.shape.join('×')} ${tensor.dtype}`;
}

export function mismatch(op: string, message: string): GatewayError {
  return new GatewayError('SHAPE_MISMATCH', `${op}: ${message}`);
}

function require(condition: boolean, op: string, message: () => string): void {
  if (!condition) throw mismatch(op, message());
}

/** A type and sizes, or SHAPE_MISMATCH naming the argument; an undefined size matches any. */
export function want(
  argument: string,
  tensor: Tensor,
  shape: ReadonlyArray<number | undefined>,
  dtype: DType = 'f32',
): void {
  const ok =
    tensor.dtype === dtype &&
    tensor.shape.length === shape.length &&
    shape.every((size, i) => size === undefined || size === tensor.shape[i]);
  if (ok) return;
  const wanted = shape.map((size) => size ?? '?').join('×');
  throw mismatch(
    argument,
    `${wanted} ${dtype} wanted, got ${tensor.shape.join('×')} ${tensor.dtype}`,
  );
}

export function elementCount(shape: readonly number[]): number {
  return shape.reduce((product, size) => product * size, 1);
}

/** Bytes of a contiguous tensor; its last axis must be whole blocks of the type. */
export function byteLength(dtype: DType, shape: readonly number[]): number {
  const { block, bytes } = dtypeLayout[dtype];
  return (elementCount(shape) / block) * bytes;
}

export function checkShape(op: string, dtype: DType, shape: readonly number[]): void {
  require(shape.length >= 1 && shape.length <= 4, op, () =>
    `1 to 4 axes wanted, got ${shape.length}`);
  for (const size of shape) {
    require(Number.isSafeInteger(size) && size >= 1 && size <= dimensionMax, op, () =>
      `axis sizes must be integers from 1 to ${dimensionMax}, got ${shape.join('×')}`);
  }
  const { block } = dtypeLayout[dtype];
  const inner = shape[shape.length - 1]!;
  require(inner % block === 0, op, () =>
    `${dtype} needs rows of whole blocks of ${block}, got ${inner}`);
  require(Number.isSafeInteger(elementCount(shape)), op, () => `${shape.join('×')} is too large`);
}

export function checkEmbed(table: Tensor, ids: Tensor): number[] {
  require(table.shape.length === 2 && ids.shape.length === 1 && ids.dtype === 'i32', 'embed', () =>
    `table [V,E] and ids [T] i32 wanted, got ${show(table)} and ${show(ids)}`);
  return [ids.shape[0]!, table.shape[1]!];
}

export function checkNorm(x: Tensor, weight: Tensor): number[] {
  const inner = x.shape[x.shape.length - 1]!;
  require(weight.shape.length === 1 &&
    weight.shape[0] === inner &&
    weight.dtype === 'f32', 'rmsNorm', () => `weight [${inner}] f32 wanted, got ${show(weight)}`);
  return requireF32('rmsNorm', x);
}

function requireF32(op: string, x: Tensor): number[] {
  require(x.dtype === 'f32', op, () => `f32 wanted, got ${show(x)}`);
  return [...x.shape];
}

export function checkLinear(x: Tensor, w: Tensor): number[] {
  require(x.dtype === 'f32' &&
    x.shape.length === 2 &&
    w.shape.length === 2 &&
    x.shape[1] === w.shape[1], 'linear', () =>
    `inner sizes differ: x is ${show(x)}, w is ${show(w)}`);
  return [x.shape[0]!, w.shape[0]!];
}

export function checkSame(op: string, a: Tensor, b: Tensor): number[] {
  const same = a.shape.length === b.shape.length && a.shape.every((size, i) => size === b.shape[i]);
  require(same && a.dtype === 'f32' && b.dtype === 'f32', op, () =>
    `equal f32 shapes wanted, got ${show(a)} and ${show(b)}`);
  return [...a.shape];
}

export function checkRope(x: Tensor, positions: Tensor, options: RopeOptions): number[] {
  const size = options.size;
  require(x.dtype === 'f32' &&
    x.shape.length === 3 &&
    positions.dtype === 'i32' &&
    positions.shape.length === 1 &&
    positions.shape[0] === x.shape[0], 'rope', () =>
    `x [T,H,D] f32 and positions [T] i32 wanted, got ${show(x)} and ${show(positions)}`);
  require(size > 0 && size % 2 === 0 && size <= x.shape[2]!, 'rope', () =>
    `size must be even and at most ${x.shape[2]}, got ${size}`);
  return [...x.shape];
}

export function checkReshape(x: Tensor, shape: readonly number[]): number[] {
  checkShape('reshape', x.dtype, shape);
  require(elementCount(shape) === elementCount(x.shape), 'reshape', () =>
    `${show(x)} has not as many numbers as ${shape.join('×')}`);
  return [...shape];
}

export function checkWriteCells(cache: Tensor, x: Tensor, cells: Tensor): void {
  require(cache.shape.length === 2 &&
    x.shape.length === 2 &&
    x.dtype === 'f32' &&
    cache.shape[1] === x.shape[1] &&
    cells.dtype === 'i64' &&
    cells.shape.length === 1 &&
    cells.shape[0] === x.shape[0] &&
    (cache.dtype === 'f16' || cache.dtype === 'f32'), 'writeCells', () =>
    `cache [cells,C] f16 or f32, x [T,C] f32, cells [T] i64 wanted, got ${show(cache)}, ${show(x)}, ${show(cells)}`);
}

export function checkAttend(q: Tensor, k: Tensor, v: Tensor): number[] {
  const [rows, heads, headSize] = q.shape;
  const kvWidth = k.shape[1] ?? 0;
  require(q.shape.length === 3 &&
    q.dtype === 'f32' &&
    k.shape.length === 2 &&
    v.shape.length === 2 &&
    k.shape[0] === v.shape[0] &&
    kvWidth === v.shape[1] &&
    k.dtype === v.dtype &&
    kvWidth % headSize! === 0 &&
    heads! % (kvWidth / headSize!) === 0, 'attend', () =>
    `q [T,H,D], k and v [cells,Hkv·D] with H a multiple of Hkv wanted, got ${show(q)}, ${show(k)}, ${show(v)}`);
  return [rows!, heads! * headSize!];
}

/** Segments of one run against a program of `rows` rows, caches of `cells` cells and room for `segmentsMax`. */
export function checkSegments(
  segments: readonly AttentionSegment[],
  limits: { readonly rows: number; readonly cells: number; readonly segmentsMax: number },
): void {
  require(segments.length <= limits.segmentsMax, 'attend', () =>
    `at most ${limits.segmentsMax} segments, got ${segments.length}`);
  let rowEnd = 0;
  for (const { rowStart, rowCount, cellBase, cells } of segments) {
    const ok =
      [rowStart, rowCount, cellBase, cells].every(Number.isSafeInteger) &&
      rowStart >= rowEnd &&
      rowCount >= 1 &&
      rowStart + rowCount <= limits.rows &&
      cellBase >= 0 &&
      cells >= rowCount &&
      cellBase + cells <= limits.cells;
    require(ok, 'attend', () =>
      `segment of ${rowCount} rows at ${rowStart} over ${cells} cells at ${cellBase} does not fit ${limits.rows} rows ` +
      `and ${limits.cells} cells, or is out of order`);
    rowEnd = rowStart + rowCount;
  }
}

/** Pools of adapter pages. */
export function checkPool(op: string, pool: Tensor, width: number): void {
  require(pool.shape.length === 3 &&
    pool.shape[1] === ranksPerPage &&
    pool.shape[2] === width &&
    poolTypes.has(pool.dtype), op, () =>
    `a pool [pages,8,${width}] of f32, f16, bf16 or q8_0 wanted, got ${show(pool)}`);
}

export function checkSlice(x: Tensor, index: number): number[] {
  require(x.shape.length >= 2 &&
    !('bytes' in x) &&
    Number.isSafeInteger(index) &&
    index >= 0 &&
    index < x.shape[0]!, 'slice', () =>
    `an input or a result [M,…] and an index below M wanted, got ${show(x)} and ${index}`);
  return x.shape.slice(1);
}

export function checkShrink(
  x: Tensor,
  pages: Tensor,
  parts: readonly ShrinkPart[],
  uses: Tensor,
): number[] {
  const [rows, count] = pages.shape;
  require(x.shape.length === 2 &&
    x.dtype === 'f32' &&
    pages.shape.length === 2 &&
    pages.dtype === 'i32' &&
    x.shape[0] === rows &&
    uses.dtype === 'i32' &&
    uses.shape.join() === String(rows) &&
    parts.length >= 1 &&
    parts.length <= lowRankPartsMax, 'shrink', () =>
    `x [T,K], pages [T,P] and uses [T] i32 and 1 to ${lowRankPartsMax} parts wanted, got ${[x, pages, uses].map(show).join(', ')}, ${parts.length}`);
  for (const { a, gate } of parts) {
    checkPool('shrink', a, x.shape[1]!);
    require(a.shape[0] === parts[0]!.a.shape[0] &&
      gate.dtype === 'f32' &&
      gate.shape.join() === [parts[0]!.gate.shape[0], count! * ranksPerPage].join(), 'shrink', () =>
      `gates [G,${count! * ranksPerPage}] and pools of equal pages wanted, got ${show(gate)}, ${show(a)}`);
  }
  return [rows!, count! * ranksPerPage];
}

export function checkMixRanks(h: Tensor, atoms: Tensor, weights: Tensor): number[] {
  const [count, mixed] = atoms.shape;
  want('mixRanks h', h, [undefined, undefined]);
  want('mixRanks atoms', atoms, [undefined, mixed, mixed]);
  want('mixRanks weights', weights, [h.shape[0], 1 + count!]);
  require(mixed! <= h.shape[1]!, 'mixRanks', () =>
    `atoms of at most ${h.shape[1]} ranks wanted, got ${show(atoms)}`);
  return [...h.shape];
}

export function checkExpandParts(pages: Tensor, parts: readonly ExpandPart[]): void {
  const ys = new Set(parts.map(({ y }) => y));
  require(ys.size === parts.length && ys.size >= 1 && ys.size <= lowRankPartsMax, 'expand', () =>
    `1 to ${lowRankPartsMax} parts with different y wanted, got ${parts.length} with ${ys.size}`);
  for (const part of parts) checkExpand(pages, part);
}

export function checkExpand(pages: Tensor, { y, h, b }: ExpandPart): void {
  const [rows, count] = pages.shape;
  require(y.shape.length === 2 &&
    y.dtype === 'f32' &&
    h.dtype === 'f32' &&
    pages.shape.length === 2 &&
    pages.dtype === 'i32' &&
    y.shape[0] === rows &&
    h.shape.join() === [rows, count! * ranksPerPage].join(), 'expand', () =>
    `y [T,N], h [T,8P] f32 and pages [T,P] i32 wanted, got ${[y, h, pages].map(show).join(', ')}`);
  checkPool('expand', b, y.shape[1]!);
}

export function checkGather(x: Tensor, rows: Tensor): number[] {
  require(x.shape.length === 2 &&
    x.dtype === 'f32' &&
    rows.shape.length === 1 &&
    rows.dtype === 'i32', 'gatherRows', () =>
    `x [T,N] f32 and rows [R] i32 wanted, got ${show(x)} and ${show(rows)}`);
  return [rows.shape[0]!, x.shape[1]!];
}

/** Every index in [0, limit): the last check before native code reads at it. */
export function checkIndices(op: string, indices: ArrayLike<number | bigint>, limit: number): void {
  for (let i = 0; i < indices.length; i++) {
    const index = Number(indices[i]);
    if (!(index >= 0 && index < limit))
      throw mismatch(op, `index ${index} is outside 0…${limit - 1}`);
  }
}

export function checkRange(op: string, size: number, start: number, length: number): void {
  const ok =
    Number.isSafeInteger(start) &&
    Number.isSafeInteger(length) &&
    start >= 0 &&
    length >= 0 &&
    start + length <= size;
  require(ok, op, () => `range ${start}+${length} is outside ${size}`);
}
