import { describe, expect, it } from 'vitest';
import { createStopMatcher, type StopMatch } from '../../../src/engine/stop-matcher.ts';

const feed = (stops: readonly string[], texts: readonly string[]): (StopMatch | string)[] => {
  const matcher = createStopMatcher(stops);
  const result: (StopMatch | string)[] = [];
  for (const text of texts) {
    const match = matcher.push(text);
    result.push(match);
    if (match.stop !== null) return result;
  }
  return [...result, matcher.flush()];
};
const shown = (text: string): StopMatch => ({ text, stop: null });

describe('stop matcher', () => {
  it('finds a stop string that spans pieces and never shows its beginning', () => {
    expect(feed(['DEFGHIJ'], ['ABC', 'D', 'EFG', 'HIJKL'])).toEqual([
      shown('ABC'),
      shown(''),
      shown(''),
      { text: '', stop: 'DEFGHIJ' },
    ]);
  });

  it('gives a half match back at the end', () => {
    expect(feed(['\n\nUser:'], ['ok\n', '\nUs'])).toEqual([shown('ok'), shown(''), '\n\nUs']);
  });

  it('releases a half match as soon as it breaks, keeping the part that may begin anew', () => {
    expect(feed(['aab'], ['aa', 'a', 'c'])).toEqual([shown(''), shown('a'), shown('aac'), '']);
  });

  it('takes the stop string that ends first, and the longer one when two end together', () => {
    expect(feed(['abcd', 'bc'], ['xabcd'])).toEqual([{ text: 'xa', stop: 'bc' }]);
    expect(feed(['b', 'ab'], ['xab'])).toEqual([{ text: 'x', stop: 'ab' }]);
  });

  it('finds a second stop string whose beginning was inside a broken match of the first', () => {
    expect(feed(['aaaX', 'aY'], ['aaaY'])).toEqual([{ text: 'aa', stop: 'aY' }]);
  });

  it('shows everything at once when there is nothing to stop at', () => {
    expect(feed([], ['a', 'b'])).toEqual([shown('a'), shown('b'), '']);
  });

  it('is linear: 1 MB that almost matches takes well under a second', () => {
    const stop = `${'a'.repeat(4095)}b`;
    const matcher = createStopMatcher([stop, 'aab', 'ab'.repeat(2000), 'c']);
    const begin = performance.now();
    let length = 0;
    for (let i = 0; i < 1024; i += 1) length += matcher.push('a'.repeat(1024)).text.length;
    expect(length + matcher.flush().length).toBe(2 ** 20);
    // Measured 30 ms here; a naive search would compare 4 thousand million characters.
    expect(performance.now() - begin).toBeLessThan(1000);
  });

  it.each([[['']], [['a', 'b', 'c', 'd', 'e']], [['a'.repeat(4097)]]])(
    'refuses %j',
    (stops: string[]) => {
      expect(() => createStopMatcher(stops)).toThrow(
        expect.objectContaining({ code: 'INVALID_REQUEST', param: 'stop' }),
      );
    },
  );

  it('refuses to go on after a stop', () => {
    const matcher = createStopMatcher(['a']);
    matcher.push('a');
    expect(() => matcher.push('b')).toThrow(expect.objectContaining({ code: 'INTERNAL' }));
  });
});
