import { expect, it } from 'vitest';
import { createRandom } from '../../../src/adapters/families/seeded-random.ts';
import { Tape } from '../../../src/kernels/autodiff.ts';
import { GgmlKernels } from '../../../src/kernels/ggml/ggml-kernels.ts';
import type { StoredTensor } from '../../../src/kernels/kernels.ts';

// algorithms.md section 14: the gradients of a low-rank delta as chained products, dB = (Ax)ᵀ·dy and dA = (B·dy)ᵀ·x, without
// the gradient of the frozen weight's size between them.

const [d, rank, tokens] = [4096, 8, 8];
const denseBytes = 4 * d * d;

it('no gradient of the frozen weight’s size is made, and those of the factors are what it would give', () => {
  using kernels = new GgmlKernels({ threads: 1 });
  const random = createRandom(14n);
  const numbers = (count: number, scale: number): Float32Array =>
    Float32Array.from({ length: count }, () => (2 * random.uniform() - 1) * scale);
  const store = (rows: number, scale: number): [StoredTensor, Float32Array] => {
    const [stored, values] = [kernels.store('f32', [rows, d]), numbers(rows * d, scale)];
    kernels.write(stored, new Uint8Array(values.buffer), 0);
    return [stored, values];
  };
  // The frozen weights may be anything: what is looked at does not depend on them.
  const [w, transposed] = [kernels.store('f32', [d, d]), kernels.store('f32', [d, d])];
  const [a, aValues] = store(rank, d ** -0.5);
  const [b, bValues] = store(rank, 0.1);
  const [x, dy] = [numbers(tokens * d, 1), numbers(tokens * d, 1)];
  using program = kernels.compile(
    (ops) => {
      const input = ops.input('x', 'f32', [tokens, d]);
      const trainable = [a, b, input];
      const tape = new Tape(ops, { trainable, transposed: new Map([[w, transposed]]) });
      const h = tape.linear(input, a); // [T, R]
      const y = tape.add(tape.linear(input, w), tape.training.linearT(h, b)); // [T, out]
      const gradient = ops.input('dy', 'f32', [tokens, d]);
      const [da, db, dx] = tape.gradients([{ of: y, gradient }], trainable);
      return { da: da!, db: db!, dx: dx! };
    },
    { segments: 0 },
  );
  program.write('x', x);
  program.write('dy', dy);
  program.run([]);
  const numbersKept = tokens * rank + rank * (d + d) + tokens * (d + d);
  expect(kernels.scratchBytes).toBeLessThan(4 * 4 * numbersKept);
  expect(kernels.scratchBytes).toBeLessThan(denseBytes / 16);

  const [da, db] = [new Float32Array(rank * d), new Float32Array(rank * d)];
  program.read('da', 0, da);
  program.read('db', 0, db);
  // The other route: dW = dyᵀ·x first, then dA = B·dW and dB = (dW·Aᵀ)ᵀ, a row of dW at a time.
  const [daDense, dbDense] = [new Float64Array(rank * d), new Float64Array(rank * d)];
  const row = new Float64Array(d);
  for (let o = 0; o < d; o++) {
    row.fill(0);
    for (let t = 0; t < tokens; t++) {
      const slope = dy[t * d + o]!;
      for (let i = 0; i < d; i++) row[i]! += slope * x[t * d + i]!;
    }
    for (let r = 0; r < rank; r++) {
      const [at, left] = [r * d, bValues[r * d + o]!];
      let sum = 0;
      for (let i = 0; i < d; i++) {
        daDense[at + i]! += left * row[i]!;
        sum += row[i]! * aValues[at + i]!;
      }
      dbDense[at + o] = sum;
    }
  }
  for (const [got, wanted] of [[da, daDense] as const, [db, dbDense] as const]) {
    const away = Math.hypot(...wanted.map((value, i) => value - got[i]!));
    expect(away / Math.hypot(...wanted)).toBeLessThan(1e-6);
  }
});
