// A recorded ggml graph, replayed with new inputs. Recording costs milliseconds, a replay costs the input copies.
//
// Attention is one flash_attn_ext node per segment. Its views (rows of q, the sequence's run of cells, its rows of the
// result) are moved between runs by patching the fields of their tensor structs, which lie in our own memory (Arena):
// a graph recorded once serves sequences of any length, and a row reads only its own cells. Unused segments have zero
// rows, which ggml skips. The offsets are checked against the library at load (library.ts, selfTest).

import koffi from 'koffi';
import { GatewayError } from '../../errors.ts';
import { checkRange, checkSegments, elementCount, mismatch } from '../check.ts';
import type { AttentionSegment, Ops, Program, ProgramShape, Tensor } from '../kernels.ts';
import { checkInput, type InputData, type InputPlan, SymbolicOps } from '../symbolic-ops.ts';
import { ggmlType, tensorLayout } from './library.ts';
import { Arena, TensorBuffer } from './memory.ts';
import {
  type AttendSite,
  type Node,
  type ProgramHost,
  pointerOf,
  Recorder,
  tierStart,
} from './recorder.ts';

const { ne, nb, src, data: dataField } = tensorLayout;
const word = 8; // bytes of a size, stride or pointer field
const maskHidden = 0xfc00; // -infinity in f16
/** Segments per program, an arbitrary bound: tensor structs grow with segments × attends. */
const segmentsLimit = 256;

interface Recording {
  readonly arena: Arena;
  readonly recorder: Recorder;
  readonly outputs: ReadonlyMap<string, Node>;
  /** Address of q of each attend; known once the scratch is placed. */
  readonly qAddresses: readonly number[];
  /** The tightest of all attends: a run's segments are checked against it once. */
  readonly limits: Parameters<typeof checkSegments>[1];
  readonly version: number;
}

/** Causal masks of one run, one after the other. */
class MaskMemory implements Disposable {
  readonly #host: ProgramHost;
  #buffer: TensorBuffer | undefined;
  #words: Uint16Array = new Uint16Array(0);

  constructor(host: ProgramHost) {
    this.#host = host;
  }

  /** Writes the masks of the segments of more than one row; returns the address of each (0 where none is needed). */
  write(segments: readonly AttentionSegment[]): readonly number[] {
    const masked = segments.filter(({ rowCount }) => rowCount > 1);
    this.#reserve(masked.reduce((sum, { rowCount, cells }) => sum + rowCount * cells, 0));
    const base = Number(this.#buffer?.address ?? 0);
    let at = 0;
    return segments.map(({ rowCount, cells }) => {
      if (rowCount === 1) return 0;
      const address = base + at * 2;
      for (let row = 0; row < rowCount; row++) {
        const seen = cells - rowCount + row + 1;
        this.#words.fill(0, at, at + seen);
        this.#words.fill(maskHidden, at + seen, at + cells);
        at += cells;
      }
      return address;
    });
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
    this.#buffer = new TensorBuffer(library, device, tensor);
    this.#words = new Uint16Array(koffi.view(this.#buffer.address, count * 2));
  }

  [Symbol.dispose](): void {
    this.#buffer?.[Symbol.dispose]();
    this.#buffer = undefined;
  }
}

export class GgmlProgram implements Program {
  readonly #host: ProgramHost;
  readonly #build: (ops: Ops) => Readonly<Record<string, Tensor>>;
  readonly #segmentsMax: number;
  readonly #onDispose: () => void;
  readonly #inputs: ReadonlyMap<string, InputPlan>;
  readonly #tensorCount: number;
  readonly #mask: MaskMemory;
  /** Input values, kept so that a program that must record itself again loses nothing. */
  readonly #values: Map<string, InputData> = new Map();
  #recording: Recording | undefined;
  /** What the tiers of the recording are set to. */
  #tierRows: readonly number[] = [];

  constructor(
    host: ProgramHost,
    build: (ops: Ops) => Readonly<Record<string, Tensor>>,
    shape: ProgramShape,
    onDispose: () => void,
  ) {
    const { segments } = shape;
    if (!Number.isSafeInteger(segments) || segments < 0 || segments > segmentsLimit) {
      throw mismatch('compile', `0 to ${segmentsLimit} segments wanted, got ${segments}`);
    }
    const symbolic = new SymbolicOps(segments);
    build(symbolic);
    this.#host = host;
    this.#build = build;
    this.#segmentsMax = segments;
    this.#onDispose = onDispose;
    this.#inputs = symbolic.inputs;
    this.#tensorCount = symbolic.tensorCount + segments + 16;
    this.#mask = new MaskMemory(host);
    this.#recording = this.#record();
  }

  #record(): Recording {
    const { library, scratch } = this.#host;
    const nodes = this.#tensorCount;
    const arena = new Arena(library, nodes, nodes);
    const recorder = new Recorder(this.#host, arena, { segments: this.#segmentsMax, nodes });
    const outputs = new Map<string, Node>();
    for (const [name, tensor] of Object.entries(this.#build(recorder))) {
      library.call('ggml_set_output', pointerOf(tensor));
      outputs.set(name, tensor as Node);
    }
    scratch.place(recorder.graph);
    const qAddresses = recorder.sites.map(({ q }) => Number(library.pointer('ggml_get_data', q)));
    const limits = {
      rows: Math.min(...recorder.sites.map(({ rows }) => rows)),
      cells: Math.min(...recorder.sites.map(({ k }) => k.shape[0]!)),
      segmentsMax: this.#segmentsMax,
    };
    return { arena, recorder, outputs, qAddresses, limits, version: scratch.version };
  }

  /** The recording, made again when another program has grown and so moved the shared scratch. */
  #current(): Recording {
    const recording = this.#recording;
    if (recording === undefined) throw new GatewayError('INTERNAL', 'the program was disposed');
    if (recording.version === this.#host.scratch.version) return recording;
    release(recording);
    // Recording again may fail for want of memory: what was released must not be released once more.
    this.#recording = undefined;
    this.#tierRows = [];
    const again = this.#record();
    this.#recording = again;
    for (const [name, values] of this.#values) this.#copyIn(again, name, values);
    return again;
  }

  write(name: string, values: InputData): void {
    checkInput(this.#inputs, name, values);
    const recording = this.#current();
    this.#values.set(name, values.slice());
    this.#copyIn(recording, name, values);
  }

  #copyIn({ recorder }: Recording, name: string, values: InputData): void {
    const { pointer } = recorder.inputs.get(name)!;
    this.#host.library.call('ggml_backend_tensor_set', pointer, values, 0, values.byteLength);
  }

  run(segments: readonly AttentionSegment[]): void {
    const { arena, recorder, qAddresses, limits } = this.#current();
    if (this.#values.size !== this.#inputs.size) {
      const missing = [...this.#inputs.keys()].filter((name) => !this.#values.has(name));
      throw mismatch('run', `inputs never written: ${missing.join(', ')}`);
    }
    if (recorder.sites.length > 0) checkSegments(segments, limits);
    this.#aimMasks(arena, recorder, segments);
    this.#aimTiers(arena, recorder);
    for (const [i, site] of recorder.sites.entries()) aim(arena, site, qAddresses[i]!, segments);
    const { library, device } = this.#host;
    const status = library.number('ggml_backend_graph_compute', device.backend, recorder.graph);
    if (status !== 0) throw new GatewayError('ENGINE_FAILED', `ggml: graph compute gave ${status}`);
  }

  #aimMasks(arena: Arena, recorder: Recorder, segments: readonly AttentionSegment[]): void {
    const addresses = this.#mask.write(segments);
    segments.forEach(({ rowCount, cells }, i) => {
      const { word: at, address } = recorder.masks[i]!;
      const masked = rowCount > 1;
      if (masked) {
        arena.patch(at, dataField, addresses[i]!);
        arena.patch(at, ne, cells);
        arena.patch(at, ne + word, rowCount);
        arena.patch(at, nb + word, cells * 2);
      }
      // src[3] is the mask: a single row sees all of its cells and needs none.
      for (const { views } of recorder.sites) {
        arena.patch(views[i]!.result, src + 3 * word, masked ? address : 0);
      }
    });
  }

  /** Sets how many rows each tier of adapter pages serves: up to the last row with a page in it. */
  #aimTiers(arena: Arena, recorder: Recorder): void {
    const { lowRankPages, tierFields } = recorder;
    if (lowRankPages === undefined) return;
    const [name] = [...recorder.inputs].find(([, node]) => node === lowRankPages)!;
    const rows = tierRows(
      this.#values.get(name) as Int32Array,
      lowRankPages.shape[1]!,
      tierFields.length,
    );
    for (const [tier, fields] of tierFields.entries()) {
      if (this.#tierRows[tier] === rows[tier]) continue;
      for (const { word: at, axis } of fields) arena.patch(at, ne + axis * word, rows[tier]!);
    }
    this.#tierRows = rows;
  }

  read(name: string, start: number, out: Float32Array | Int32Array): void {
    const recording = this.#recording;
    const node = recording?.outputs.get(name);
    if (node === undefined) throw mismatch('read', `the program has no output ${name}`);
    if (recording?.version !== this.#host.scratch.version) {
      throw mismatch('read', `${name} is gone: another program was compiled since the run`);
    }
    checkRange('read', elementCount(node.shape), start, out.length);
    const { library } = this.#host;
    library.call('ggml_backend_tensor_get', node.pointer, out, start * 4, out.byteLength);
  }

  [Symbol.dispose](): void {
    if (this.#recording !== undefined) release(this.#recording);
    this.#recording = undefined;
    this.#mask[Symbol.dispose]();
    this.#onDispose();
  }
}

/** Points one attend's views at this run's segments. */
function aim(
  arena: Arena,
  site: AttendSite,
  qAddress: number,
  segments: readonly AttentionSegment[],
): void {
  const { k, v, cellBytes, rowBytes, resultAddress, views } = site;
  views.forEach((view, i) => {
    const segment = segments[i];
    // [H·D rows]: the result is [D, H, rows] in ggml's order, so ne[2] counts rows; none means skip.
    arena.patch(view.result, ne + 2 * word, segment?.rowCount ?? 0);
    if (segment === undefined) return;
    const { rowStart, rowCount, cellBase, cells } = segment;
    arena.patch(view.result, dataField, resultAddress + rowStart * rowBytes);
    arena.patch(view.q, dataField, qAddress + rowStart * rowBytes);
    arena.patch(view.q, ne + word, rowCount);
    arena.patch(view.k, dataField, k.address + cellBase * cellBytes);
    arena.patch(view.k, ne + word, cells);
    arena.patch(view.v, dataField, v.address + cellBase * cellBytes);
    arena.patch(view.v, ne + word, cells);
  });
}

function tierRows(pages: Int32Array, count: number, tiers: number): number[] {
  const rows: number[] = Array(tiers).fill(0);
  for (let tier = 0; tier < tiers; tier++) {
    const [first, end] = [tierStart(tier), Math.min(tierStart(tier + 1), count)];
    for (let row = pages.length / count - 1; row >= 0 && rows[tier] === 0; row--) {
      if (pages.subarray(row * count + first, row * count + end).some((page) => page !== 0))
        rows[tier] = row + 1;
    }
  }
  return rows;
}

function release({ arena, recorder }: Recording): void {
  arena[Symbol.dispose]();
  for (const buffer of recorder.buffers) buffer[Symbol.dispose]();
}
