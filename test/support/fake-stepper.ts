// A Stepper without a model: the next token is a hash of every cell that attention would read, and a cell is a hash of
// its token, of the *contents* of the adapter pages it was computed with, of its rank and of all cells before it. So a
// wrong page, rank, cell or a stale prefix changes everything that follows, as it would in a model, and a test sees it.

import { type AdapterManifest, type Generation, noOptions } from '../../src/adapters/adapter.ts';
import type { PackedAdapter } from '../../src/adapters/pack.ts';
import type { ResidentKey } from '../../src/adapters/residency.ts';
import type { BaseInfo } from '../../src/engine/messages.ts';
import { GatewayError } from '../../src/errors.ts';
import {
  type DecoderConfig,
  projectionShape,
  projections,
} from '../../src/model/decoder-config.ts';
import type {
  AdapterRows,
  AtomBank,
  ModuleRef,
  PageData,
  Segment,
  Stepper,
  StepResult,
} from '../../src/model/stepper.ts';

export const fakeConfig: DecoderConfig = {
  family: 'llama',
  name: 'fake-stepper',
  blocks: 2,
  width: 4,
  heads: 2,
  kvHeads: 1,
  headSize: 2,
  ffnWidth: 6,
  vocabSize: 64,
  contextLength: 4096,
  ropeSize: 2,
  ropeBase: 10_000,
  ropeStyle: 'norm',
  normEps: 1e-5,
  tiedEmbeddings: true,
};

export const fakeBaseHash: string = 'b'.repeat(64);

export function fakeBaseInfo(over: Partial<BaseInfo> = {}): BaseInfo {
  return {
    config: fakeConfig,
    hash: fakeBaseHash,
    contextMax: 4096,
    endTokens: [],
    backend: 'fake stepper',
    ...over,
  };
}

/** Letters, and halves of two-byte characters so that text depends on the detokeniser's state. */
export function fakeBytesOf(token: number): Uint8Array {
  if (token % 8 === 7) return Uint8Array.of(0xc3);
  if (token % 8 === 6) return Uint8Array.of(0xa0 + (token >>> 3));
  return Uint8Array.of(0x61 + (token % 26));
}

function mix(hash: number, word: number): number {
  let h = Math.imul(hash ^ word, 0x9e3779b1);
  h = Math.imul(h ^ (h >>> 15), 0x85ebca6b);
  return (h ^ (h >>> 13)) >>> 0;
}

export interface FakeStepperOptions {
  readonly cells: number;
  readonly pages: number;
  readonly tokensMax?: number;
  readonly segmentsMax?: number;
  /** Called before a step computes anything; may throw, or end the process. */
  readonly onStep?: (segments: readonly Segment[], step: number) => void;
  /** Changes the logits after `token` before anybody reads them. */
  readonly onLogits?: (segment: Segment, logits: Float32Array, token: number) => void;
}

export class FakeStepper implements Stepper {
  readonly config: DecoderConfig = fakeConfig;
  readonly cells: number;
  readonly pages: number;
  readonly pageBytes = 1000;
  readonly tokensMax: number;
  readonly segmentsMax: number;
  steps = 0;
  copies = 0;
  isDisposed = false;
  readonly #options: FakeStepperOptions;
  readonly #values: Uint32Array; // [cells]
  readonly #modules: Map<string, number>[]; // per page: module → hash of its contents
  #bank: AtomBank | null = null;

  constructor(options: FakeStepperOptions) {
    this.#options = options;
    this.cells = options.cells;
    this.pages = options.pages;
    this.tokensMax = options.tokensMax ?? 48;
    this.segmentsMax = options.segmentsMax ?? 8;
    this.#values = new Uint32Array(options.cells);
    this.#modules = Array.from({ length: options.pages }, () => new Map());
  }

  step(segments: readonly Segment[]): StepResult {
    this.#check(segments);
    this.steps += 1;
    this.#options.onStep?.(segments, this.steps);
    const rows = segments.map((segment) => this.#compute(segment));
    const logits = (index: number, draft = 0): Float32Array => {
      const row = rows[index]?.[draft];
      if (row === undefined) throw new Error(`no logits ${draft} for segment ${index}`);
      return row;
    };
    return {
      logits,
      argmax: (index) => indexOfMax(logits(index)),
      atomWeights: (index) => this.#atomWeights(segments[index]!),
    };
  }

  #check(segments: readonly Segment[]): void {
    const tokens = segments.reduce((sum, segment) => sum + segment.tokens.length, 0);
    const outputs = segments.reduce(
      (sum, { wantsLogits, drafts = 0 }) => sum + (wantsLogits ? 1 + drafts : 0),
      0,
    );
    const widest = Math.max(segments.length, outputs);
    if (tokens > this.tokensMax || widest > this.segmentsMax || segments.length === 0) {
      throw new GatewayError('SHAPE_MISMATCH', `${widest} segments or outputs, ${tokens} tokens`);
    }
    const ranges = segments.map(({ cellBase, position, tokens: { length } }) => ({
      start: cellBase,
      end: cellBase + position + length,
    }));
    for (const { start, end } of ranges) {
      if (start < 16 || end > this.cells) throw new GatewayError('SHAPE_MISMATCH', 'cells');
    }
    ranges.sort((a, b) => a.start - b.start);
    ranges.forEach((range, i) => {
      if (i > 0 && range.start < ranges[i - 1]!.end) throw new Error('sequences share cells');
    });
  }

  /** Logits after the last token that is no draft, then after each draft. */
  #compute(segment: Segment): Float32Array[] {
    const { tokens, cellBase, position, wantsLogits, drafts = 0 } = segment;
    const adapter = segment.adapter === null ? 0 : this.#fingerprint(segment.adapter);
    const rows: Float32Array[] = [];
    for (let i = 0; i < tokens.length; i++) {
      let value = mix(mix(0x51ed270b, tokens[i]!), adapter);
      const cell = cellBase + position + i;
      for (let other = cellBase; other < cell; other++) value = mix(value, this.#values[other]!);
      this.#values[cell] = value;
      if (wantsLogits && i >= tokens.length - 1 - drafts)
        rows.push(this.#logits(segment, value, tokens[i]!));
    }
    return rows;
  }

  #logits(segment: Segment, value: number, last: number): Float32Array {
    const logits = Float32Array.from(
      { length: this.config.vocabSize },
      (_, token) => (mix(value, token) >>> 8) / 0x200000, // [0, 8)
    );
    this.#options.onLogits?.(segment, logits, last);
    return logits;
  }

  /** One block of layers; the first atoms, equally. */
  #atomWeights({ adapter }: Segment): Float32Array | null {
    if (adapter === null || adapter.atoms === null) return null;
    const { topK, bias } = adapter.atoms;
    return Float32Array.from({ length: bias.length }, (_, k) => (k < topK ? 1 / topK : 0));
  }

  #fingerprint({ pages, rank, scale, gates, routing, atoms }: AdapterRows): number {
    if (gates === null && routing === null && pages.length !== Math.ceil(rank / 8))
      throw new Error(`${pages.length} pages, rank ${rank}`);
    let hash = mix(rank, scale * 1000);
    if (
      atoms !== null &&
      this.#bank?.covers?.has(atoms.bank) !== true &&
      atoms.bank !== this.#bank?.id
    )
      throw new Error(`bank ${atoms.bank}`);
    const groups = (routing?.groups ?? []).flatMap((group) => Object.values(group) as number[]);
    const numbers = [gates, routing?.bias, Float32Array.from(groups), atoms?.keys, atoms?.bias];
    for (const some of numbers) hash = mix(hash, some == null ? 0 : hashOf(some));
    hash = mix(hash, atoms?.topK ?? 0);
    if (atoms !== null) {
      const { atoms: all, K } = this.#bank!;
      hash = mix(hash, hashOf(all.subarray(0, (atoms.bias.length * all.length) / K)));
    }
    for (const page of pages) {
      const modules = this.#modules[page];
      if (modules === undefined || page === 0) throw new Error(`page ${page}`);
      for (const key of moduleKeys) hash = mix(hash, modules.get(key) ?? 0);
    }
    return hash;
  }

  copyCells(from: number, to: number, count: number): void {
    if (Math.abs(from - to) < count) throw new Error('ranges overlap');
    this.copies += 1;
    this.#values.copyWithin(to, from, from + count);
  }

  writePage(page: number, module: ModuleRef, data: PageData | null): void {
    let hash = 0;
    if (data !== null)
      for (const part of [data.a, data.b]) for (const bits of part) hash = mix(hash, bits);
    this.#modules[page]!.set(`${module.block}.${module.projection}`, hash);
  }

  setAtomBank(bank: AtomBank | null): void {
    this.#bank = bank;
  }

  embeddings(ids: Int32Array): Float32Array {
    const { width } = this.config;
    return Float32Array.from(
      { length: ids.length * width },
      (_, i) => (mix(ids[Math.floor(i / width)]!, i % width) >>> 8) / 0x1000000 - 0.5,
    );
  }

  [Symbol.dispose](): void {
    this.isDisposed = true;
  }
}

const moduleRefs: readonly ModuleRef[] = Array.from({ length: fakeConfig.blocks }, (_, block) =>
  projections.map((projection) => ({ block, projection })),
).flat();
const moduleKeys = moduleRefs.map(({ block, projection }) => `${block}.${projection}`);

function hashOf(numbers: Float32Array): number {
  return new Uint32Array(numbers.slice().buffer).reduce(mix, numbers.length);
}

function indexOfMax(values: Float32Array): number {
  return values.reduce((best, x, i) => (x > values[best]! ? i : best), 0);
}

/** The n-th fake generation. */
export function fakeGeneration(n: number): Generation {
  return `sha256:${n.toString(16).padStart(64, '0')}`;
}

/** Its contents are a function of the key and the rank only, also those of a blend. */
export function fakePacked(key: ResidentKey, rankMax: number): PackedAdapter {
  const generation = key as Generation;
  const seed = [...generation].reduce((h, character) => mix(h, character.charCodeAt(0)), 7);
  const manifest: AdapterManifest = {
    format: 'rankgate-adapter/3',
    kind: 'lora',
    describe: '',
    levels: null,
    options: noOptions,
    baseHash: fakeBaseHash,
    rankMax,
    modules: moduleRefs.map((module) => ({
      ...module,
      ...projectionShape(fakeConfig, module.projection),
      rank: rankMax,
    })),
    rankCurve: Array.from({ length: rankMax }, (_, i) => (i + 1) / rankMax),
    source: {
      format: 'peft',
      rank: rankMax,
      alpha: rankMax,
      rslora: false,
      targetModules: [],
      baseName: null,
    },
  };
  return {
    generation,
    manifest,
    pages: Math.ceil(rankMax / 8),
    floats: new Map(),
    bytes: 0,
    page(module, index) {
      const where = mix(
        mix(seed, index),
        module.block * 8 + projections.indexOf(module.projection),
      );
      if (where % 5 === 0) return null; // a module that this adapter leaves alone
      const shape = projectionShape(fakeConfig, module.projection);
      const fill = (length: number, salt: number): Uint16Array =>
        Uint16Array.from({ length }, (_, i) => mix(where + salt, i) & 0xffff);
      return { a: fill(8 * shape.in, 1), b: fill(8 * shape.out, 2) };
    },
  };
}
