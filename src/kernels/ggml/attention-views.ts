// What runs move between replays of a program with attention: the views of each segment (its rows of q and of the result,
// its run of cells) and its causal mask. See GgmlProgram for why, and for the two ways in which a view has a place.

import koffi from 'koffi';
import type { AttentionSegment } from '../kernels.ts';
import { ggmlType, tensorLayout } from './library.ts';
import { Arena, TensorBuffer } from './memory.ts';
import type { AttendSite, ProgramHost, Recorder } from './recorder.ts';

const { ne, nb, src, viewOffset, data } = tensorLayout;
const word = 8; // bytes of a size, stride or pointer field
const maskHidden = 0xfc00; // -infinity in f16

/** Where the views of one attend start, and the field that says so: an address for the CPU, which runs the graph as it is;
 *  an offset into what is viewed for a device, where each run gives addresses anew. */
export interface AttendBase {
  readonly field: number;
  readonly q: number;
  readonly k: number;
  readonly v: number;
  readonly result: number;
}

/** Of each attend of a graph that has just been placed or, for a device, recorded. */
export function attendBases(host: ProgramHost, arena: Arena, recorder: Recorder): AttendBase[] {
  return recorder.sites.map(({ q, k, v, resultAddress, views }) => {
    if (host.scheduler !== undefined) {
      return { field: viewOffset, q: arena.peek(views[0]!.q, viewOffset), k: 0, v: 0, result: 0 };
    }
    const address = Number(host.library.pointer('ggml_get_data', q));
    return { field: data, q: address, k: k.address, v: v.address, result: resultAddress };
  });
}

/** Points one attend's views at this run's segments. */
export function aimViews(
  arena: Arena,
  { cellBytes, rowBytes, views }: AttendSite,
  base: AttendBase,
  segments: readonly AttentionSegment[],
): void {
  const { field } = base;
  views.forEach((view, i) => {
    const segment = segments[i];
    // [H·D rows]: the result is [D, H, rows] in ggml's order, so ne[2] counts rows; none means skip.
    for (const at of view.sized) arena.patch(at, ne + 2 * word, segment?.rowCount ?? 0);
    if (segment === undefined) return;
    const { rowStart, rowCount, cellBase, cells } = segment;
    for (const at of view.moved) arena.patch(at, field, base.result + rowStart * rowBytes);
    arena.patch(view.q, field, base.q + rowStart * rowBytes);
    arena.patch(view.q, ne + word, rowCount);
    arena.patch(view.k, field, base.k + cellBase * cellBytes);
    arena.patch(view.k, ne + word, cells);
    arena.patch(view.v, field, base.v + cellBase * cellBytes);
    arena.patch(view.v, ne + word, cells);
  });
}

/** Sizes the masks of segments of several rows, and takes the mask from segments of one, which sees all of its cells. */
export function sizeMasks(
  arena: Arena,
  recorder: Recorder,
  segments: readonly AttentionSegment[],
): void {
  segments.forEach(({ rowCount, cells }, i) => {
    const { word: at, address } = recorder.masks[i]!;
    const masked = rowCount > 1;
    if (masked) {
      arena.patch(at, ne, cells);
      arena.patch(at, ne + word, rowCount);
      for (let axis = 1; axis < 4; axis++) {
        arena.patch(at, nb + axis * word, cells * 2 * (axis === 1 ? 1 : rowCount));
      }
    }
    // src[3] is the mask.
    for (const { views } of recorder.sites) {
      arena.patch(views[i]!.result, src + 3 * word, masked ? address : 0);
    }
  });
}

function fillMask(words: Uint16Array, start: number, { rowCount, cells }: AttentionSegment): void {
  for (let row = 0; row < rowCount; row++) {
    const at = start + row * cells;
    const seen = at + cells - rowCount + row + 1;
    words.fill(0, at, seen);
    words.fill(maskHidden, seen, at + cells);
  }
}

/** Causal masks of one run, one after the other. */
export class MaskMemory implements Disposable {
  readonly #host: ProgramHost;
  #buffer: TensorBuffer | undefined;
  #words: Uint16Array = new Uint16Array(0);

  constructor(host: ProgramHost) {
    this.#host = host;
  }

  /** For the CPU: into memory of its own, which the mask tensors are pointed at. */
  place(arena: Arena, recorder: Recorder, segments: readonly AttentionSegment[]): void {
    const masked = segments.filter(({ rowCount }) => rowCount > 1);
    this.#reserve(masked.reduce((sum, { rowCount, cells }) => sum + rowCount * cells, 0));
    const base = Number(this.#buffer?.address ?? 0);
    let at = 0;
    for (const [i, segment] of segments.entries()) {
      if (segment.rowCount === 1) continue;
      arena.patch(recorder.masks[i]!.word, data, base + at * 2);
      fillMask(this.#words, at, segment);
      at += segment.rowCount * segment.cells;
    }
  }

  /** For a device: into the tensors that the scheduler has just placed. */
  copy(recorder: Recorder, segments: readonly AttentionSegment[]): void {
    for (const [i, segment] of segments.entries()) {
      if (segment.rowCount === 1) continue;
      const count = segment.rowCount * segment.cells;
      if (this.#words.length < count) this.#words = new Uint16Array(count);
      fillMask(this.#words, 0, segment);
      const mask = BigInt(recorder.masks[i]!.address);
      this.#host.library.call('ggml_backend_tensor_set', mask, this.#words, 0, count * 2);
    }
  }

  #reserve(count: number): void {
    if (count <= this.#words.length) return;
    const { library, device } = this.#host;
    this.#buffer?.[Symbol.dispose]();
    using arena = new Arena(library, 1, 0);
    const tensor = library.pointer(
      'ggml_new_tensor_4d',
      arena.context,
      ggmlType.f16,
      count,
      1,
      1,
      1,
    );
    this.#buffer = TensorBuffer.of(library, device, tensor);
    this.#words = new Uint16Array(koffi.view(this.#buffer.address, count * 2));
  }

  [Symbol.dispose](): void {
    this.#buffer?.[Symbol.dispose]();
    this.#buffer = undefined;
  }
}
