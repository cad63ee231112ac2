import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { GatewayError } from '../../../src/errors.ts';
import {
  readSafetensors,
  type SafetensorsDtype,
  type SafetensorsTensor,
  toFloat32,
  writeSafetensors,
} from '../../../src/model/safetensors.ts';
import { buildSafetensors } from '../../support/safetensors-builder.ts';

const golden = join(import.meta.dirname, '../../golden/adapters');
const goldenFiles = readdirSync(golden, { recursive: true, encoding: 'utf8' }).filter((name) =>
  name.endsWith('.safetensors'),
);

function errorOf(run: () => unknown): GatewayError {
  try {
    run();
  } catch (error) {
    if (error instanceof GatewayError) return error;
    throw error;
  }
  throw new Error('it was accepted');
}

const entry = (dtype: string, shape: string, offsets: string): string =>
  `{"dtype":"${dtype}","shape":${shape},"data_offsets":${offsets}}`;
const one = (shape: string, offsets: string, dtype = 'F32'): string =>
  `{"a":${entry(dtype, shape, offsets)}}`;
const zeros = (bytes: number): Uint8Array => new Uint8Array(bytes);

describe('readSafetensors', () => {
  it("reads every file that PEFT's writer made, and writes the same bytes again", () => {
    expect(goldenFiles.length).toBeGreaterThanOrEqual(6);
    for (const name of goldenFiles) {
      const bytes = readFileSync(join(golden, name));
      const file = readSafetensors(bytes);
      expect(file.metadata.get('format')).toBe('pt');
      expect(file.tensors.size).toBeGreaterThan(0);
      expect(Buffer.from(writeSafetensors(file.tensors, file.metadata)).equals(bytes)).toBe(true);
    }
  });

  it.each([
    ['no tensors', '{}', 0, []],
    ['spaces behind the header', '{}     ', 0, []],
    [
      'every kind of white space',
      '{\t"a" : {"dtype":\n"U8","shape":[ ],"data_offsets":[0 ,1]}\r}',
      1,
      [[]],
    ],
    ['a scalar', one('[]', '[0,4]'), 4, [[]]],
    ['an empty tensor', one('[0,5]', '[0,0]'), 0, [[0, 5]]],
    ['fields in another order', '{"a":{"data_offsets":[0,2],"shape":[1],"dtype":"F16"}}', 2, [[1]]],
    [
      'tensors out of order',
      `{"a":${entry('U8', '[2]', '[1,3]')},"b":${entry('U8', '[1]', '[0,1]')}}`,
      3,
      [[2], [1]],
    ],
    [
      'an empty tensor between two',
      `{"a":${entry('U8', '[1]', '[1,2]')},"e":${entry('U8', '[0]', '[1,1]')},"b":${entry('U8', '[1]', '[0,1]')}}`,
      2,
      [[1], [0], [1]],
    ],
  ])('accepts %s', (_, header, bytes, shapes) => {
    const file = readSafetensors(buildSafetensors(header, zeros(bytes)));
    expect([...file.tensors.values()].map(({ shape }) => shape)).toEqual(shapes);
  });

  it.each<[string, Uint8Array, RegExp]>([
    ['an empty file (B22)', zeros(0), /0 bytes are too few/],
    ['a length of 0 (B14)', buildSafetensors('', zeros(0)), /does not start with \{/],
    [
      'a length past the end (B14)',
      buildSafetensors('{}', zeros(0), 3n),
      /ends at 11, the file at 10/,
    ],
    [
      'a length of 100,000,001 (B14)',
      buildSafetensors('{}', zeros(0), 100_000_001n),
      /100000001 bytes/,
    ],
    [
      'a length of 2^63 (B14)',
      buildSafetensors('{}', zeros(0), 1n << 63n),
      /9223372036854775808 bytes/,
    ],
    ['a length of 2^64 - 1 (B14)', buildSafetensors('{}', zeros(0), -1n), /18446744073709551615/],
    [
      'an overlap (B16)',
      buildSafetensors(
        `{"a":${entry('U8', '[2]', '[0,2]')},"b":${entry('U8', '[2]', '[1,3]')}}`,
        zeros(3),
      ),
      /"b" overlaps/,
    ],
    [
      'ten tensors in one place (B16)',
      buildSafetensors(
        `{${Array.from({ length: 10 }, (_, i) => `"t${i}":${entry('F32', '[4]', '[0,16]')}`).join(',')}}`,
        zeros(16),
      ),
      /overlaps/,
    ],
    [
      'a hole',
      buildSafetensors(
        `{"a":${entry('U8', '[1]', '[0,1]')},"b":${entry('U8', '[1]', '[2,3]')}}`,
        zeros(3),
      ),
      /"b" leaves a hole/,
    ],
    ['a hole at the start', buildSafetensors(one('[1]', '[1,2]', 'U8'), zeros(2)), /leaves a hole/],
    [
      'bytes behind the data (B17)',
      buildSafetensors(one('[1]', '[0,4]'), zeros(5)),
      /take 4 bytes of 5/,
    ],
    [
      'two bytes missing (B17)',
      buildSafetensors(one('[1]', '[0,4]'), zeros(2)),
      /take 4 bytes of 2/,
    ],
    ['data without tensors', buildSafetensors('{}', zeros(1)), /take 0 bytes of 1/],
    [
      'a shape that is not its bytes (B18)',
      buildSafetensors(one('[2,2]', '[0,4]', 'I32'), zeros(4)),
      /\[2, 2\] is 16 bytes/,
    ],
    [
      'an end before its begin',
      buildSafetensors(one('[0]', '[4,0]'), zeros(4)),
      /is 0 bytes, not \[4, 0\]/,
    ],
    [
      'a size of 2^64 - 2 (B19)',
      buildSafetensors(one('[2,18446744073709551614]', '[0,16]'), zeros(16)),
      /whole number below 2\^53/,
    ],
    [
      'a size of 2^63 - 1 (B19)',
      buildSafetensors(one('[2,9223372036854775807]', '[0,16]'), zeros(16)),
      /whole number below 2\^53/,
    ],
    [
      'a size of 2^53 (B19)',
      buildSafetensors(one('[9007199254740992]', '[0,16]'), zeros(16)),
      /whole number/,
    ],
    [
      'a product past 2^53',
      buildSafetensors(one('[94906267,94906267]', '[0,16]'), zeros(16)),
      /too large/,
    ],
    [
      'a product past 2^53 before a 0',
      buildSafetensors(one('[9007199254740991,9007199254740991,0]', '[0,0]'), zeros(0)),
      /too large/,
    ],
    ['a negative size', buildSafetensors(one('[-1]', '[0,4]'), zeros(4)), /whole number/],
    ['a fraction', buildSafetensors(one('[1.0]', '[0,4]'), zeros(4)), /no \]/],
    ['an exponent', buildSafetensors(one('[1e0]', '[0,4]'), zeros(4)), /no \]/],
    ['a leading zero', buildSafetensors(one('[01]', '[0,4]'), zeros(4)), /whole number/],
    ['nine axes', buildSafetensors(one('[1,1,1,1,1,1,1,1,1]', '[0,4]'), zeros(4)), /more than 8/],
    ['three offsets', buildSafetensors(one('[1]', '[0,4,4]'), zeros(4)), /more than 2/],
    ['one offset', buildSafetensors(one('[1]', '[0]'), zeros(4)), /two data_offsets/],
    [
      'no dtype',
      buildSafetensors('{"a":{"shape":[1],"data_offsets":[0,4]}}', zeros(4)),
      /needs dtype/,
    ],
    [
      'an unknown field',
      buildSafetensors('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1}}', zeros(1)),
      /field "x"/,
    ],
    [
      'a repeated field',
      buildSafetensors(
        '{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        zeros(1),
      ),
      /field "dtype"/,
    ],
    [
      'a dtype that does not exist',
      buildSafetensors(one('[1]', '[0,4]', 'F33'), zeros(4)),
      /"F33", which does not/,
    ],
    [
      'a dtype that every object has',
      buildSafetensors(one('[1]', '[0,4]', 'toString'), zeros(4)),
      /"toString"/,
    ],
    [
      'the name __proto__ (B21)',
      buildSafetensors(`{"__proto__":${entry('U8', '[1]', '[0,1]')}}`, zeros(1)),
      /"__proto__" is not accepted/,
    ],
    [
      'the name constructor (B21)',
      buildSafetensors(`{"constructor":${entry('U8', '[1]', '[0,1]')}}`, zeros(1)),
      /"constructor" is not accepted/,
    ],
    [
      '__proto__ by an escape (B21)',
      buildSafetensors(`{"__pro\\u0074o__":${entry('U8', '[1]', '[0,1]')}}`, zeros(1)),
      /"__proto__" is not accepted/,
    ],
    [
      '__proto__ in the metadata',
      buildSafetensors('{"__metadata__":{"__proto__":"x"}}'),
      /key "__proto__"/,
    ],
    [
      'an empty name',
      buildSafetensors(`{"":${entry('U8', '[1]', '[0,1]')}}`, zeros(1)),
      /name is empty/,
    ],
    [
      'a lone surrogate as name (B22)',
      buildSafetensors(`{"\\ud800":${entry('U8', '[1]', '[0,1]')}}`, zeros(1)),
      /well-formed/,
    ],
    [
      'one name twice',
      buildSafetensors(
        `{"a":${entry('U8', '[1]', '[0,1]')},"\\u0061":${entry('U8', '[1]', '[1,2]')}}`,
        zeros(2),
      ),
      /"a" occurs twice/,
    ],
    [
      'metadata twice',
      buildSafetensors('{"__metadata__":{},"__metadata__":{}}'),
      /__metadata__ occurs twice/,
    ],
    ['a metadata key twice', buildSafetensors('{"__metadata__":{"a":"1","a":"2"}}'), /"a" twice/],
    ['metadata that is a number', buildSafetensors('{"__metadata__":{"a":1}}'), /no "/],
    [
      'bytes that are not UTF-8 (B22)',
      buildSafetensors(Uint8Array.of(123, 34, 255, 34, 125)),
      /not UTF-8/,
    ],
    ['a byte order mark', buildSafetensors('\ufeff{}'), /start with \{/],
    ['a space before the header', buildSafetensors(' {}'), /start with \{/],
    ['a header that is a list (B22)', buildSafetensors('[]'), /start with \{/],
    ['no JSON (B22)', buildSafetensors('{hello'), /no "/],
    ['two headers', buildSafetensors('{}{}'), /goes on/],
    ['zeros behind the header', buildSafetensors('{}\0\0'), /goes on/],
    [
      'a comma too many',
      buildSafetensors(`{"a":${entry('U8', '[1]', '[0,1]')},}`, zeros(1)),
      /no "/,
    ],
    ['an open string', buildSafetensors('{"a'), /inside a string/],
    ['an open escape', buildSafetensors('{"a\\'), /inside a string/],
    ['a broken escape', buildSafetensors('{"\\q":1}'), /broken string/],
    ['a raw line break in a name', buildSafetensors('{"a\nb":1}'), /broken string/],
    ['500,000 brackets (B23)', buildSafetensors(`{"a":${'['.repeat(500_000)}`), /no \{/],
    [
      'brackets in a shape (B23)',
      buildSafetensors(one(`[${'['.repeat(500_000)}`, '[0,4]'), zeros(4)),
      /whole number/,
    ],
    [
      'a zip of pickles (B25)',
      Buffer.concat([Buffer.from('PK\x03\x04'), zeros(60)]),
      /pickle or an archive/,
    ],
    [
      'a pickle (B25)',
      Buffer.from('\x80\x04\x95\x0f\x00\x00\x00\x00\x00\x00\x01data', 'latin1'),
      /pickle or an archive/,
    ],
    [
      'an older pickle (B25)',
      Buffer.from('\x80\x02}q\x00(X\x01\x00\x00\x00a', 'latin1'),
      /pickle or an archive/,
    ],
  ])('refuses %s', (_, bytes, message) => {
    const start = performance.now();
    const error = errorOf(() => readSafetensors(bytes));
    expect(error.code).toBe('INVALID_ADAPTER');
    expect(error.message).toMatch(message);
    // B23 took JSON.parse 3.3 s; the bound is far above what a loaded machine needs for one pass over a megabyte.
    expect(performance.now() - start).toBeLessThan(1_000);
  });

  it('refuses F8 as UNSUPPORTED', () => {
    const bytes = buildSafetensors(one('[4]', '[0,4]', 'F8_E4M3'), zeros(4));
    expect(errorOf(() => readSafetensors(bytes)).code).toBe('UNSUPPORTED');
  });

  it('holds the limits on header and tensors at their edges', () => {
    const header = `{"__metadata__":{"a":"${'x'.repeat(1_048_576 - 26)}"}}`;
    expect(readSafetensors(buildSafetensors(`${header} `)).metadata.size).toBe(1);
    expect(errorOf(() => readSafetensors(buildSafetensors(`${header}  `))).message).toMatch(
      /1048577/,
    );
    const many = (count: number): Uint8Array => {
      const names = Array.from(
        { length: count },
        (_, i) => `"${i}":${entry('U8', '[0]', '[0,0]')}`,
      );
      return buildSafetensors(`{${names.join(',')}}`);
    };
    expect(readSafetensors(many(10_000)).tensors.size).toBe(10_000);
    expect(errorOf(() => readSafetensors(many(10_001))).message).toMatch(/more than 10000/);
    const limits = { headerBytesMax: 60, code: 'ADAPTER_CORRUPT' as const };
    expect(readSafetensors(many(1), limits).tensors.size).toBe(1);
    expect(errorOf(() => readSafetensors(many(2), limits)).code).toBe('ADAPTER_CORRUPT');
  });

  it.each([0x4b50, 0x0280])(
    'reads a header of %i bytes, which begins like an archive',
    (length) => {
      const bytes = buildSafetensors(`{}${' '.repeat(length - 2)}`);
      expect(readSafetensors(bytes).tensors.size).toBe(0);
    },
  );

  it('leaves prototypes alone and keeps odd names in a Map', () => {
    const names = ['toString', 'hasOwnProperty', 'valueOf'];
    const header = names.map((name, i) => `"${name}":${entry('U8', '[1]', `[${i},${i + 1}]`)}`);
    const file = readSafetensors(buildSafetensors(`{${header.join(',')}}`, zeros(3)));
    expect([...file.tensors.keys()]).toEqual(names);
  });
});

describe('writeSafetensors', () => {
  const data = (...bytes: number[]): Uint8Array => Uint8Array.from(bytes);
  const tensors = new Map<string, SafetensorsTensor>([
    ['z', { dtype: 'U8', shape: [3], data: data(1, 2, 3) }],
    ['b', { dtype: 'F32', shape: [1], data: data(4, 5, 6, 7) }],
    ['a', { dtype: 'F32', shape: [], data: data(8, 9, 10, 11) }],
    ['é\n"', { dtype: 'F16', shape: [1, 0], data: data() }],
    ['wide', { dtype: 'I64', shape: [1], data: data(1, 0, 0, 0, 0, 0, 0, 0) }],
  ]);
  const metadata = new Map([
    ['z', '"\\\n'],
    ['a', '世界'],
  ]);

  it('gives the same bytes for the same content in any order, and they read back', () => {
    const bytes = writeSafetensors(tensors, metadata);
    const turned = writeSafetensors(
      new Map([...tensors].reverse()),
      new Map([...metadata].reverse()),
    );
    expect(turned).toEqual(bytes);
    const file = readSafetensors(bytes);
    expect(new Map(file.tensors)).toEqual(tensors);
    expect(new Map(file.metadata)).toEqual(metadata);
    expect([...file.tensors.keys()]).toEqual(['wide', 'a', 'b', 'é\n"', 'z']);
  });

  it('starts the data at a multiple of 8 and every tensor at a multiple of its element', () => {
    const bytes = writeSafetensors(tensors, metadata);
    const { tensors: read } = readSafetensors(bytes);
    const offsets = [...read.values()].map(({ data }) => data.byteOffset - bytes.byteOffset);
    expect(Math.min(...offsets) % 8).toBe(0);
    for (const { dtype, data } of read.values()) {
      const offset = data.byteOffset - bytes.byteOffset;
      const size = { I64: 8, F32: 4, F16: 2, U8: 1 }[dtype as 'I64' | 'F32' | 'F16' | 'U8'];
      expect(offset % size).toBe(0);
    }
  });

  it.each([
    ['a size that is not its data', 'a', [2], 'SHAPE_MISMATCH'],
    ['the name __metadata__', '__metadata__', [1], 'INVALID_ADAPTER'],
    ['the name __proto__', '__proto__', [1], 'INVALID_ADAPTER'],
    ['a lone surrogate', '\ud800', [1], 'INVALID_ADAPTER'],
  ])('refuses %s', (_, name, shape, code) => {
    const wrong = new Map([[name, { dtype: 'U8', shape, data: data(1) } as const]]);
    expect(errorOf(() => writeSafetensors(wrong)).code).toBe(code);
  });
});

describe('toFloat32', () => {
  const values = [0, -0, 1, -2.5, 65_504, Number.POSITIVE_INFINITY];
  const bits: Record<'F16' | 'BF16', number[]> = {
    F16: [0, 0x8000, 0x3c00, 0xc100, 0x7bff, 0x7c00],
    BF16: [0, 0x8000, 0x3f80, 0xc020, 0x477f, 0x7f80],
  };
  const encoded: Partial<Record<SafetensorsDtype, ArrayBuffer>> = {
    F64: Float64Array.from(values).buffer,
    F32: Float32Array.from(values).buffer,
    F16: Uint16Array.from(bits.F16).buffer,
    BF16: Uint16Array.from(bits.BF16).buffer,
  };

  it.each(['F64', 'F32', 'F16', 'BF16'] as const)('copies %s from any byte offset', (dtype) => {
    const source = new Uint8Array(encoded[dtype]!);
    // bf16 has 8 bits of mantissa: 65,504 is cut to 65,280.
    const wanted = Float32Array.from(dtype === 'BF16' ? values.with(4, 65_280) : values);
    for (const shift of [0, 1, 3]) {
      // A Buffer on purpose: its slice() is not a copy.
      const pool = Buffer.alloc(source.length + 8);
      pool.set(source, shift);
      const data = pool.subarray(shift, shift + source.length);
      const result = toFloat32({ dtype, shape: [values.length], data });
      expect(result).toEqual(wanted);
      pool.fill(0xff);
      expect(result).toEqual(wanted);
    }
  });

  it('refuses integers', () => {
    const tensor = { dtype: 'I32', shape: [1], data: new Uint8Array(4) } as const;
    expect(errorOf(() => toFloat32(tensor)).code).toBe('UNSUPPORTED');
  });
});
