// The forward pass of a llama-like decoder over any Kernels, and the Stepper that runs it: read top to bottom. A
// program is recorded once per shape (rows, segments, adapter pages) and replayed; adapters are the same two ops at
// every projection, whatever the rows use (design.md section 3).

import { GatewayError } from '../errors.ts';
import {
  type Kernels,
  type Ops,
  type Program,
  ranksPerPage,
  type StoredTensor,
  type Tensor,
} from '../kernels/kernels.ts';
import {
  type DecoderConfig,
  type Projection,
  projectionShape,
  projections,
} from './decoder-config.ts';
import type { ModuleRef, PageData, Segment, Stepper, StepResult } from './stepper.ts';

export type BlockWeights = Readonly<Record<Projection | 'attn_norm' | 'ffn_norm', StoredTensor>>;

export interface DecoderWeights {
  readonly tokenEmbedding: StoredTensor; // [V, E]
  readonly outputNorm: StoredTensor; // [E]
  readonly output: StoredTensor; // [V, E], the embedding itself when tied
  readonly blocks: readonly BlockWeights[];
}

export interface DecoderOptions {
  readonly config: DecoderConfig;
  readonly weights: DecoderWeights;
  readonly kernels: Kernels;
  /** Cells of KV memory. The first `scrapCells` of them take the writes of padding rows. */
  readonly cells: number;
  readonly cellType: 'f16' | 'f32';
  /** Adapter pages, page 0 included. */
  readonly pages: number;
  readonly tokensMax: number;
  readonly segmentsMax: number;
}

/** Cells at the start of KV memory that no sequence owns: padding rows of a step write there. */
export const scrapCells = 16;
/** Programs kept: decode shapes 1…32 rows, prefill shapes, with and without adapters. A record costs about 5 ms. */
const programsMax = 48;
const pagesPerRowMax = 32; // rank 256

interface PagePool {
  readonly a: StoredTensor; // [pages, 8, in]
  readonly b: StoredTensor; // [pages, out, 8]
}

/** The sizes a program is recorded for; a step uses the smallest that fits. */
export interface ProgramSize {
  readonly rows: number; // T
  readonly segments: number; // S
  readonly pages: number; // P per row; 0 = no adapter ops at all
}

export class Decoder implements Stepper {
  readonly config: DecoderConfig;
  readonly cells: number;
  readonly pages: number;
  readonly tokensMax: number;
  readonly segmentsMax: number;
  readonly #kernels: Kernels;
  readonly #weights: DecoderWeights;
  readonly #keys: readonly StoredTensor[]; // per block [cells, Hkv·D]
  readonly #values: readonly StoredTensor[];
  readonly #pools: ReadonlyMap<string, PagePool>;
  readonly #programs: Map<string, Program> = new Map();

  constructor(options: DecoderOptions) {
    const { config, kernels, cells, pages } = options;
    if (cells <= scrapCells || pages < 1 || options.segmentsMax < 1) {
      throw new GatewayError(
        'INVALID_REQUEST',
        `decoder: ${cells} cells and ${pages} pages are too few`,
      );
    }
    this.config = config;
    this.cells = cells;
    this.pages = pages;
    this.tokensMax = options.tokensMax;
    this.segmentsMax = options.segmentsMax;
    this.#kernels = kernels;
    this.#weights = options.weights;
    const cellShape = [cells, config.kvHeads * config.headSize];
    const caches = (): StoredTensor[] =>
      Array.from({ length: config.blocks }, () => kernels.store(options.cellType, cellShape));
    this.#keys = caches();
    this.#values = caches();
    this.#pools = pages > 1 ? storePools(options) : new Map();
  }

  step(segments: readonly Segment[]): StepResult {
    const batch = checkBatch(segments, this);
    const size = programSize(batch, this);
    const program = this.#program(size);
    const placed = placeRows(segments);
    const outputs = writeInputs(program, placed, size);
    program.run(
      placed.map(({ segment, rowStart }) => ({
        rowStart,
        rowCount: segment.tokens.length,
        cellBase: segment.cellBase,
        cells: segment.position + segment.tokens.length,
      })),
    );
    return new Logits(program, outputs, this.config.vocabSize);
  }

  #program(size: ProgramSize): Program {
    const key = `${size.rows}/${size.segments}/${size.pages}`;
    const known = this.#programs.get(key);
    if (known !== undefined) {
      this.#programs.delete(key); // most recently used last
      this.#programs.set(key, known);
      return known;
    }
    const [oldest] = this.#programs;
    if (this.#programs.size >= programsMax && oldest !== undefined) {
      oldest[1][Symbol.dispose]();
      this.#programs.delete(oldest[0]);
    }
    const program = this.#kernels.compile((ops) => this.#forward(ops, size), {
      segments: size.segments,
    });
    this.#programs.set(key, program);
    return program;
  }

  /** Records the programs that serving will want first, so that no request pays for it. */
  warm(sizes: readonly ProgramSize[]): void {
    for (const size of sizes) this.#program(size);
  }

  #forward(ops: Ops, { rows, segments, pages }: ProgramSize): Readonly<Record<string, Tensor>> {
    const { config } = this;
    const { heads, kvHeads, headSize, normEps } = config;
    const tokens = ops.input('tokens', 'i32', [rows]);
    const positions = ops.input('positions', 'i32', [rows]);
    const cells = ops.input('cells', 'i64', [rows]);
    const outputRows = ops.input('outputRows', 'i32', [segments]);
    const project = this.#projector(ops, rows, pages);
    const rope = { size: config.ropeSize, base: config.ropeBase, style: config.ropeStyle };

    let x = ops.embed(this.#weights.tokenEmbedding, tokens); // [T, E]
    this.#weights.blocks.forEach((block, i) => {
      const h = ops.rmsNorm(x, block.attn_norm, normEps); // [T, E]
      const [q, k, v] = project(i, h, ['attn_q', 'attn_k', 'attn_v']) as [Tensor, Tensor, Tensor];
      const qRope = ops.rope(ops.reshape(q, [rows, heads, headSize]), positions, rope); // [T, H, D]
      const kRope = ops.rope(ops.reshape(k, [rows, kvHeads, headSize]), positions, rope); // [T, Hkv, D]
      ops.writeCells(this.#keys[i]!, ops.reshape(kRope, [rows, kvHeads * headSize]), cells);
      ops.writeCells(this.#values[i]!, v, cells);
      const attended = ops.attend(qRope, this.#keys[i]!, this.#values[i]!); // [T, H·D]
      x = ops.add(x, project(i, attended, ['attn_output'])[0]!); // [T, E]

      const g = ops.rmsNorm(x, block.ffn_norm, normEps); // [T, E]
      const [gate, up] = project(i, g, ['ffn_gate', 'ffn_up']) as [Tensor, Tensor]; // [T, F]
      x = ops.add(x, project(i, ops.swiglu(gate, up), ['ffn_down'])[0]!); // [T, E]
    });
    const last = ops.gatherRows(x, outputRows); // [S, E]
    const normed = ops.rmsNorm(last, this.#weights.outputNorm, normEps); // [S, E]
    return { logits: ops.linear(normed, this.#weights.output) }; // [S, V]
  }

  /** Projections that share an input: the frozen weight, plus each row's own low-rank delta B·(active ⊙ A·x). */
  #projector(
    ops: Ops,
    rows: number,
    pagesPerRow: number,
  ): (block: number, x: Tensor, names: readonly Projection[]) => Tensor[] {
    const weight = (block: number, name: Projection): StoredTensor =>
      this.#weights.blocks[block]![name];
    if (pagesPerRow === 0) {
      return (block, x, names) => names.map((name) => ops.linear(x, weight(block, name)));
    }
    const pages = ops.input('pages', 'i32', [rows, pagesPerRow]);
    const active = ops.input('active', 'f32', [rows, pagesPerRow, ranksPerPage]);
    return (block, x, names) =>
      names.map((name) => {
        const { a, b } = this.#pools.get(poolKey({ block, projection: name }))!;
        const y = ops.linear(x, weight(block, name)); // [T, out]
        return ops.addLowRank(y, x, { a, b, pages, active });
      });
  }

  copyCells(from: number, to: number, count: number): void {
    for (const cache of [...this.#keys, ...this.#values]) {
      const bytes = cache.bytes / this.cells;
      this.#kernels.copyWithin(cache, { from: from * bytes, to: to * bytes, bytes: count * bytes });
    }
  }

  writePage(page: number, module: ModuleRef, data: PageData | null): void {
    const pool = this.#pools.get(poolKey(module));
    if (pool === undefined || page < 1 || page >= this.pages) {
      throw new GatewayError('SHAPE_MISMATCH', `page ${page} of ${poolKey(module)} does not exist`);
    }
    this.#writePage(pool.a, page, data?.a);
    this.#writePage(pool.b, page, data?.b);
  }

  #writePage(pool: StoredTensor, page: number, data: Uint16Array | undefined): void {
    const bytes = pool.bytes / this.pages;
    const source =
      data === undefined
        ? new Uint8Array(bytes)
        : new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    if (source.byteLength !== bytes) {
      throw new GatewayError(
        'SHAPE_MISMATCH',
        `a page has ${source.byteLength} bytes, want ${bytes}`,
      );
    }
    this.#kernels.write(pool, source, page * bytes);
  }

  [Symbol.dispose](): void {
    for (const program of this.#programs.values()) program[Symbol.dispose]();
    this.#programs.clear();
    this.#kernels[Symbol.dispose]();
  }
}

function poolKey({ block, projection }: ModuleRef): string {
  return `blk.${block}.${projection}`;
}

function storePools({ config, kernels, pages }: DecoderOptions): Map<string, PagePool> {
  const pools = new Map<string, PagePool>();
  for (let block = 0; block < config.blocks; block++) {
    for (const projection of projections) {
      const shape = projectionShape(config, projection);
      pools.set(poolKey({ block, projection }), {
        a: kernels.store('f16', [pages, ranksPerPage, shape.in]),
        b: kernels.store('f16', [pages, shape.out, ranksPerPage]),
      });
    }
  }
  return pools;
}

interface Batch {
  readonly rows: number;
  readonly segments: number;
  readonly pages: number;
}

/** Throws SHAPE_MISMATCH for anything that would read or write outside a sequence's run or a limit of the decoder. */
function checkBatch(segments: readonly Segment[], limits: Decoder): Batch {
  let rows = 0;
  let pages = 0;
  for (const segment of segments) {
    const { tokens, cellBase, position, adapter } = segment;
    const end = cellBase + position + tokens.length;
    if (tokens.length < 1 || position < 0 || cellBase < scrapCells || end > limits.cells) {
      throw new GatewayError(
        'SHAPE_MISMATCH',
        `step: ${tokens.length} tokens at position ${position} of cells ${cellBase} leave ${limits.cells} cells`,
      );
    }
    rows += tokens.length;
    if (adapter === null) continue;
    const need = pagesOf(segment);
    if (adapter.rank < 1 || need > pagesPerRowMax || adapter.pages.length < need) {
      throw new GatewayError(
        'SHAPE_MISMATCH',
        `step: rank ${adapter.rank} needs ${need} pages, got ${adapter.pages.length}`,
      );
    }
    pages = Math.max(pages, need);
  }
  if (segments.length < 1 || segments.length > limits.segmentsMax || rows > limits.tokensMax) {
    throw new GatewayError(
      'SHAPE_MISMATCH',
      `step: ${segments.length} segments of ${rows} tokens, limits are ${limits.segmentsMax} and ${limits.tokensMax}`,
    );
  }
  return { rows, segments: segments.length, pages };
}

/** Padding costs compute, every size costs a program: exact up to 8 rows, then steps of at most a quarter. */
function roundUpRows(rows: number, max: number): number {
  if (rows <= 8) return Math.min(rows, max);
  const step = 2 ** Math.max(1, Math.floor(Math.log2(rows - 1)) - 2);
  return Math.min(Math.ceil(rows / step) * step, max);
}

function roundUpPower(count: number, max: number): number {
  return Math.min(2 ** Math.ceil(Math.log2(count)), max);
}

function programSize(batch: Batch, limits: Decoder): ProgramSize {
  return {
    rows: roundUpRows(batch.rows, limits.tokensMax),
    segments: roundUpPower(batch.segments, limits.segmentsMax),
    pages: batch.pages === 0 ? 0 : roundUpPower(batch.pages, pagesPerRowMax),
  };
}

interface PlacedSegment {
  /** Index in the caller's order. */
  readonly index: number;
  readonly segment: Segment;
  readonly rowStart: number;
}

function pagesOf({ adapter }: Segment): number {
  return adapter === null ? 0 : Math.ceil(adapter.rank / ranksPerPage);
}

/** Rows in the order of falling page counts, so that a row costs its own pages only (Ops.addLowRank). */
function placeRows(segments: readonly Segment[]): readonly PlacedSegment[] {
  let rowStart = 0;
  return segments
    .map((segment, index) => ({ segment, index }))
    .sort((a, b) => pagesOf(b.segment) - pagesOf(a.segment))
    .map(({ segment, index }) => {
      const placed = { index, segment, rowStart };
      rowStart += segment.tokens.length;
      return placed;
    });
}

/** Fills the inputs; returns the output row of each segment that wants logits, by the caller's index. */
function writeInputs(
  program: Program,
  placed: readonly PlacedSegment[],
  size: ProgramSize,
): ReadonlyMap<number, number> {
  const tokens = new Int32Array(size.rows);
  const positions = new Int32Array(size.rows);
  const cells = new BigInt64Array(size.rows); // padding rows write cell 0, which is scrap
  const outputRows = new Int32Array(size.segments);
  const pages = new Int32Array(size.rows * size.pages); // page 0 is zero
  const active = new Float32Array(size.rows * size.pages * ranksPerPage);
  const outputs = new Map<number, number>();
  for (const { index, segment, rowStart } of placed) {
    const { adapter, position, cellBase } = segment;
    for (let i = 0; i < segment.tokens.length; i++) {
      const row = rowStart + i;
      tokens[row] = segment.tokens[i]!;
      positions[row] = position + i;
      cells[row] = BigInt(cellBase + position + i);
      if (adapter === null) continue;
      pages.set(adapter.pages.slice(0, pagesOf(segment)), row * size.pages);
      const from = row * size.pages * ranksPerPage;
      active.fill(adapter.scale, from, from + adapter.rank);
    }
    if (segment.wantsLogits) {
      outputRows[outputs.size] = rowStart + segment.tokens.length - 1;
      outputs.set(index, outputs.size);
    }
  }
  program.write('tokens', tokens);
  program.write('positions', positions);
  program.write('cells', cells);
  program.write('outputRows', outputRows);
  if (size.pages > 0) {
    program.write('pages', pages);
    program.write('active', active);
  }
  return outputs;
}

/** Reads rows of logits once each. */
class Logits implements StepResult {
  readonly #program: Program;
  readonly #outputs: ReadonlyMap<number, number>;
  readonly #vocabSize: number;
  readonly #rows: Map<number, Float32Array> = new Map();

  constructor(program: Program, outputs: ReadonlyMap<number, number>, vocabSize: number) {
    this.#program = program;
    this.#outputs = outputs;
    this.#vocabSize = vocabSize;
  }

  logits(segment: number): Float32Array {
    const known = this.#rows.get(segment);
    if (known !== undefined) return known;
    const output = this.#outputs.get(segment);
    if (output === undefined) {
      throw new GatewayError('SHAPE_MISMATCH', `segment ${segment} did not want logits`);
    }
    const row = new Float32Array(this.#vocabSize);
    this.#program.read('logits', output * this.#vocabSize, row);
    this.#rows.set(segment, row);
    return row;
  }

  argmax(segment: number): number {
    const row = this.logits(segment);
    let best = 0;
    for (let i = 1; i < row.length; i++) if (row[i]! > row[best]!) best = i;
    return best;
  }
}
