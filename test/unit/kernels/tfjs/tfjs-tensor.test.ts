import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { dequantizeRows } from '../../../../src/kernels/dequantize.ts';
import { dtypeLayout, type WeightType } from '../../../../src/kernels/kernels.ts';
import { TfjsTensor } from '../../../../src/kernels/tfjs/tfjs-tensor.ts';
import { loadForTest, whyNoTensorflow } from '../../../support/tensorflow.ts';

// A stored tensor against an array of bytes and the numbers that those are: whatever is written in whatever pieces, and
// whichever layouts were asked for in between.

const [rows, width] = [11, 64];
const types = ['f32', 'f16', 'bf16', 'q8_0', 'q4_1'] as const;

const byteAt = fc.integer({ min: 0, max: 2 ** 20 });
const act = fc.oneof(
  fc.record({ kind: fc.constant('write'), at: byteAt, count: byteAt, seed: fc.nat(1000) }),
  fc.record({ kind: fc.constant('cut'), partRows: fc.integer({ min: 1, max: 6 }) }),
  fc.record({ kind: fc.constantFrom('columns', 'whole') }),
);

/** Bytes whose numbers are finite and survive f32: no exponent is all ones. */
function someBytes(type: WeightType, count: number, seed: number): Uint8Array {
  const { block, bytes } = dtypeLayout[type];
  const values = Float32Array.from({ length: count / bytes }, (_, i) => ((seed + i) % 97) / 32 - 1);
  if (type === 'f32') return new Uint8Array(values.buffer);
  if (type === 'f16' || type === 'bf16') {
    // 0x3c00…0x3fff are ordinary numbers of both types.
    const bits = Uint16Array.from(
      { length: count / 2 },
      (_, i) => 0x3c00 + ((seed + i * 7) % 1024),
    );
    return new Uint8Array(bits.buffer);
  }
  const out = Uint8Array.from({ length: count }, (_, i) => (seed + i * 13) % 256);
  expect(block).toBe(32);
  for (let at = 0; at < count; at += bytes) {
    for (let half = 0; half < (type === 'q4_1' ? 4 : 2); half += 2) {
      out[at + half] = seed % 256;
      out[at + half + 1] = 0x3c;
    }
  }
  return out;
}

const missing = whyNoTensorflow('@tensorflow/tfjs');
if (missing !== null) {
  it.skip(`a stored tensor of TensorFlow.js is what was written (skipped: ${missing})`, () =>
    undefined);
} else {
  const { tf } = await loadForTest('@tensorflow/tfjs');

  describe('a stored tensor of TensorFlow.js', () => {
    for (const type of types) {
      it(`${type}: is what was written, in bytes and in numbers`, () => {
        const unit = dtypeLayout[type].bytes;
        fc.assert(
          fc.property(fc.array(act, { maxLength: 12 }), (acts) => {
            const before = tf.memory().numTensors;
            const cut = { tail: [width], partRows: rows };
            const tensor = new TfjsTensor(tf, { dtype: type, shape: [rows, width] }, cut);
            const wanted = new Uint8Array(tensor.bytes);
            for (const step of acts) {
              if ('seed' in step) {
                const units = tensor.bytes / unit;
                const from = step.at % units;
                const count = 1 + (step.count % (units - from));
                const bytes = someBytes(type, count * unit, step.seed);
                tensor.write(bytes, from * unit);
                wanted.set(bytes, from * unit);
              } else if ('partRows' in step) tensor.cut(step.partRows);
              else {
                tf.tidy(() => {
                  if (step.kind === 'columns') tensor.columns();
                  else tensor.whole();
                  return {};
                });
              }
            }
            const numbers = new Float32Array(rows * width);
            dequantizeRows(type, wanted, numbers);
            const got = new Uint8Array(tensor.bytes);
            tensor.read(got, 0);
            expect(got).toEqual(wanted);
            const inside = new Uint8Array(3 * unit);
            tensor.read(inside, 5 * unit);
            expect(inside).toEqual(wanted.subarray(5 * unit, 8 * unit));
            tf.tidy(() => {
              expect(Float32Array.from(tensor.whole().dataSync())).toEqual(numbers);
              const some = Float32Array.from(tensor.rows(3, 5).dataSync());
              expect(some).toEqual(numbers.subarray(3 * width, 8 * width));
              const turned = numbers.map(
                (_, i) => numbers[(i % rows) * width + Math.floor(i / rows)]!,
              );
              expect(Float32Array.from(tensor.columns().dataSync())).toEqual(turned);
              return {};
            });
            tensor.dispose();
            expect(tf.memory().numTensors).toBe(before);
          }),
          { numRuns: 60 },
        );
      });
    }
  });
}
