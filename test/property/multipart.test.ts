import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { GatewayError } from '../../src/errors.ts';
import { boundaryOf, readMultipart } from '../../src/server/multipart.ts';

const boundary = 'x-Y_9';

async function* inPieces(bytes: Buffer, sizes: readonly number[]): AsyncGenerator<Uint8Array> {
  for (let at = 0, i = 0; at < bytes.length; i++) {
    const size = sizes[i % sizes.length]!;
    yield bytes.subarray(at, at + size);
    at += size;
  }
}

async function parse(bytes: Buffer, sizes: readonly number[]): Promise<[string, string][]> {
  const parts: [string, string][] = [];
  for await (const part of readMultipart(inPieces(bytes, sizes), boundary)) {
    const chunks: Uint8Array[] = [];
    for await (const chunk of part.body) chunks.push(chunk);
    parts.push([part.name, Buffer.concat(chunks).toString('latin1')]);
  }
  return parts;
}

function encode(parts: readonly (readonly [string, string])[]): Buffer {
  const bodies = parts.map(
    ([name, body]) =>
      `--${boundary}\r\nContent-Disposition: form-data; name="${name}"; filename="../x"\r\n\r\n${body}\r\n`,
  );
  return Buffer.from(`${bodies.join('')}--${boundary}--\r\n`, 'latin1');
}

const sizes = fc.array(fc.integer({ min: 1, max: 40 }), { minLength: 1, maxLength: 8 });
/** Bytes full of what boundaries are made of. */
const body = fc
  .array(fc.constantFrom('\r', '\n', '-', '--', boundary, `\r\n--${boundary.slice(0, -1)}`, 'a\0ÿ'))
  .map((pieces) => pieces.join(''))
  .filter((text) => !`\r\n${text}\r\n`.includes(`\r\n--${boundary}`));
const parts = fc.array(fc.tuple(fc.stringMatching(/^[a-z_.]{1,12}$/), body), {
  minLength: 1,
  maxLength: 5,
});

describe('multipart/form-data', () => {
  it('comes out as it went in, however it is cut', async () => {
    await fc.assert(
      fc.asyncProperty(parts, sizes, async (wanted, cuts) => {
        expect(await parse(encode(wanted), cuts)).toEqual(wanted);
      }),
      { numRuns: 300 },
    );
  });

  it('cut short or changed, is refused or read to another end, and nothing else', async () => {
    await fc.assert(
      fc.asyncProperty(parts, sizes, fc.nat(), fc.nat(255), async (wanted, cuts, at, byte) => {
        const bytes = encode(wanted);
        // Without its last boundary's dashes there is no end.
        const cut = bytes.subarray(0, at % (bytes.length - 3));
        await expect(parse(cut, cuts)).rejects.toMatchObject({ code: 'INVALID_REQUEST' });
        bytes[at % bytes.length] = byte;
        await parse(bytes, cuts).catch((error: unknown) => {
          expect(error).toBeInstanceOf(GatewayError);
        });
      }),
      { numRuns: 300 },
    );
  });

  it.each<[string, string]>([
    ['a preamble', `hello\r\n--${boundary}\r\nContent-Disposition: form-data; name="a"\r\n\r\n`],
    ['no disposition', `--${boundary}\r\nContent-Type: text/plain\r\n\r\nx\r\n--${boundary}--`],
    [
      'two dispositions',
      `--${boundary}\r\nContent-Disposition: form-data; name="a"\r\nContent-Disposition: form-data; name="b"\r\n\r\nx\r\n--${boundary}--`,
    ],
    [
      'a name in quotes of its own',
      `--${boundary}\r\nContent-Disposition: form-data; name="a\\"b"\r\n\r\nx\r\n--${boundary}--`,
    ],
    [
      'a file before its name',
      `--${boundary}\r\nContent-Disposition: form-data; filename="x"; name="a"\r\n\r\nx\r\n--${boundary}--`,
    ],
    [
      'base64',
      `--${boundary}\r\nContent-Disposition: form-data; name="a"\r\nContent-Transfer-Encoding: base64\r\n\r\nx\r\n--${boundary}--`,
    ],
    ['a head without end', `--${boundary}\r\n${'x'.repeat(10_000)}`],
    ['nothing', ''],
  ])('is refused with %s', async (_, text) => {
    await expect(parse(Buffer.from(text), [7])).rejects.toMatchObject({ code: 'INVALID_REQUEST' });
  });

  it('has a limit on its parts', async () => {
    const many = Array.from({ length: 17 }, (_, i) => [`p${i}`, ''] as const);
    await expect(parse(encode(many), [500])).rejects.toThrow('more than 16 parts');
    expect(await parse(encode(many.slice(1)), [500])).toHaveLength(16);
  });

  it.each([
    ['multipart/form-data; boundary=abc', 'abc'],
    ['Multipart/Form-Data;boundary="a b"', 'a b'],
    ['multipart/form-data', null],
    ['multipart/form-data; boundary=', null],
    [`multipart/form-data; boundary=${'a'.repeat(71)}`, null],
    ['multipart/form-data; boundary=a; boundary=b', null],
    ['multipart/mixed; boundary=a', null],
  ])('%j has the boundary %j', (type, wanted) => {
    expect(boundaryOf(type)).toBe(wanted);
  });
});
