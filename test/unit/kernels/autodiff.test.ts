import { describe, expect, it } from 'vitest';
import { Tape } from '../../../src/kernels/autodiff.ts';
import { GgmlKernels } from '../../../src/kernels/ggml/ggml-kernels.ts';
import type {
  ForwardOps,
  Kernels,
  Ops,
  StoredTensor,
  Tensor,
} from '../../../src/kernels/kernels.ts';
import { ReferenceKernels } from '../../../src/kernels/reference-kernels.ts';
import { causalMask } from '../../../src/kernels/training-ops.ts';
import { readAll } from '../../support/differentiate.ts';
import { createRng, normals } from '../../support/random.ts';

const none: ReadonlyMap<Tensor, Tensor> = new Map();

function storeNormals(
  kernels: Kernels,
  shape: readonly [number, number],
  seed: number,
): StoredTensor {
  const stored = kernels.store('f32', shape);
  const numbers = normals(createRng(seed), shape[0] * shape[1], shape[1] ** -0.5);
  kernels.write(stored, new Uint8Array(numbers.buffer), 0);
  return stored;
}

const [rows, width, depth] = [256, 64, 8];

/** A deep stack of gated layers with frozen and trained weights; its loss and the gradients of the trained ones. */
function deep(kernels: Kernels, recompute: boolean): Record<string, Float32Array> {
  const frozen = Array.from({ length: depth }, (_, i) => storeNormals(kernels, [width, width], i));
  const trained = Array.from({ length: depth }, (_, i) =>
    storeNormals(kernels, [width, width], 50 + i),
  );
  const layer = (ops: ForwardOps, x: Tensor, i: number): Tensor =>
    ops.add(x, ops.swiglu(ops.linear(x, frozen[i]!), ops.linear(x, trained[i]!)));
  const build = (ops: Ops): Record<string, Tensor> => {
    const tape = new Tape(ops, { trainable: trained, transposed: none });
    let x = tape.input('x', 'f32', [rows, width]);
    for (let i = 0; i < depth; i++) {
      x = recompute ? tape.checkpoint([x], (inner, [y]) => layer(inner, y!, i)) : layer(tape, x, i);
    }
    const targets = ops.input('targets', 'i32', [rows]);
    const loss = tape.training.crossEntropy(x, targets, ops.training.fill([rows], 1 / rows));
    const seed = { of: loss, gradient: ops.training.fill([1], 1) };
    const gradients = tape.gradients([seed], trained);
    return { loss, ...Object.fromEntries(gradients.map((gradient, i) => [`w${i}`, gradient])) };
  };
  using program = kernels.compile(build, { segments: 0 });
  program.write('x', normals(createRng(99), rows * width));
  program.write(
    'targets',
    Int32Array.from({ length: rows }, (_, i) => (i * 7) % width),
  );
  program.run([]);
  const results: Record<string, Float32Array> = { loss: readAll(program, 'loss', 1) };
  for (let i = 0; i < depth; i++) results[`w${i}`] = readAll(program, `w${i}`, width * width);
  return results;
}

describe('a checkpoint', () => {
  it('gives the same numbers on ggml with less scratch memory', () => {
    using keeping = new GgmlKernels({ threads: 1 });
    using again = new GgmlKernels({ threads: 1 });
    const [kept, computed] = [deep(keeping, false), deep(again, true)];
    expect(computed).toEqual(kept);
    expect(kept.w0!.some((value) => value !== 0)).toBe(true);
    // The gradients themselves stay; of three values a layer, one does, and one layer's values at a time.
    const gradients = depth * width ** 2 * 4;
    const [all, few] = [keeping.scratchBytes - gradients, again.scratchBytes - gradients];
    expect(few).toBeLessThan(0.6 * all);
  });

  it('gives the same numbers on the reference', () => {
    using kernels = new ReferenceKernels();
    expect(deep(kernels, true)).toEqual(deep(kernels, false));
  });
});

describe('the tape', () => {
  const compile = (build: (ops: Ops, tape: Tape, w: StoredTensor, x: Tensor) => Tensor): void => {
    using kernels = new ReferenceKernels();
    const w = storeNormals(kernels, [8, 8], 1);
    kernels
      .compile(
        (ops) => {
          const tape = new Tape(ops, { trainable: [w], transposed: none });
          return { y: build(ops, tape, w, ops.input('x', 'f32', [2, 8])) };
        },
        { segments: 1 },
      )
      [Symbol.dispose]();
  };

  it('refuses ops without a rule, and takes them where no gradient passes', () => {
    using kernels = new ReferenceKernels();
    const cache = kernels.store('f32', [16, 8]);
    const attend = (tape: Tape, x: Tensor): Tensor =>
      tape.attend(tape.reshape(x, [2, 1, 8]), cache, cache);
    compile((_, tape, __, x) => attend(tape, x));
    expect(() => compile((_, tape, w, x) => attend(tape, tape.linear(x, w)))).toThrow(
      'no gradient',
    );
    const write = (tape: Tape, x: Tensor): Tensor => {
      tape.writeCells(cache, x, tape.input('cells', 'i64', [2]));
      return x;
    };
    compile((_, tape, __, x) => write(tape, x));
    expect(() => compile((_, tape, w, x) => write(tape, tape.linear(x, w)))).toThrow('no gradient');
  });

  it('refuses a weight of another type than f32 without its transposed copy', () => {
    using kernels = new ReferenceKernels();
    const half = kernels.store('f16', [8, 8]);
    const build = (tape: Tape, ops: Ops, w: StoredTensor, x: Tensor): Tensor => {
      const y = tape.linear(tape.linear(x, w), half);
      return tape.gradients([{ of: y, gradient: ops.training.fill([2, 8], 1) }], [w])[0]!;
    };
    expect(() => compile((ops, tape, w, x) => build(tape, ops, w, x))).toThrow('transposed copy');
  });

  it('says when no gradient reaches what is wanted', () => {
    const build = (tape: Tape, ops: Ops, w: StoredTensor, x: Tensor): Tensor => {
      const seed = { of: tape.add(x, x), gradient: ops.training.fill([2, 8], 1) };
      return tape.gradients([seed], [w])[0]!;
    };
    expect(() => compile((ops, tape, w, x) => build(tape, ops, w, x))).toThrow('none reaches');
  });
});

describe('causalMask', () => {
  it('shows each row its own sequence up to itself, inside its window', () => {
    const mask = causalMask(Int32Array.of(0, 0, 1, 1, 1, 2), 3);
    const seen = Array.from({ length: 6 }, (_, row) =>
      [...mask.subarray(row * 3, row * 3 + 3)].map((value) => (value === 0 ? 1 : 0)).join(''),
    );
    expect(seen).toEqual(['100', '110', '001', '100', '110', '001']);
    expect(mask.filter((value) => value !== 0).every((value) => value === -Infinity)).toBe(true);
  });
});
