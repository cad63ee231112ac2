import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { parseStrictJson } from '../../../src/server/strict-json.ts';

const limits = { depthMax: 32, keysMax: 100 };

describe('parseStrictJson', () => {
  it('reads what JSON.parse reads, to the same value', () => {
    fc.assert(
      fc.property(fc.json({ maxDepth: 8 }), fc.nat(3), (text, indent) => {
        fc.pre(!text.includes('__proto__'));
        const spaced = JSON.stringify(JSON.parse(text), null, indent);
        expect(parseStrictJson(spaced, limits)).toEqual(JSON.parse(spaced));
      }),
      { numRuns: 500 },
    );
  });

  it('accepts nothing that JSON.parse refuses', () => {
    const pieces = ['{', '}', '[', ']', ',', ':', '"', '"a"', '\\', '\\"', '1', 'null', ' ', 'x'];
    fc.assert(
      fc.property(fc.array(fc.constantFrom(...pieces), { maxLength: 12 }), (parts) => {
        const text = parts.join('');
        const value = attempt(() => JSON.parse(text));
        const strict = attempt(() => parseStrictJson(text, limits));
        if ('failed' in value) expect(strict).toEqual({ failed: 'INVALID_REQUEST' });
        else if (!('failed' in strict)) expect(strict).toEqual(value);
      }),
      { numRuns: 2000 },
    );
  });

  it('refuses an object with a key twice, wherever it is and however it is written', () => {
    fc.assert(
      fc.property(
        fc.string({ unit: 'grapheme' }),
        fc.array(fc.constantFrom('array', 'object'), { maxLength: 5 }),
        fc.boolean(),
        (key, nesting, isEscaped) => {
          fc.pre(key !== '__proto__');
          const again = isEscaped ? `"${escaped(key)}"` : JSON.stringify(key);
          let text = `{${JSON.stringify(key)}:1,"other-":[{"a":2}],${again}:3}`;
          for (const kind of nesting) text = kind === 'array' ? `[0,${text}]` : `{"x":${text}}`;
          expect(() => parseStrictJson(text, limits)).toThrow(/duplicate key/);
        },
      ),
    );
  });

  it.each([
    '{"a":{"k":1},"b":{"k":1}}',
    '[{"k":1},{"k":1}]',
    '{"k":"k","j":["k","k"]}',
    '{"a":"\\"k\\":1","k":2}',
    '{"\\\\":1,"\\\\\\\\":2}',
  ])('takes equal keys of different objects, and keys in strings: %s', (text) => {
    expect(parseStrictJson(text, limits)).toEqual(JSON.parse(text));
  });

  it('counts depth and refuses one level more', () => {
    const nested = (levels: number): string => `${'['.repeat(levels)}${']'.repeat(levels)}`;
    expect(() => parseStrictJson(nested(32), limits)).not.toThrow();
    expect(() => parseStrictJson(nested(33), limits)).toThrow(/deeper than 32/);
    expect(parseStrictJson(`"${'['.repeat(100)}"`, limits)).toBe('['.repeat(100));
  });

  it.each(['{"__proto__":1}', '{"a":[{"__proto__":{}}]}', '{"a":{"\\u005f_proto__":1}}'])(
    'refuses the key __proto__ at any depth: %s',
    (text) => {
      expect(() => parseStrictJson(text, limits)).toThrow(/__proto__/);
    },
  );

  it('counts keys over all objects and refuses one more', () => {
    const some = (count: number): string =>
      JSON.stringify(Array.from({ length: count }, () => ({ k: 1 })));
    expect(() => parseStrictJson(some(100), limits)).not.toThrow();
    expect(() => parseStrictJson(some(101), limits)).toThrow(/more than 100 keys/);
    expect(() =>
      parseStrictJson(JSON.stringify({ a: Array(200).fill('k') }), limits),
    ).not.toThrow();
  });

  it('stays linear in strings of backslashes and quotes', () => {
    const text = JSON.stringify(['\\'.repeat(500_000), '"'.repeat(500_000)]);
    const started = performance.now();
    parseStrictJson(text, limits);
    // 2 MB take a few milliseconds; a quadratic scan would take hours.
    expect(performance.now() - started).toBeLessThan(5000);
  });
});

function attempt(read: () => unknown): { value: unknown } | { failed: string } {
  try {
    return { value: read() };
  } catch (error) {
    return { failed: (error as { code?: string }).code ?? 'syntax' };
  }
}

/** Every UTF-16 unit as \uXXXX. */
function escaped(text: string): string {
  let result = '';
  for (let i = 0; i < text.length; i++) {
    result += `\\u${text.charCodeAt(i).toString(16).padStart(4, '0')}`;
  }
  return result;
}
