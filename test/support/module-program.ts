// One projection of a made-up base with what is trained on it, as a program: its output, and every gradient for a given gradient
// of that output. A token a column outside, a row inside: the same numbers.

import type { Site } from '../../src/adapters/families/family.ts';
import type { Columns } from '../../src/adapters/orthogonal.ts';
import { Tape } from '../../src/kernels/autodiff.ts';
import { elementCount } from '../../src/kernels/check.ts';
import type { Kernels, Program, StoredTensor, Tensor } from '../../src/kernels/kernels.ts';
import { type TrainedDelta, tensorName } from '../../src/model/trained-delta.ts';

export function bytesOfNumbers(values: ArrayLike<number>): Uint8Array {
  return new Uint8Array(Float32Array.from(values).buffer);
}

export class ModuleProgram implements Disposable {
  readonly rows: number;
  readonly #site: Site;
  readonly #kernels: Kernels;
  readonly #stored: ReadonlyMap<string, StoredTensor>;
  readonly #program: Program;
  readonly #gateRanks: readonly number[];

  constructor(kernels: Kernels, site: Site, delta: TrainedDelta, rows: number) {
    this.rows = rows;
    this.#site = site;
    this.#kernels = kernels;
    this.#gateRanks = delta.gateRanks;
    const shapes = { ...delta.trained, ...delta.constants };
    this.#stored = new Map(
      Object.entries(shapes).map(([name, shape]) => [name, kernels.store('f32', shape)]),
    );
    const w = kernels.store('f32', [site.out, site.in]);
    kernels.write(w, bytesOfNumbers(site.weight().data), 0);
    this.#program = kernels.compile(
      (ops) => {
        const x = ops.input('x', 'f32', [rows, site.in]);
        const names = Object.keys(delta.trained);
        const trainable = [...names.map((name) => this.#stored.get(name)!), x];
        const tape = new Tape(ops, { trainable, transposed: new Map() });
        const gates = new Map(
          delta.gateRanks.map((rank) => [rank, ops.input(`gate${rank}`, 'f32', [rows, rank])]),
        );
        const seen: Record<string, Tensor> = {};
        const y = delta.add(tape, (name) => this.#stored.get(name)!, {
          ...site,
          x,
          y: tape.linear(x, w),
          gate: (rank) => gates.get(rank)!,
          observe: (name, value) => {
            seen[tensorName(site, name)] = value;
          },
        });
        const seed = { of: y, gradient: ops.input('dy', 'f32', [rows, site.out]) };
        const gradients = tape.gradients([seed], trainable);
        const own = Object.fromEntries(names.map((name, i) => [name, gradients[i]!]));
        return { ...own, ...seen, y, dx: gradients.at(-1)! };
      },
      { segments: 0 },
    );
    this.write(new Map(Object.keys(shapes).map((name) => [name, this.#zeros(name)])));
  }

  #zeros(name: string): Float32Array {
    return new Float32Array(elementCount(this.#stored.get(name)!.shape));
  }

  write(numbers: Iterable<readonly [string, ArrayLike<number>]>): void {
    for (const [name, values] of numbers) {
      this.#kernels.write(this.#stored.get(name)!, bytesOfNumbers(values), 0);
    }
  }

  /** The output [out, T], and gradients readable by name, for tokens x [in, T] and a gradient [out, T]. */
  run(x: Columns, dy: Columns | null = null, gates: ArrayLike<number> = []): Columns {
    const { rows } = this;
    this.#program.write('x', Float32Array.from(x.data));
    this.#program.write(
      'dy',
      Float32Array.from(dy?.data ?? new Float64Array(rows * this.#site.out)),
    );
    for (const rank of this.#gateRanks) {
      const every = Float32Array.from({ length: rows * rank }, (_, i) => gates[i % rank]!);
      this.#program.write(`gate${rank}`, every);
    }
    this.#program.run([]);
    return { rows: this.#site.out, columns: rows, data: this.#numbers('y', rows * this.#site.out) };
  }

  #numbers(name: string, count: number): Float64Array {
    const out = new Float32Array(count);
    this.read(name, out);
    return Float64Array.from(out);
  }

  read(name: string, out: Float32Array): void {
    this.#program.read(name, 0, out);
  }

  dx(): Float64Array {
    return this.#numbers('dx', this.rows * this.#site.in);
  }

  [Symbol.dispose](): void {
    this.#program[Symbol.dispose]();
  }
}
