// A recorded ggml graph, replayed with new inputs. Recording costs milliseconds, a replay costs the input copies.
//
// Attention is one flash_attn_ext node per segment. Its views (rows of q, the sequence's run of cells, its rows of the
// result) are moved between runs by patching the fields of their tensor structs, which lie in our own memory (Arena):
// a graph recorded once serves sequences of any length, and a row reads only its own cells. Unused segments have zero
// rows, which ggml skips. The offsets are checked against the library at load (library.ts, selfTest).
//
// On a device (ProgramHost.scheduler) each run puts the graph back as it was recorded, patches it, and has it split and
// placed: what a run patches are sizes and offsets into what is viewed, which ggml turns into places on either side.

import { GatewayError } from '../../errors.ts';
import { checkRange, checkSegments, elementCount, mismatch } from '../check.ts';
import type { AttentionSegment, Ops, Program, ProgramShape, Tensor } from '../kernels.ts';
import { checkInput, type InputData, type InputPlan, SymbolicOps } from '../symbolic-ops.ts';
import {
  type AttendBase,
  aimViews,
  attendBases,
  MaskMemory,
  sizeMasks,
} from './attention-views.ts';
import { tensorLayout } from './library.ts';
import { Arena } from './memory.ts';
import { type Node, type ProgramHost, pointerOf, Recorder, tierStart } from './recorder.ts';

/** Segments per program, an arbitrary bound: tensor structs grow with segments × attends. */
const segmentsLimit = 256;

interface Recording {
  readonly arena: Arena;
  readonly recorder: Recorder;
  readonly outputs: ReadonlyMap<string, Node>;
  readonly bases: readonly AttendBase[];
  /** The tightest of all attends: a run's segments are checked against it once. */
  readonly limits: Parameters<typeof checkSegments>[1];
  readonly version: number;
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
    const nodes = this.#tensorCount;
    const arena = new Arena(this.#host.library, nodes, nodes);
    const recorder = new Recorder(this.#host, arena, { segments: this.#segmentsMax, nodes });
    try {
      return this.#fill(arena, recorder);
    } catch (error) {
      release({ arena, recorder });
      throw error;
    }
  }

  #fill(arena: Arena, recorder: Recorder): Recording {
    const { library, scratch, scheduler } = this.#host;
    const outputs = new Map<string, Node>();
    for (const [name, tensor] of Object.entries(this.#build(recorder))) {
      library.call('ggml_set_output', pointerOf(tensor));
      // Some training ops leave it to their use whether they are computed.
      library.call('ggml_build_forward_expand', recorder.graph, pointerOf(tensor));
      outputs.set(name, tensor as Node);
    }
    if (scheduler === undefined) scratch.place(recorder.graph);
    else scheduler.reserve(this.#tensorCount);
    const bases = attendBases(this.#host, arena, recorder);
    if (scheduler !== undefined) arena.keep();
    const limits = {
      rows: Math.min(...recorder.attends.map(({ rows }) => rows)),
      cells: Math.min(...recorder.attends.map(({ cells }) => cells)),
      segmentsMax: this.#segmentsMax,
    };
    return { arena, recorder, outputs, bases, limits, version: scratch.version };
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
    const { arena, recorder, bases, limits } = this.#current();
    if (this.#values.size !== this.#inputs.size) {
      const missing = [...this.#inputs.keys()].filter((name) => !this.#values.has(name));
      throw mismatch('run', `inputs never written: ${missing.join(', ')}`);
    }
    if (recorder.attends.length > 0) checkSegments(segments, limits);
    const { device, scratch, scheduler } = this.#host;
    if (scheduler !== undefined) arena.restore();
    if (recorder.segmentTable !== undefined) this.#writeTable(recorder.segmentTable, segments);
    else sizeMasks(arena, recorder, segments);
    this.#aimTiers(arena, recorder);
    for (const [i, site] of recorder.sites.entries()) aimViews(arena, site, bases[i]!, segments);
    if (scheduler === undefined) {
      if (recorder.sites.length > 0) this.#mask.place(arena, recorder, segments);
      scratch.compute(device, recorder.graph);
    } else {
      scheduler.place(recorder.graph);
      this.#mask.copy(recorder, segments);
      scheduler.compute(recorder.graph);
    }
  }

  #writeTable({ pointer, shape }: Node, segments: readonly AttentionSegment[]): void {
    const table = new Int32Array(elementCount(shape)); // no rows: unused
    for (const [i, { rowStart, rowCount, cellBase, cells }] of segments.entries()) {
      table.set([rowStart, rowCount, cellBase, cells], i * 4);
    }
    const { library } = this.#host;
    library.call('ggml_backend_tensor_set', pointer, table, 0, table.byteLength);
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
      for (const { word, axis } of fields) {
        arena.patch(word, tensorLayout.ne + axis * 8, rows[tier]!);
      }
    }
    this.#tierRows = rows;
  }

  read(name: string, start: number, out: Float32Array | Int32Array): void {
    const recording = this.#recording;
    const node = recording?.outputs.get(name);
    if (node === undefined) throw mismatch('read', `the program has no output ${name}`);
    const { scratch, scheduler } = this.#host;
    const kept =
      recording?.version === scratch.version &&
      (scheduler === undefined || scheduler.holds(recording.recorder.graph));
    if (!kept) throw mismatch('read', `${name} is gone: another program was compiled or run`);
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

function release({ arena, recorder }: Pick<Recording, 'arena' | 'recorder'>): void {
  arena[Symbol.dispose]();
  for (const buffer of recorder.buffers) buffer[Symbol.dispose]();
}
