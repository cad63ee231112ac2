// What a decoder must compute for one row, in f64, token by token, written from the formulas: no batch, no program, no op of
// src/kernels. The oracle of mixed-batch.test.ts. Adapters are taken as the contract says (stepper.ts, AdapterRows).

import { type DecoderConfig, projections } from '../../src/model/decoder-config.ts';
import { openGguf } from '../../src/model/gguf.ts';
import type { AdapterRows, AtomBank } from '../../src/model/stepper.ts';

type Vector = number[];
type Matrix = readonly ArrayLike<number>[];

/** Numbers of a page by module: ranks of `a` and of `b`. */
export interface PlainPage {
  readonly modules: ReadonlyArray<{ readonly a: Matrix; readonly b: Matrix }>;
}

export interface PlainAdapter {
  readonly rows: AdapterRows;
  readonly page: (page: number) => PlainPage;
  readonly bank: AtomBank | null;
}

export interface PlainToken {
  readonly logits: Vector;
  /** Per block of layers [K]. */
  readonly atomWeights: readonly Vector[];
}

const dot = (a: ArrayLike<number>, b: ArrayLike<number>): number => {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i]! * b[i]!;
  return sum;
};
const times = (matrix: Matrix, x: ArrayLike<number>): Vector => matrix.map((row) => dot(row, x));
const plus = (a: Vector, b: ArrayLike<number>): Vector => a.map((value, i) => value + b[i]!);
const rowsOf = (flat: ArrayLike<number>, width: number): Matrix =>
  Array.from({ length: flat.length / width }, (_, i) =>
    Array.from({ length: width }, (__, k) => flat[i * width + k]!),
  );

function softmax(values: Vector): Vector {
  const top = Math.max(...values);
  const powers = values.map((value) => Math.exp(value - top));
  const total = powers.reduce((sum, power) => sum + power, 0);
  return powers.map((power) => power / total);
}

/** Indices of the k largest, the lower index of equal ones. */
function largest(values: Vector, k: number): number[] {
  const order = values.map((_, i) => i).sort((a, b) => values[b]! - values[a]! || a - b);
  return order.slice(0, k);
}

export class PlainDecoder {
  readonly #config: DecoderConfig;
  readonly #tensor: (name: string) => Matrix;

  /** An f32 file with tied embeddings; its blocks are repeated until there are `config.blocks`. */
  constructor(path: string, config: DecoderConfig, fileBlocks: number) {
    this.#config = config;
    using file = openGguf(path);
    const tensors = new Map<string, Matrix>();
    for (const [name, { offset, bytes, shape }] of file.tensors) {
      const flat = new Float32Array(file.read(offset, bytes).slice().buffer);
      tensors.set(name, rowsOf(flat, shape[0]!));
    }
    this.#tensor = (name) => {
      const own = name.replace(/^blk\.(\d+)/, (_, block) => `blk.${Number(block) % fileBlocks}`);
      return tensors.get(own)!;
    };
  }

  /** What follows each token of a sequence. */
  run(tokens: readonly number[], adapter: PlainAdapter | null): PlainToken[] {
    const { blocks, heads, kvHeads, headSize } = this.#config;
    const keys: Vector[][] = Array.from({ length: blocks }, () => []);
    const values: Vector[][] = Array.from({ length: blocks }, () => []);
    return tokens.map((token, position) => {
      const delta = adapter === null ? null : new PlainDelta(adapter, this.#config);
      const project = (block: number, projection: number, x: Vector): Vector => {
        const y = times(this.#tensor(`blk.${block}.${projections[projection]}.weight`), x);
        return delta === null ? y : plus(y, delta.of(block, projection, x));
      };
      let x: Vector = Array.from(this.#tensor('token_embd.weight')[token]!);
      for (let block = 0; block < blocks; block++) {
        const h = this.#norm(x, `blk.${block}.attn_norm.weight`);
        const q = this.#rope(project(block, 0, h), position);
        keys[block]!.push(this.#rope(project(block, 1, h), position));
        values[block]!.push(project(block, 2, h));
        const attended: Vector = [];
        for (let head = 0; head < heads; head++) {
          const from = Math.floor((head * kvHeads) / heads) * headSize;
          const part = (row: Vector): Vector => row.slice(from, from + headSize);
          const own = q.slice(head * headSize, (head + 1) * headSize);
          const shares = softmax(
            keys[block]!.map((key) => dot(own, part(key)) / Math.sqrt(headSize)),
          );
          for (let d = 0; d < headSize; d++) {
            attended.push(
              dot(
                shares,
                values[block]!.map((value) => part(value)[d]!),
              ),
            );
          }
        }
        x = plus(x, project(block, 3, attended));
        const g = this.#norm(x, `blk.${block}.ffn_norm.weight`);
        const [gate, up] = [project(block, 4, g), project(block, 5, g)];
        const gated = gate.map((value, i) => (value / (1 + Math.exp(-value))) * up[i]!);
        x = plus(x, project(block, 6, gated));
      }
      const logits = times(this.#tensor('token_embd.weight'), this.#norm(x, 'output_norm.weight'));
      return { logits, atomWeights: delta?.atomWeights ?? [] };
    });
  }

  #norm(x: Vector, name: string): Vector {
    const weight = this.#tensor(name)[0]!;
    const scale = 1 / Math.sqrt(dot(x, x) / x.length + this.#config.normEps);
    return x.map((value, i) => value * scale * weight[i]!);
  }

  /** Adjacent pairs of each head. */
  #rope(x: Vector, position: number): Vector {
    const { headSize, ropeBase } = this.#config;
    const turned = [...x];
    for (let i = 0; i < x.length; i += 2) {
      const angle = position * ropeBase ** (-(i % headSize) / headSize);
      const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
      turned[i] = x[i]! * cos - x[i + 1]! * sin;
      turned[i + 1] = x[i]! * sin + x[i + 1]! * cos;
    }
    return turned;
  }
}

/** One token's deltas, from the first block to the last. */
class PlainDelta {
  readonly atomWeights: Vector[] = [];
  readonly #adapter: PlainAdapter;
  readonly #modules: number;
  readonly #summaries: Vector[] = [];

  constructor(adapter: PlainAdapter, config: DecoderConfig) {
    this.#adapter = adapter;
    this.#modules = config.blocks * projections.length;
  }

  of(block: number, projection: number, x: Vector): Vector {
    const { rows, page } = this.#adapter;
    const module = block * projections.length + projection;
    const pages = rows.pages.map((number) => page(number).modules[module]!);
    const own = (all: Float32Array): Vector => {
      const width = all.length / this.#modules;
      return Array.from(all.subarray(module * width, (module + 1) * width));
    };
    const gates = rows.gates === null ? null : own(rows.gates);
    let h = pages
      .flatMap(({ a }) => times(a, x))
      .map((value, i) => {
        return value * (gates?.[i] ?? (i < rows.rank ? rows.scale : 0));
      });
    if (rows.routing !== null) h = routed(h, x, rows, own(rows.routing.bias));
    if (rows.atoms !== null) h = this.#mixed(h, block, projection);
    const b = pages.flatMap((one) => [...one.b]);
    return h.reduce<Vector>(
      (y, value, i) =>
        plus(
          y,
          Array.from(b[i]!, (n) => n * value),
        ),
      [...new Array<number>(b[0]!.length).fill(0)],
    );
  }

  #mixed(all: Vector, block: number, projection: number): Vector {
    const { bank, rows } = this.#adapter;
    const { r, dq, K, blockLayers } = bank!;
    const h = all.slice(0, r);
    const isFirst = block % blockLayers === 0 && projection === 0;
    if (isFirst) {
      const asked = times(rowsOf(bank!.summary, r), h);
      const shares = softmax(this.#summaries.map((s) => dot(asked, s) / Math.sqrt(dq)));
      const context = h.map((_, i) =>
        dot(
          shares,
          this.#summaries.map((s) => s[i]!),
        ),
      );
      const query = plus(
        times(rowsOf(bank!.query, r), h),
        times(rowsOf(bank!.context, r), context),
      );
      const logits = times(rowsOf(rows.atoms!.keys, dq), query).map(
        (value, k) => value / Math.sqrt(dq) + rows.atoms!.bias[k]!,
      );
      const chosen = largest(logits, rows.atoms!.topK);
      const weights = softmax(chosen.map((k) => logits[k]!));
      const pi = new Array<number>(K).fill(0);
      chosen.forEach((k, i) => {
        pi[k] = weights[i]!;
      });
      this.atomWeights.push(pi);
    }
    const pi = this.atomWeights.at(-1)!;
    const atoms = Array.from({ length: K }, (_, k) =>
      rowsOf(bank!.atoms.subarray(k * r * r, (k + 1) * r * r), r),
    );
    const mixed = h.map((_, i) =>
      pi.reduce((sum, share, k) => sum + share * dot(atoms[k]![i]!, h), 0),
    );
    if (isFirst) this.#summaries.push(mixed);
    return [...mixed, ...all.slice(r)];
  }
}

function routed(h: Vector, x: Vector, rows: AdapterRows, bias: Vector): Vector {
  const out = [...h];
  const norm = Math.sqrt(dot(x, x));
  for (const { firstPage, pages, topK, temperature } of rows.routing!.groups) {
    const [from, end] = [8 * firstPage, 8 * (firstPage + pages)];
    const own = h.slice(from, end);
    const isFly = temperature === 0;
    const scores = own.map((value, i) =>
      isFly ? Math.abs(value) + bias[from + i]! : (Math.abs(value) * bias[from + i]!) / norm,
    );
    const chosen = largest(scores, topK);
    const shares = isFly
      ? chosen.map(() => 1)
      : softmax(chosen.map((i) => scores[i]! / temperature));
    out.fill(0, from, end);
    chosen.forEach((i, j) => {
      out[from + i] = own[i]! * shares[j]!;
    });
  }
  return out;
}
