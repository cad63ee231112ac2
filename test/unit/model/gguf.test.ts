import { closeSync, mkdtempSync, openSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { GatewayError } from '../../../src/errors.ts';
import { type ByteSource, memorySource } from '../../../src/model/byte-source.ts';
import { readDecoderConfig } from '../../../src/model/decoder-config.ts';
import { type GgufHeader, openGguf, readGguf } from '../../../src/model/gguf.ts';
import { baseModelPath } from '../../support/base-model.ts';
import {
  ByteWriter,
  buildGguf,
  type GgufSpec,
  type TensorSpec,
} from '../../support/gguf-builder.ts';

const open = (bytes: Uint8Array): GgufHeader => readGguf(memorySource(bytes, 'INVALID_MODEL_FILE'));

function errorOf(run: () => unknown): GatewayError {
  try {
    run();
  } catch (error) {
    if (error instanceof GatewayError) return error;
    throw error;
  }
  throw new Error('it was accepted');
}

const bytesOf = (write: (out: ByteWriter) => unknown): Uint8Array => {
  const out = new ByteWriter();
  write(out);
  return out.finish();
};
/** Magic, version 3 and no tensors: the number of keys follows. */
const startOf = (out: ByteWriter): ByteWriter => out.raw(Buffer.from('GGUF')).u32(3).u64(0n);
const counting = (bytes: number): Uint8Array => Uint8Array.from({ length: bytes }, (_, i) => i);
const tensor = (change: Partial<TensorSpec> = {}): TensorSpec => ({
  name: 'my_tensor_0',
  shape: [3, 5],
  type: 0,
  data: counting(60),
  ...change,
});
const second = (change: Partial<TensorSpec> = {}): TensorSpec =>
  tensor({ name: 'my_tensor_1', shape: [32], type: 8, data: counting(34), ...change });
const keys: GgufSpec['keys'] = [
  ['u8', { type: 'u8', value: 255 }],
  ['i8', { type: 'i8', value: -128 }],
  ['u16', { type: 'u16', value: 65_535 }],
  ['i16', { type: 'i16', value: -2 }],
  ['u32', { type: 'u32', value: 4_294_967_295 }],
  ['i32', { type: 'i32', value: -3 }],
  ['f32', { type: 'f32', value: 0.5 }],
  ['bool', { type: 'bool', value: 1 }],
  ['string', { type: 'string', value: 'grüße 🙂' }],
  ['u64', { type: 'u64', value: 2n ** 53n - 1n }],
  ['i64', { type: 'i64', value: -4n }],
  ['f64', { type: 'f64', value: 1e300 }],
  ['strings', { type: 'array', of: 'string', values: ['', 'a', '\ufeffb', '世界'] }],
  ['ints', { type: 'array', of: 'i32', values: [1, -1, 2] }],
  ['floats', { type: 'array', of: 'f32', values: [0.25, -8] }],
  ['empty', { type: 'array', of: 'u64', values: [] }],
];
const alignment = (value: number, type: 'u32' | 'i32' = 'u32'): NonNullable<GgufSpec['keys']> => [
  ...keys,
  ['general.alignment', { type, value }],
];
const rawKey = (bytes: Uint8Array): NonNullable<GgufSpec['keys']> => [
  ['key', { type: 'raw', bytes }],
];
const dim = (shape: readonly (number | bigint)[], type = 0): GgufSpec => ({
  tensors: [tensor({ shape, type, data: counting(32) })],
});

// The 33 hand-made files of llama.cpp's tests/test-gguf.cpp (commit 03f94f1), by the names they have there.
// `accepted`: read as stated; else a pattern of the message.
const cases: readonly (readonly [
  name: string,
  spec: GgufSpec | Uint8Array,
  outcome: 'accepted' | RegExp,
])[] = [
  ['HEADER_BAD_MAGIC', { magic: 'FUGG' }, /does not start with GGUF/],
  ['HEADER_BAD_VERSION_0', { version: 0 }, /this is 0/],
  ['HEADER_BAD_VERSION_1', { version: 1 }, /this is 1/],
  ['HEADER_BAD_VERSION_FUTURE', { version: 4 }, /this is 4/],
  ['HEADER_BAD_N_KV', { keyCount: -1n }, /number of keys is 18446744073709551615/],
  ['HEADER_BAD_N_TENSORS', { tensorCount: -1n }, /number of tensors is 18446744073709551615/],
  ['HEADER_EMPTY', {}, 'accepted'],
  [
    'KV_BAD_KEY_SIZE',
    bytesOf((out) => startOf(out).u64(1n).string('my_key_0', -1n).u32(0).u32(0)),
    /length of key 0 is 18446744073709551615/,
  ],
  ['KV_EMPTY_KEY', { keys: [['', { type: 'u8', value: 1 }]] }, /key 0 is empty/],
  ['KV_BAD_TYPE', { keys: rawKey(bytesOf((out) => out.u32(13).u32(0))) }, /unknown type 13/],
  ['KV_DUPLICATE_KEY', { keys: [keys[0]!, keys[1]!, keys[0]!] }, /"u8" occurs twice/],
  ['KV_BAD_ALIGN', { keys: alignment(13) }, /general\.alignment must be/],
  ['KV_WRONG_TYPE_ALIGN', { keys: alignment(32, 'i32') }, /general\.alignment must be/],
  ['KV_SUCCESS', { keys }, 'accepted'],
  ['TENSORS_BAD_NAME_SIZE', { tensors: [tensor({ name: 'n'.repeat(64) })] }, /tensor 0 is 64/],
  ['TENSORS_BAD_N_DIMS', { tensors: [tensor({ axes: 5 })] }, /has 5 axes/],
  [
    'TENSORS_BAD_SHAPE',
    dim([-1n & 0xffff_ffff_ffff_ffffn]),
    /axis 0 of .* is 18446744073709551615/,
  ],
  ['TENSORS_ZERO_DIM', { tensors: [tensor({ shape: [3, 0], data: counting(0) })] }, 'accepted'],
  ['TENSORS_NE_TOO_BIG', dim([4n * 2_147_483_647n, 4n * 2_147_483_647n]), /too large/],
  ['TENSORS_NBYTES_TOO_BIG', dim([1_534_191_746n, 1_534_191_746n], 27), /too large/],
  ['TENSORS_BAD_TYPE', { tensors: [tensor({ type: 200 })] }, /unknown type 200/],
  ['TENSORS_BAD_OFFSET', { tensors: [tensor({ offset: -1n })] }, /offset of "my_tensor_0" is 18/],
  ['TENSORS_DUPLICATE_NAME', { tensors: [tensor(), tensor()] }, /"my_tensor_0" occurs twice/],
  [
    'TENSORS_BAD_ALIGN',
    { keys: alignment(13), tensors: [tensor()], padding: 13 },
    /alignment must/,
  ],
  [
    'TENSORS_INCONSISTENT_ALIGN',
    { tensors: [tensor(), second()], padding: 1 },
    /"my_tensor_1" lies at 60, the tensors before it end at 64/,
  ],
  ['TENSORS_SUCCESS', { keys, tensors: [tensor(), second()] }, 'accepted'],
  [
    'TENSORS_CUSTOM_ALIGN',
    { keys: alignment(1), tensors: [tensor(), second()], padding: 1 },
    'accepted',
  ],
  [
    'DATA_NOT_ENOUGH_DATA',
    { tensors: [tensor({ shape: [8], data: counting(32) })], cut: 1 },
    /ends at \d+, the file at \d+/,
  ],
  ['DATA_BAD_ALIGN', { keys: alignment(13), tensors: [tensor()] }, /general\.alignment must be/],
  [
    'DATA_INCONSISTENT_ALIGN',
    { tensors: [second(), tensor({ name: 'last' })], padding: 1 },
    /"last" lies at 34, the tensors before it end at 64/,
  ],
  [
    'DATA_MEM_SIZE_OVERFLOW',
    {
      tensors: ['a', 'b'].map((name) =>
        tensor({ name, shape: [0x7fff_ffff_ffff_ffc0n], type: 24, data: counting(16) }),
      ),
    },
    /axis 0 of "a" is 9223372036854775744/,
  ],
  ['DATA_SUCCESS', { keys, tensors: [tensor(), second()] }, 'accepted'],
  [
    'DATA_CUSTOM_ALIGN',
    { keys: alignment(1), tensors: [tensor(), second()], padding: 1 },
    'accepted',
  ],
];

describe("llama.cpp's hand-made files", () => {
  it('are all there', () => {
    expect(new Set(cases.map(([name]) => name)).size).toBe(33);
  });

  it.each(cases)('%s', (_, spec, outcome) => {
    const bytes = spec instanceof Uint8Array ? spec : buildGguf(spec);
    if (outcome !== 'accepted' || spec instanceof Uint8Array) {
      const error = errorOf(() => open(bytes));
      expect(error.code).toBe('INVALID_MODEL_FILE');
      expect(error.message).toMatch(outcome);
      return;
    }
    const file = open(bytes);
    expect(file.metadata.keys).toEqual((spec.keys ?? []).map(([key]) => key));
    expect(file.alignment).toBe(spec.padding ?? 32);
    for (const { name: tensorName, shape, data } of spec.tensors ?? []) {
      const found = file.tensors.get(tensorName)!;
      expect(found.shape).toEqual(shape);
      const stored = bytes.subarray(found.offset, found.offset + found.bytes);
      expect(stored).toEqual(data);
    }
    expect(file.tensors.size).toBe(spec.tensors?.length ?? 0);
  });
});

describe('metadata', () => {
  const file = open(buildGguf({ keys }));
  const { metadata } = file;

  it('comes back as it was written, by type', () => {
    const numbers = ['u8', 'i8', 'u16', 'i16', 'u32', 'i32', 'f32', 'u64', 'i64', 'f64'];
    expect(numbers.map((key) => metadata.number(key))).toEqual([
      255, -128, 65_535, -2, 4_294_967_295, -3, 0.5, 9_007_199_254_740_991, -4, 1e300,
    ]);
    expect(metadata.boolean('bool')).toBe(true);
    expect(metadata.string('string')).toBe('grüße 🙂');
    expect(metadata.strings('strings')).toEqual(['', 'a', '\ufeffb', '世界']);
    expect(metadata.numbers('ints')).toEqual([1, -1, 2]);
    expect(metadata.numbers('floats')).toEqual([0.25, -8]);
    expect(metadata.numbers('empty')).toEqual([]);
  });

  it('is refused by a getter of another type, naming the key', () => {
    const wrong: readonly (() => unknown)[] = [
      () => metadata.string('u32'),
      () => metadata.boolean('u8'),
      () => metadata.number('string'),
      () => metadata.number('ints'),
      () => metadata.integer('f32'),
      () => metadata.integer('i64'),
      () => metadata.strings('ints'),
      () => metadata.strings('string'),
      () => metadata.numbers('strings'),
      () => metadata.string('absent'),
    ];
    const names = ['u32', 'u8', 'string', 'ints', 'f32', 'i64', 'ints', 'string', 'strings'];
    for (const [i, run] of wrong.entries()) {
      const error = errorOf(run);
      expect(error.code).toBe('INVALID_MODEL_FILE');
      expect(error.message).toContain([...names, 'absent'][i]);
    }
  });

  it('keeps scores that are declared int8 as int8: no getter reinterprets bytes (B09)', () => {
    const key = 'tokenizer.ggml.scores';
    const scores = open(
      buildGguf({ keys: [[key, { type: 'array', of: 'i8', values: [1, -1, 127] }]] }),
    );
    expect(scores.metadata.numbers(key)).toEqual([1, -1, 127]);
    expect(errorOf(() => scores.metadata.strings(key)).message).toContain(key);
  });

  it.each([
    ['a string longer than the file (B08)', (out: ByteWriter) => out.u32(8).u64(1n << 63n)],
    ['a string of one byte too many', (out: ByteWriter) => out.u32(8).u64(1_000n)],
    [
      'an array longer than the file (B08)',
      (out: ByteWriter) =>
        out
          .u32(9)
          .u32(0)
          .u64(1n << 63n),
    ],
    ['an array of 2^22 - 1 strings', (out: ByteWriter) => out.u32(9).u32(8).u64(4_194_303n)],
    [
      'an array of arrays (B08)',
      (out: ByteWriter) =>
        out
          .u32(9)
          .u32(9)
          .u64(1n << 62n),
    ],
    ['an array of an unknown type', (out: ByteWriter) => out.u32(9).u32(99).u64(1n)],
    ['a string that is not UTF-8', (out: ByteWriter) => out.u32(8).string(Uint8Array.of(0xff))],
    ['half a surrogate pair', (out: ByteWriter) => out.u32(8).string(Uint8Array.of(237, 160, 128))],
    ['a boolean of 2', (out: ByteWriter) => out.u32(7).raw(Uint8Array.of(2))],
  ])('is refused: %s', (_, write) => {
    const bytes = buildGguf({ keys: rawKey(bytesOf(write)) });
    expect(errorOf(() => open(bytes)).code).toBe('INVALID_MODEL_FILE');
  });

  it('refuses a 64-bit element that a double cannot hold', () => {
    const values = [1n, 2n ** 53n];
    const big = open(buildGguf({ keys: [['big', { type: 'array', of: 'u64', values }]] }));
    expect(errorOf(() => big.metadata.numbers('big')).message).toContain('big[1]');
  });

  it('escapes and shortens a hostile name in its message', () => {
    const name = `x\n"${'y'.repeat(5_000)}`;
    const value = { type: 'u8', value: 1 } as const;
    const { message } = errorOf(() =>
      open(
        buildGguf({
          keys: [
            [name, value],
            [name, value],
          ],
        }),
      ),
    );
    expect(message).not.toContain('\n');
    expect(message.length).toBeLessThan(300);
  });
});

describe('tensors', () => {
  it.each([
    ['a product that wraps 2^64 (B02)', dim([1152n, 2n ** 42n + 1n])],
    ['a quantised tensor of petabytes in a small file (B04)', dim([2n ** 40n, 2n ** 10n], 2)],
    ['a size that wraps when padded (B05)', dim([2n ** 62n - 1n])],
    ['rows that are not whole blocks', dim([33], 2)],
    ['a hole between two tensors', { tensors: [tensor(), second({ offset: 96n })] }],
    ['two tensors in one place', { tensors: [tensor(), second({ offset: 0n })] }],
  ])('refuses %s', (_, spec) => {
    expect(errorOf(() => open(buildGguf(spec))).code).toBe('INVALID_MODEL_FILE');
  });

  it.each([
    ['a zero before huge axes', [0, 2n ** 50n, 2n ** 50n]],
    ['a zero behind a huge axis (B12)', [2n ** 40n, 0]],
    ['no axes at all', []],
    ['four axes', [2, 1, 3, 1]],
  ])('accepts %s', (_, shape) => {
    const file = open(buildGguf(dim(shape)));
    expect(file.tensors.get('my_tensor_0')!.shape).toEqual(shape.map(Number));
  });

  it('names a type of ggml that is not read as UNSUPPORTED', () => {
    const error = errorOf(() => open(buildGguf({ tensors: [tensor({ type: 23 })] })));
    expect(error.code).toBe('UNSUPPORTED');
    expect(error.message).toContain('IQ4_XS');
  });

  it('names big-endian files as UNSUPPORTED', () => {
    expect(errorOf(() => open(buildGguf({ version: 0x0300_0000 }))).code).toBe('UNSUPPORTED');
  });

  it('reads version 2', () => {
    expect(open(buildGguf({ version: 2, tensors: [tensor()] })).version).toBe(2);
  });

  it('refuses every truncation of a file', () => {
    const whole = buildGguf({ keys, tensors: [tensor(), second()], padding: 32 });
    const end = open(whole).tensors.get('my_tensor_1')!;
    for (let length = 0; length < end.offset + end.bytes; length++) {
      expect(errorOf(() => open(whole.subarray(0, length))).code).toBe('INVALID_MODEL_FILE');
    }
  });
});

describe('a file that states more than it holds', () => {
  /** 100 GB: `head`, then one u64 over and over. Counts what is read, and stops a reader that reads it all. */
  function huge(head: Uint8Array, filler: bigint): { source: ByteSource; read: () => number } {
    let total = 0;
    const source = {
      bytes: 100e9,
      read: (offset: number, length: number) => {
        total += length;
        if (total > 100e6) throw new Error(`${total} bytes were read`);
        const bytes = new Uint8Array(length);
        const pattern = bytesOf((out) => out.u64(filler));
        for (let i = 0; i < length; i++) {
          const at = offset + i;
          bytes[i] = at < head.length ? head[at]! : pattern[(at - head.length) % 8]!;
        }
        return bytes;
      },
    };
    return { source, read: () => total };
  }

  it.each<[string, (out: ByteWriter) => unknown, bigint]>([
    ['a string of 2^40 bytes', (out) => out.u32(8).u64(1n << 40n), 0n],
    ['a string of 2^24 + 1 bytes', (out) => out.u32(8).u64((1n << 24n) + 1n), 0n],
    [
      'an array of 2^40 bytes',
      (out) =>
        out
          .u32(9)
          .u32(0)
          .u64(1n << 40n),
      0n,
    ],
    [
      '2^22 + 1 numbers',
      (out) =>
        out
          .u32(9)
          .u32(4)
          .u64((1n << 22n) + 1n),
      0n,
    ],
    [
      '2^22 strings of 16 MiB',
      (out) =>
        out
          .u32(9)
          .u32(8)
          .u64(1n << 22n),
      1n << 24n,
    ],
  ])('is refused with 8 MiB read at most: %s', (_, write, filler) => {
    const head = bytesOf((out) => write(startOf(out).u64(1n).string('key')));
    const { source, read } = huge(head, filler);
    expect(errorOf(() => readGguf(source)).code).toBe('INVALID_MODEL_FILE');
    expect(read()).toBeLessThan(8 * 1024 * 1024);
  });
});

describe('openGguf', () => {
  it("reads the default model's header without its data, and gives its tensors", async () => {
    const path = await baseModelPath();
    using file = openGguf(path);
    expect(file.bytes).toBe(98_362_432);
    const config = readDecoderConfig(file);
    expect(config).toMatchObject({ blocks: 30, width: 576, heads: 9, kvHeads: 3, ffnWidth: 1536 });
    expect(config).toMatchObject({ vocabSize: 49_152, tiedEmbeddings: true, ropeBase: 100_000 });
    expect(file.metadata.strings('tokenizer.ggml.tokens')).toHaveLength(49_152);
    const last = [...file.tensors.values()].at(-1)!;
    expect(file.read(last.offset, last.bytes)).toHaveLength(last.bytes);
    let read = 0;
    readGguf({
      bytes: file.bytes,
      read: (offset, length) => {
        read += length;
        return file.read(offset, length);
      },
    });
    // The header is 1.7 MB; arrays of strings are read once more to keep them.
    expect(read).toBeLessThan(5e6);
  });

  it('refuses what is no file, without its path, and closes what it refused', () => {
    const folder = mkdtempSync(join(tmpdir(), 'gguf-'));
    try {
      const absent = errorOf(() => openGguf(join(folder, 'absent.gguf')));
      expect(absent.message).toContain('ENOENT');
      expect(absent.message).not.toContain(folder);
      expect(errorOf(() => openGguf(folder)).code).toBe('INVALID_MODEL_FILE');
      const broken = join(folder, 'broken.gguf');
      writeFileSync(broken, 'GGUF');
      const before = lowestDescriptor();
      for (let i = 0; i < 5; i++) expect(() => openGguf(broken)).toThrow(GatewayError);
      expect(lowestDescriptor()).toBe(before);
    } finally {
      rmSync(folder, { recursive: true });
    }
  });

  it('reports a file that shrinks under it, and a read after close', () => {
    const folder = mkdtempSync(join(tmpdir(), 'gguf-'));
    try {
      const path = join(folder, 'shrinking.gguf');
      writeFileSync(path, buildGguf({ tensors: [tensor()] }));
      const file = openGguf(path);
      const { offset, bytes } = file.tensors.get('my_tensor_0')!;
      expect(file.read(offset, bytes)).toEqual(counting(60));
      truncateSync(path, offset + 1);
      expect(errorOf(() => file.read(offset, bytes)).code).toBe('INVALID_MODEL_FILE');
      file.close();
      file.close();
      expect(errorOf(() => file.read(0, 4)).code).toBe('INTERNAL');
    } finally {
      rmSync(folder, { recursive: true });
    }
  });

  function lowestDescriptor(): number {
    const descriptor = openSync(import.meta.filename, 'r');
    closeSync(descriptor);
    return descriptor;
  }
});
