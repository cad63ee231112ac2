// The forward pass of a llama-like decoder over any Kernels, and the Stepper that runs it: read top to bottom. A
// program is recorded once per shape (ProgramSize) and replayed; adapters are the same ops at every projection, whatever
// the rows use (projector.ts).

import { LRUCache } from 'lru-cache';
import { GatewayError } from '../errors.ts';
import type { Kernels, Ops, Program, StoredTensor, Tensor } from '../kernels/kernels.ts';
import { AtomMemory, type StoredBank } from './atom-memory.ts';
import { decoderBlock } from './decoder-block.ts';
import { type DecoderConfig, moduleIndex, type Projection } from './decoder-config.ts';
import { type ModulePools, type PoolOptions, Projector, storePools } from './projector.ts';
import {
  checkBatch,
  type ProgramSize,
  placeRows,
  programSize,
  scrapCells,
  smallestWithAtoms,
  usesOf,
  writeInputs,
} from './step-inputs.ts';
import { Results } from './step-results.ts';
import type {
  AdapterRows,
  AtomBank,
  ModuleRef,
  PageData,
  Segment,
  Stepper,
  StepResult,
} from './stepper.ts';
import { declareUses, tableBytes, writeUses } from './use-table.ts';

export type BlockWeights = Readonly<Record<Projection | 'attn_norm' | 'ffn_norm', StoredTensor>>;

export interface DecoderWeights {
  readonly tokenEmbedding: StoredTensor; // [V, E]
  readonly outputNorm: StoredTensor; // [E]
  readonly output: StoredTensor; // [V, E], the embedding itself when tied
  readonly blocks: readonly BlockWeights[];
}

export interface DecoderOptions extends PoolOptions {
  readonly weights: DecoderWeights;
  /** Cells of KV memory. The first `scrapCells` of them take the writes of padding rows. */
  readonly cells: number;
  readonly cellType: 'f16' | 'f32';
  readonly tokensMax: number;
  readonly segmentsMax: number;
}

/** Programs kept: decode and prefill shapes, each with what its rows' adapters need. A record costs about 5 ms. */
const programsMax = 48;
/** What their use tables may take together: a program of 32 rows at rank 256 has 14 MB of gates and biases by module. */
const tableBytesMax = 256 * 1024 * 1024;

interface StepProgram {
  readonly program: Program;
  readonly size: ProgramSize;
  /** What its use table says. */
  uses: readonly AdapterRows[];
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
  readonly #pools: readonly ModulePools[]; // by module
  readonly #atoms: AtomMemory;
  readonly #programs: LRUCache<string, StepProgram>;
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
    this.#pools = pages > 1 ? storePools(options) : [];
    this.#atoms = new AtomMemory(kernels);
    this.#programs = new LRUCache<string, StepProgram>({
      max: programsMax,
      maxSize: tableBytesMax,
      sizeCalculation: ({ size }) => 1 + Math.min(tableBytes(size, config), tableBytesMax - 1),
      dispose: ({ program }) => program[Symbol.dispose](),
    });
    this.pageBytes = this.#pools.reduce((sum, { a, b }) => sum + (a.bytes + b.bytes) / pages, 0);
  }

  step(segments: readonly Segment[]): StepResult {
    const limits = {
      config: this.config,
      cells: this.cells,
      pages: this.pages,
      tokensMax: this.tokensMax,
      segmentsMax: this.segmentsMax,
      bank: this.#atoms.bank,
    };
    const size = programSize(checkBatch(segments, limits), limits);
    const known = this.#program(size);
    const uses = usesOf(segments);
    if (known.uses.length !== uses.length || known.uses.some((use, i) => use !== uses[i])) {
      known.uses = []; // nothing certain, if writing throws
      writeUses(known.program, uses, size, limits);
      known.uses = uses;
    }
    const placed = placeRows(segments, uses);
    const outputs = writeInputs(known.program, placed, size);
    known.program.run(
      placed.map(({ segment, rowStart }) => ({
        rowStart,
        rowCount: segment.tokens.length,
        cellBase: segment.cellBase,
        cells: segment.position + segment.tokens.length,
      })),
    );
    const step = { program: known.program, outputs, placed, rows: this.#rows };
    return new Results(step, this.config, this.#atoms.bank);
  }

  #program(size: ProgramSize): StepProgram {
    const key = Object.values(size).join('/');
    const known = this.#programs.get(key);
    if (known !== undefined) return known;
    const made = { program: this.#compile(size, this.#atoms.bank), size, uses: [] };
    this.#programs.set(key, made);
    return made;
  }

  #compile(size: ProgramSize, bank: StoredBank | null): Program {
    const { segments } = size;
    return this.#kernels.compile((ops) => this.#forward(ops, size, bank), { segments });
  }

  #forward(ops: Ops, size: ProgramSize, bank: StoredBank | null): Readonly<Record<string, Tensor>> {
    const { config } = this;
    const { rows } = size;
    const kvWidth = config.kvHeads * config.headSize;
    const tokens = ops.input('tokens', 'i32', [rows]);
    const positions = ops.input('positions', 'i32', [rows]);
    const cells = ops.input('cells', 'i64', [rows]);
    const outputRows = ops.input('outputRows', 'i32', [size.outputs]);
    const projector = this.#projector(ops, size, bank);

    let x = ops.embed(this.#weights.tokenEmbedding, tokens); // [T, E]
    this.#weights.blocks.forEach((block, i) => {
      x = decoderBlock(ops, { config, norms: block, positions }, x, {
        project: (h, names) =>
          projector?.project(i, h, names) ?? names.map((name) => ops.linear(h, block[name])),
        attend: (q, k, v) => {
          ops.writeCells(this.#keys[i]!, ops.reshape(k, [rows, kvWidth]), cells);
          ops.writeCells(this.#values[i]!, v, cells);
          return ops.attend(q, this.#keys[i]!, this.#values[i]!); // [T, H·D]
        },
      });
    });
    const last = ops.gatherRows(x, outputRows); // [outputs, E]
    const normed = ops.rmsNorm(last, this.#weights.outputNorm, config.normEps); // [outputs, E]
    const logits = ops.linear(normed, this.#weights.output); // [outputs, V]
    const atoms = (projector?.atomWeights ?? []).map((weights, i) => [`atoms${i}`, weights]);
    return { logits, ...Object.fromEntries(atoms) };
  }

  /** null: no row has an adapter. */
  #projector(ops: Ops, size: ProgramSize, bank: StoredBank | null): Projector | null {
    if (size.pages === 0) return null;
    const inputs = declareUses(ops, size, { config: this.config, pages: this.pages, bank });
    return new Projector(ops, { weights: this.#weights.blocks, pools: this.#pools, inputs, bank });
  }

  copyCells(from: number, to: number, count: number): void {
    for (const cache of [...this.#keys, ...this.#values]) {
      const bytes = cache.bytes / this.cells;
      this.#kernels.copyWithin(cache, { from: from * bytes, to: to * bytes, bytes: count * bytes });
    }
  }

  writePage(page: number, module: ModuleRef, data: PageData | null): void {
    const pool = this.#pools[moduleIndex(module.block, module.projection)];
    if (pool === undefined || page < 1 || page >= this.pages) {
      const name = `blk.${module.block}.${module.projection}`;
      throw new GatewayError('SHAPE_MISMATCH', `page ${page} of ${name} does not exist`);
    }
    this.#kernels.writePage(pool.a, page, data?.a ?? null);
    this.#kernels.writePage(pool.b, page, data?.b ?? null);
  }

  setAtomBank(bank: AtomBank | null): void {
    const room = bank === null ? null : this.#atoms.reserve(bank);
    // A bank that the kernels cannot use is refused here, and not in its first step.
    if (room !== null && this.#pools.length > 0) {
      this.#compile(smallestWithAtoms(room), room)[Symbol.dispose]();
    }
    for (const [key, { size }] of [...this.#programs.entries()]) {
      if (size.hasAtoms) this.#programs.delete(key);
    }
    this.#atoms.fill(room, bank);
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
    this.#programs.clear();
    this.#kernels[Symbol.dispose]();
  }
}
