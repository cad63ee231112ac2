import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { parseModulePattern, parseSuffixPattern } from '../../../src/adapters/module-pattern.ts';

const key = 'model.layers.10.self_attn.q_proj';

const atom: fc.Arbitrary<string> = fc.constantFrom(
  ...['a', 'b', '.', '\\.', '\\d', '\\w', '\\D', '[ab]', '[^a]', '[a-c0-9]', '[.]', '^', '$'],
);
const quantifier: fc.Arbitrary<string> = fc.constantFrom(
  '',
  '*',
  '+',
  '?',
  '*?',
  '{2}',
  '{1,}',
  '{0,2}',
);

/** A pattern of the shared syntax, small enough for the engine that backtracks. */
const anyPattern: fc.Arbitrary<string> = fc.letrec<{ choice: string; item: string }>((tie) => ({
  item: fc.oneof(
    { maxDepth: 2, depthSize: 'small' },
    fc.tuple(atom, quantifier).map(([a, q]) => (a === '^' || a === '$' ? a : a + q)),
    fc
      .tuple(fc.constantFrom('(', '(?:'), tie('choice'), quantifier)
      .map(([o, c, q]) => `${o}${c})${q}`),
  ),
  choice: fc
    .array(fc.array(tie('item'), { maxLength: 2 }), { minLength: 1, maxLength: 3 })
    .map((branches) => branches.map((items) => items.join('')).join('|')),
})).choice;

const anyText = fc.string({ unit: fc.constantFrom('a', 'b', 'c', '.', '1'), maxLength: 5 });

describe('module patterns', () => {
  it('match what a backtracking engine matches', () => {
    fc.assert(
      fc.property(anyPattern, anyText, (pattern, text) => {
        expect(parseModulePattern(pattern)(text)).toBe(new RegExp(`^(?:${pattern})$`).test(text));
      }),
      { numRuns: 2000 },
    );
  });

  it("match suffixes as PEFT's get_pattern_key", () => {
    fc.assert(
      fc.property(anyPattern, anyText, (pattern, text) => {
        const wanted = new RegExp(`^(.*\\.)?(${pattern})$`).test(text);
        expect(parseSuffixPattern(pattern)(text)).toBe(wanted);
      }),
      { numRuns: 2000 },
    );
  });

  it.each([
    ['q_proj', true],
    ['self_attn.q_proj', true],
    ['attn.q_proj', false],
    ['.*q_proj', true],
    ['^q_proj', false],
    ['^model.*q_proj', true],
    ['layers.1.self_attn.q_proj', false],
    ['layers\\.(?:9|10)\\..*', true],
    ['_proj', false],
  ])('%s names %s', (pattern, wanted) => {
    expect(parseSuffixPattern(pattern)(key)).toBe(wanted);
  });

  it('cannot be made to take for ever', () => {
    const hostile = ['(a+)+b', '(a|a)*b', '(a*)*(a*)*(a*)*b', '((((a?){60}){60}){60}){60}b'];
    const startMs = performance.now();
    for (const pattern of hostile) {
      const match = parseModulePattern(pattern);
      try {
        expect(match('a'.repeat(60))).toBe(false);
      } catch (error) {
        expect(error).toMatchObject({ code: 'INVALID_ADAPTER', message: /too long/ });
      }
    }
    // RegExp needs 2^60 steps for the first. Wide enough for a slow machine.
    expect(performance.now() - startMs).toBeLessThan(5_000);
  });

  it.each([
    '(?=a)',
    '(?!a)',
    '(a)\\1',
    'a\\b',
    'a**',
    'a*+',
    '(a',
    'a)',
    '[a',
    '[]a]',
    '*a',
    'a{',
    'a{3,2}',
    'a{9999}',
    '\\',
    '\\q',
    '[z-a]',
    '^*',
    '('.repeat(30),
    'a'.repeat(2001),
  ])('refuses %s, which PEFT may read otherwise', (pattern) => {
    expect(() => parseModulePattern(pattern)).toThrow(
      expect.objectContaining({ code: 'INVALID_ADAPTER' }),
    );
  });
});
