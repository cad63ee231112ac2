import { describe, expect, it } from 'vitest';
import { createDetokenizer } from '../../../src/engine/detokenizer.ts';

const pieces = (parts: readonly number[][]): string[] => {
  const detokenizer = createDetokenizer((token) => Uint8Array.from(parts[token]!));
  return [...parts.map((_, token) => detokenizer.push(token)), detokenizer.flush()];
};

describe('detokenizer', () => {
  it('holds a character back until its last byte', () => {
    expect(pieces([[0xe6], [0xbc], [0xa2, 0x41]])).toEqual(['', '', '漢A', '']);
  });

  it('shows a broken character as U+FFFD as soon as it cannot be completed', () => {
    expect(pieces([[0xe6, 0xbc], [0x41]])).toEqual(['', '\ufffdA', '']);
  });

  it('gives an unfinished character back as one U+FFFD at the end', () => {
    expect(pieces([[0x41], [0xf0, 0x9f]])).toEqual(['A', '', '\ufffd']);
  });

  it('keeps a byte order mark', () => {
    expect(
      pieces([
        [0xef, 0xbb],
        [0xbf, 0x41],
      ]).join(''),
    ).toBe('\ufeffA');
  });

  it('shows nothing for a token without bytes', () => {
    expect(pieces([[0xc3], [], [0xa9]])).toEqual(['', '', 'é', '']);
  });

  it('keeps two sequences apart', () => {
    const bytes = [Uint8Array.of(0xc3), Uint8Array.of(0xa9), Uint8Array.of(0xa8)];
    const bytesOf = (token: number): Uint8Array => bytes[token]!;
    const [a, b] = [createDetokenizer(bytesOf), createDetokenizer(bytesOf)];
    expect([a.push(0), b.push(0), a.push(1), b.push(2)]).toEqual(['', '', 'é', 'è']);
  });
});
