import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { GatewayError } from '../../src/errors.ts';
import {
  readSafetensors,
  type SafetensorsDtype,
  type SafetensorsFile,
  type SafetensorsTensor,
  toFloat32,
  writeSafetensors,
} from '../../src/model/safetensors.ts';
import { allocatedBy, mutate, mutations } from '../support/mutate.ts';
import { buildSafetensors } from '../support/safetensors-builder.ts';

const sizes = { F64: 8, F32: 4, F16: 2, BF16: 2, I64: 8, I32: 4, U8: 1, BOOL: 1 } as const;
const names = fc
  .string({ unit: 'binary', minLength: 1, maxLength: 10 })
  .filter((name) => !['__metadata__', '__proto__', 'constructor', 'prototype'].includes(name));
const tensorArbitrary: fc.Arbitrary<SafetensorsTensor> = fc
  .tuple(
    fc.constantFrom(...(Object.keys(sizes) as (keyof typeof sizes)[])),
    fc.array(fc.integer({ min: 0, max: 4 }), { maxLength: 4 }),
  )
  .chain(([dtype, shape]) => {
    const bytes = sizes[dtype] * shape.reduce((product, size) => product * size, 1);
    const data = fc.uint8Array({ minLength: bytes, maxLength: bytes });
    return data.map((values) => ({ dtype: dtype as SafetensorsDtype, shape, data: values }));
  });

function openOrRefuse(bytes: Uint8Array): SafetensorsFile | null {
  try {
    return readSafetensors(bytes);
  } catch (error) {
    if (!(error instanceof GatewayError)) throw error;
    expect(['INVALID_ADAPTER', 'UNSUPPORTED']).toContain(error.code);
    return null;
  }
}

describe('a safetensors file', () => {
  it('reads back what was written, and writes the same bytes again', () => {
    fc.assert(
      fc.property(
        fc.dictionary(names, tensorArbitrary, { maxKeys: 6, noNullPrototype: true }),
        fc.array(fc.tuple(names, fc.string({ unit: 'binary' })), { maxLength: 4 }),
        (tensors, texts) => {
          const written = new Map(Object.entries(tensors));
          const metadata = new Map(texts);
          const bytes = writeSafetensors(written, metadata);
          const file = readSafetensors(bytes);
          expect(new Map(file.tensors)).toEqual(written);
          expect(new Map(file.metadata)).toEqual(metadata);
          expect(writeSafetensors(file.tensors, file.metadata)).toEqual(bytes);
        },
      ),
      { numRuns: 300 },
    );
  });

  it('that is damaged is refused or read within its own bounds, in little memory', () => {
    const data = Uint8Array.from({ length: 24 }, (_, i) => i);
    const good = writeSafetensors(
      new Map<string, SafetensorsTensor>([
        ['layers.0.lora_A.weight', { dtype: 'F32', shape: [2, 2], data: data.subarray(0, 16) }],
        ['layers.0.lora_B.weight', { dtype: 'F16', shape: [4], data: data.subarray(16) }],
      ]),
      new Map([['format', 'pt']]),
    );
    const other = buildSafetensors('{"a":{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}}');
    let [read, refused] = [0, 0];
    fc.assert(
      fc.property(fc.boolean(), mutations, (isGood, changes) => {
        const bytes = mutate(isGood ? good : other, isGood ? other : good, changes);
        const allocated = allocatedBy(() => {
          const file = openOrRefuse(bytes);
          if (file === null) {
            refused++;
            return;
          }
          read++;
          // Every byte belongs to the length, the header or exactly one tensor.
          const length = Number(Buffer.from(bytes).readBigUInt64LE(0));
          let total = 8 + length;
          for (const tensor of file.tensors.values()) {
            total += tensor.data.length;
            if (/^B?F/.test(tensor.dtype)) {
              expect(toFloat32(tensor)).toHaveLength(tensor.shape.reduce((n, size) => n * size, 1));
            }
          }
          expect(total).toBe(bytes.length);
        });
        expect(allocated).toBeLessThan(64 * 1024 * 1024);
      }),
      { numRuns: 9_000 },
    );
    expect(read).toBeGreaterThan(30);
    expect(refused).toBeGreaterThan(100);
  });

  it('with any text as header is refused, or is JSON with the same names', () => {
    const pieces = fc.constantFrom(
      ...[
        '{',
        '}',
        '[',
        ']',
        ':',
        ',',
        '"',
        '"a"',
        '"b"',
        '"dtype"',
        '"U8"',
        '"shape"',
        '"\\u0061"',
      ],
      ...[
        '"data_offsets"',
        '[0,0]',
        '[0]',
        '"__metadata__"',
        '{}',
        ' ',
        '\\',
        '0',
        '1',
        '-',
        'null',
      ],
      '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}',
    );
    let accepted = 0;
    const header = fc.oneof(
      fc.array(pieces, { maxLength: 12 }).map((parts) => `{${parts.join('')}`),
      fc
        .array(
          fc.tuple(fc.constantFrom('"a"', '"b"', '"\\u0061"', '""', '"__metadata__"'), pieces),
          { maxLength: 3 },
        )
        .map((fields) => `{${fields.map((field) => field.join(':')).join(',')}}`),
    );
    fc.assert(
      fc.property(header, (text) => {
        const file = openOrRefuse(buildSafetensors(text));
        if (file === null) return;
        accepted++;
        const parsed = JSON.parse(text) as Record<string, unknown>;
        const wanted = Object.keys(parsed).filter((name) => name !== '__metadata__');
        expect(new Set(file.tensors.keys())).toEqual(new Set(wanted));
      }),
      { numRuns: 3_000 },
    );
    expect(accepted).toBeGreaterThan(30);
  });
});
