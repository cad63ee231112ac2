import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { GatewayError } from '../../src/errors.ts';
import { memorySource } from '../../src/model/byte-source.ts';
import { readDecoderConfig } from '../../src/model/decoder-config.ts';
import { type GgufHeader, readGguf } from '../../src/model/gguf.ts';
import { buildGguf, buildTinyLlama } from '../support/gguf-builder.ts';
import { allocatedBy, mutate, mutations } from '../support/mutate.ts';

const llama = buildTinyLlama();
const mixed = buildGguf({
  keys: [
    ['general.alignment', { type: 'u32', value: 8 }],
    ['strings', { type: 'array', of: 'string', values: ['a', '', 'grüße'] }],
    ['numbers', { type: 'array', of: 'f32', values: [1, 2, 3] }],
    ['truths', { type: 'array', of: 'bool', values: [0, 1] }],
    ['big', { type: 'u64', value: 5n }],
  ],
  tensors: [
    { name: 'q', shape: [32, 2], type: 3, data: new Uint8Array(40) },
    { name: 'f', shape: [2, 2], type: 0, data: new Uint8Array(16) },
  ],
  padding: 8,
});

/** The file, or null when it is refused in the documented way; anything else propagates. */
function openOrRefuse(bytes: Uint8Array): GgufHeader | null {
  try {
    return readGguf(memorySource(bytes, 'INVALID_MODEL_FILE'));
  } catch (error) {
    if (!(error instanceof GatewayError)) throw error;
    expect(['INVALID_MODEL_FILE', 'UNSUPPORTED']).toContain(error.code);
    return null;
  }
}

function tolerate(run: () => unknown): void {
  try {
    run();
  } catch (error) {
    if (!(error instanceof GatewayError)) throw error;
  }
}

describe('a damaged GGUF file', () => {
  it('is refused or read within its own bounds, in little memory', () => {
    let [read, refused] = [0, 0];
    fc.assert(
      fc.property(fc.constantFrom(llama, mixed), mutations, (original, changes) => {
        const bytes = mutate(original, original === llama ? mixed : llama, changes);
        const allocated = allocatedBy(() => {
          const file = openOrRefuse(bytes);
          if (file === null) {
            refused++;
            return;
          }
          read++;
          let end = 0;
          for (const { offset, bytes: length } of file.tensors.values()) {
            expect(offset).toBeGreaterThanOrEqual(end);
            if (length > 0) expect(offset + length).toBeLessThanOrEqual(bytes.length);
            end = offset + length;
          }
          for (const key of file.metadata.keys) {
            for (const get of [
              'string',
              'number',
              'integer',
              'boolean',
              'strings',
              'numbers',
            ] as const) {
              tolerate(() => file.metadata[get](key));
            }
          }
          tolerate(() => readDecoderConfig(file));
        });
        expect(allocated).toBeLessThan(64 * 1024 * 1024);
      }),
      { numRuns: 3_000 },
    );
    // Damage that is always noticed, or never, would mean that the mutations test little.
    expect(read).toBeGreaterThan(100);
    expect(refused).toBeGreaterThan(100);
  });

  it('reads arbitrary bytes behind a good start without another error', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 400 }), (rest) => {
        const head = buildGguf({ tensorCount: 1n, keyCount: 2n, padding: 1 });
        openOrRefuse(Buffer.concat([head, rest]));
      }),
      { numRuns: 1_000 },
    );
  });
});

describe('a GGUF file that was written', () => {
  it('reads back with every string and number', () => {
    const name = fc.string({ unit: 'grapheme', maxLength: 12 });
    fc.assert(
      fc.property(
        fc.uniqueArray(
          name.filter((key) => key !== '' && key !== 'general.alignment'),
          { maxLength: 6 },
        ),
        fc.array(name, { maxLength: 6 }),
        fc.array(fc.bigInt({ min: 0n, max: (1n << 53n) - 1n }), { maxLength: 6 }),
        (names, strings, numbers) => {
          const keys = names.flatMap((key) => [
            [`s.${key}`, { type: 'array', of: 'string', values: strings }] as const,
            [`n.${key}`, { type: 'array', of: 'u64', values: numbers }] as const,
          ]);
          const { metadata } = readGguf(memorySource(buildGguf({ keys }), 'INVALID_MODEL_FILE'));
          for (const key of names) {
            expect(metadata.strings(`s.${key}`)).toEqual(strings);
            expect(metadata.numbers(`n.${key}`)).toEqual(numbers.map(Number));
          }
        },
      ),
      { numRuns: 200 },
    );
  });
});
