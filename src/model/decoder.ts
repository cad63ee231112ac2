// The forward pass of a llama-like decoder over any Kernels, and the Stepper that runs it: read top to bottom. A
// program is recorded once per shape (rows, segments, adapter pages) and replayed; adapters are the same two ops at
// every projection, whatever the rows use (design.md section 3).

import { GatewayError } from '../errors.ts';
import {
  dtypeLayout,
  type Kernels,
  type Ops,
  type PagePool,
  type Program,
  ranksPerPage,
  type StoredTensor,
  type Tensor,
} from '../kernels/kernels.ts';
import { decoderBlock } from './decoder-block.ts';
import {
  type DecoderConfig,
  type Projection,
  projectionShape,
  projections,
} from './decoder-config.ts';
import {
  checkBatch,
  type ProgramSize,
  placeRows,
  programSize,
  scrapCells,
  writeInputs,
} from './step-inputs.ts';
import type { AtomBank, ModuleRef, PageData, Segment, Stepper, StepResult } from './stepper.ts';

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
  /** What their numbers are kept as; f16 where a width is no multiple of q8_0's 32. */
  readonly pageType: 'f16' | 'q8_0';
  readonly tokensMax: number;
  readonly segmentsMax: number;
}

/** Programs kept: decode shapes 1…32 rows, prefill shapes, with and without adapters. A record costs about 5 ms. */
const programsMax = 48;

interface ModulePools {
  readonly a: StoredTensor; // [pages, 8, in]
  readonly b: StoredTensor; // [pages, 8, out]
}

export class Decoder implements Stepper {
  readonly config: DecoderConfig;
  readonly cells: number;
  readonly pages: number;
  readonly pageBytes: number;
  readonly tokensMax: number;
  readonly segmentsMax: number;
  readonly #kernels: Kernels;
  readonly #weights: DecoderWeights;
  readonly #keys: readonly StoredTensor[]; // per block [cells, Hkv·D]
  readonly #values: readonly StoredTensor[];
  readonly #pools: ReadonlyMap<string, ModulePools>;
  readonly #programs: Map<string, Program> = new Map();
  readonly #rows: Float32Array[] = []; // [V] each, of the last step's logits

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
      Array.from({ length: config.blocks }, () =>
        kernels.store(options.cellType, cellShape, 'undefined'),
      );
    this.#keys = caches();
    this.#values = caches();
    this.#pools = pages > 1 ? storePools(options) : new Map();
    const pools = [...this.#pools.values()];
    this.pageBytes = pools.reduce((sum, { a, b }) => sum + (a.bytes + b.bytes) / pages, 0);
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
    return new Logits({ program, outputs, segments, rows: this.#rows }, this.config.vocabSize);
  }

  #program(size: ProgramSize): Program {
    const key = `${size.rows}/${size.segments}/${size.outputs}/${size.pages}`;
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

  #forward(ops: Ops, { rows, outputs, pages }: ProgramSize): Readonly<Record<string, Tensor>> {
    const { config } = this;
    const kvWidth = config.kvHeads * config.headSize;
    const tokens = ops.input('tokens', 'i32', [rows]);
    const positions = ops.input('positions', 'i32', [rows]);
    const cells = ops.input('cells', 'i64', [rows]);
    const outputRows = ops.input('outputRows', 'i32', [outputs]);
    const project = this.#projector(ops, rows, pages);

    let x = ops.embed(this.#weights.tokenEmbedding, tokens); // [T, E]
    this.#weights.blocks.forEach((norms, i) => {
      x = decoderBlock(ops, { config, norms, positions }, x, {
        project: (h, names) => project(i, h, names),
        attend: (q, k, v) => {
          ops.writeCells(this.#keys[i]!, ops.reshape(k, [rows, kvWidth]), cells);
          ops.writeCells(this.#values[i]!, v, cells);
          return ops.attend(q, this.#keys[i]!, this.#values[i]!); // [T, H·D]
        },
      });
    });
    const last = ops.gatherRows(x, outputRows); // [outputs, E]
    const normed = ops.rmsNorm(last, this.#weights.outputNorm, config.normEps); // [outputs, E]
    return { logits: ops.linear(normed, this.#weights.output) }; // [outputs, V]
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
    const active = ops.input('active', 'f32', [rows, pagesPerRow * ranksPerPage]);
    const uses = ops.input('uses', 'i32', [rows]);
    return (block, x, names) => {
      const pools = names.map((name) => this.#pools.get(poolKey({ block, projection: name }))!);
      const parts = pools.map(({ a }) => ({ a, gate: active }));
      const hidden = ops.shrink(x, pages, parts, uses); // each [T, 8P]
      return names.map((name, i) => {
        const y = ops.linear(x, weight(block, name)); // [T, out]
        return ops.expand(y, hidden[i]!, pages, pools[i]!.b);
      });
    };
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
    this.#kernels.writePage(pool.a, page, data?.a ?? null);
    this.#kernels.writePage(pool.b, page, data?.b ?? null);
  }

  setAtomBank(_bank: AtomBank | null): void {
    throw new GatewayError('UNSUPPORTED', 'decoder: atoms are not served yet');
  }

  embeddings(ids: Int32Array): Float32Array {
    const { width } = this.config;
    const rows = 64;
    using program = this.#kernels.compile(
      (ops) => ({ rows: ops.embed(this.#weights.tokenEmbedding, ops.input('ids', 'i32', [rows])) }),
      { segments: 0 },
    );
    const found = new Float32Array(ids.length * width); // [ids, E]
    for (let from = 0; from < ids.length; from += rows) {
      const some = new Int32Array(rows);
      some.set(ids.subarray(from, from + rows));
      program.write('ids', some);
      program.run([]);
      program.read('rows', 0, found.subarray(from * width, (from + rows) * width));
    }
    return found;
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

function storePools(options: DecoderOptions): Map<string, ModulePools> {
  const { config, kernels, pages, pageType } = options;
  const pool = (use: PagePool['use'], width: number): PagePool => {
    const dtype = width % dtypeLayout[pageType].block === 0 ? pageType : 'f16';
    return { use, dtype, width };
  };
  const modules = Array.from({ length: config.blocks }, (_, block) =>
    projections.map((projection) => ({ block, projection })),
  ).flat();
  const stored = kernels.storePages(
    pages,
    modules.flatMap(({ projection }) => {
      const shape = projectionShape(config, projection);
      return [pool('shrink', shape.in), pool('expand', shape.out)];
    }),
  );
  return new Map(
    modules.map((module, i) => [poolKey(module), { a: stored[2 * i]!, b: stored[2 * i + 1]! }]),
  );
}

interface StepOutputs {
  readonly program: Program;
  /** Index of a segment → its first output. */
  readonly outputs: ReadonlyMap<number, number>;
  readonly segments: readonly Segment[];
  /** The decoder's, one an output, used again every step. */
  readonly rows: Float32Array[];
}

/** Reads rows of logits once each. */
class Logits implements StepResult {
  readonly #step: StepOutputs;
  readonly #vocabSize: number;
  readonly #known: Set<number> = new Set();

  constructor(step: StepOutputs, vocabSize: number) {
    this.#step = step;
    this.#vocabSize = vocabSize;
  }

  logits(segment: number, draft = 0): Float32Array {
    const { program, outputs, segments, rows } = this.#step;
    const first = outputs.get(segment);
    if (first === undefined || draft < 0 || draft > (segments[segment]!.drafts ?? 0)) {
      throw new GatewayError('SHAPE_MISMATCH', `segment ${segment} did not want logits ${draft}`);
    }
    const output = first + draft;
    rows[output] ??= new Float32Array(this.#vocabSize);
    if (!this.#known.has(output)) program.read('logits', output * this.#vocabSize, rows[output]);
    this.#known.add(output);
    return rows[output];
  }

  atomWeights(_segment: number): Float32Array | null {
    return null;
  }

  argmax(segment: number): number {
    const row = this.logits(segment);
    let best = 0;
    for (let i = 1; i < row.length; i++) if (row[i]! > row[best]!) best = i;
    return best;
  }
}
