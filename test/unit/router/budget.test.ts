import { describe, expect, it } from 'vitest';
import {
  type BudgetDefaults,
  type BudgetSource,
  meets,
  noTime,
  parseBudget,
  remaining,
  wholeMs,
} from '../../../src/router/budget.ts';

const none = {
  totalMs: null,
  ttftMs: null,
  perTokenMs: null,
  strict: false,
  rankMin: 0,
  priority: 5,
};
const defaults: BudgetDefaults = {
  tiers: {
    instant: { ...none, totalMs: 500, strict: true, rankMin: 2, priority: 8 },
    quality: none,
  },
  latencyDefaults: none,
};
const headersOf =
  (headers: Record<string, string>): BudgetSource['header'] =>
  (name) =>
    headers[name] ?? null;

function parse(
  latency?: unknown,
  headers: Record<string, string> = {},
  tier: string | null = null,
): ReturnType<typeof parseBudget> {
  return parseBudget({ latency, header: headersOf(headers), tier }, defaults);
}

describe('a latency budget', () => {
  it('is read from the body', () => {
    const body = { total_ms: 800.5, ttft_ms: 200, per_token_ms: 1, strict: true, min_rank: 4 };
    expect(parse(body)).toEqual({
      totalMs: 800.5,
      ttftMs: 200,
      perTokenMs: 1,
      strict: true,
      rank: null,
      rankMin: 4,
      priority: 5,
    });
    expect(parse({ rank: 0 })).toMatchObject({ rank: 0, totalMs: null });
  });

  it('is read from headers', () => {
    const headers = {
      'x-latency-budget-ms': '1500',
      'x-llm-d-slo-ttft-ms': '250.5',
      'x-llm-d-slo-tpot-ms': '40',
    };
    expect(parse(undefined, headers)).toMatchObject({
      totalMs: 1500,
      ttftMs: 250.5,
      perTokenMs: 40,
      strict: false,
    });
  });

  it('is stood for by a tier', () => {
    expect(parse(undefined, {}, 'instant')).toEqual({
      totalMs: 500,
      ttftMs: null,
      perTokenMs: null,
      strict: true,
      rank: null,
      rankMin: 2,
      priority: 8,
    });
  });

  it('comes whole from the first source that states a time: body, headers, tier, default', () => {
    const headers = { 'x-latency-budget-ms': '900' };
    expect(parse({ ttft_ms: 100 }, headers, 'instant')).toMatchObject({
      totalMs: null,
      ttftMs: 100,
    });
    expect(parse({ strict: false }, headers, 'instant')).toMatchObject({
      totalMs: 900,
      strict: false,
      rankMin: 2,
      priority: 8,
    });
    const source = { latency: undefined, header: headersOf({}), tier: null };
    const loose = { ...defaults, latencyDefaults: { ...none, perTokenMs: 70 } };
    expect(parseBudget(source, loose)).toMatchObject({ perTokenMs: 70, totalMs: null });
  });

  const bad: unknown[] = [
    ...[0, -1, -0.001, Number.NaN, 1e308, Number.POSITIVE_INFINITY, 3_600_001],
    ...['100', '', null, true, [100], { ms: 100 }],
  ];
  it.each(['total_ms', 'ttft_ms', 'per_token_ms'])('%s refuses what is no time', (field) => {
    for (const value of bad) {
      expect(() => parse({ [field]: value })).toThrow(
        expect.objectContaining({ code: 'INVALID_BUDGET', param: `latency.${field}` }),
      );
    }
    expect(() => parse({ [field]: 3_600_000 })).not.toThrow();
    expect(() => parse({ [field]: Number.MIN_VALUE })).not.toThrow();
  });

  const badTexts = [
    '0',
    '0.0',
    '-1',
    '+1',
    'NaN',
    'Infinity',
    '1e308',
    '1e3',
    '0x10',
    '',
    ' ',
    'fast',
  ];
  badTexts.push(
    '100ms',
    '100, 200',
    '1_000',
    '１００',
    '3600001',
    '.5',
    '5.',
    '99999999999999999999',
  );
  it.each(['x-latency-budget-ms', 'x-llm-d-slo-ttft-ms', 'x-llm-d-slo-tpot-ms'])(
    'header %s refuses what is no time, also when the body states one',
    (name) => {
      for (const text of badTexts) {
        for (const body of [undefined, { total_ms: 100 }]) {
          expect(() => parse(body, { [name]: text }), JSON.stringify(text)).toThrow(
            expect.objectContaining({ code: 'INVALID_BUDGET', param: name }),
          );
        }
      }
    },
  );

  it.each([null, 1, 'fast', [], [{ total_ms: 1 }]])('as %j is refused', (latency) => {
    expect(() => parse(latency)).toThrow(
      expect.objectContaining({ code: 'INVALID_BUDGET', param: 'latency' }),
    );
  });

  it('refuses unknown fields, ranks that are none, and a minimum beside a fixed rank', () => {
    for (const [latency, param] of [
      [{ totalMs: 1 }, 'latency.totalMs'],
      [JSON.parse('{"__proto__": 1}'), 'latency.__proto__'],
      [{ rank: -1 }, 'latency.rank'],
      [{ rank: 1.5 }, 'latency.rank'],
      [{ rank: '4' }, 'latency.rank'],
      [{ rank: 257 }, 'latency.rank'],
      [{ min_rank: Number.NaN }, 'latency.min_rank'],
      [{ strict: 'yes' }, 'latency.strict'],
      [{ strict: null }, 'latency.strict'],
      [{ rank: 4, min_rank: 2 }, 'latency.min_rank'],
    ] as const) {
      expect(() => parse(latency)).toThrow(
        expect.objectContaining({ code: 'INVALID_BUDGET', param }),
      );
    }
  });

  it.each(['fast', 'toString', '__proto__', ''])('the unknown tier %j is refused', (tier) => {
    expect(() => parse(undefined, {}, tier)).toThrow(
      expect.objectContaining({ code: 'INVALID_BUDGET', param: 'service_tier' }),
    );
  });
});

describe('what is left of a budget', () => {
  it('is less by what was spent, but for the pace', () => {
    const budget = { ...none, totalMs: 500, ttftMs: 100, perTokenMs: 20 };
    expect(remaining(budget, 120)).toEqual({ ...budget, totalMs: 380, ttftMs: -20 });
    expect(remaining(none, 120)).toEqual(none);
  });

  it('is met by work that takes no time, until it is spent', () => {
    expect(meets(remaining({ ...none, totalMs: 100 }, 100), noTime)).toBe(true);
    expect(meets(remaining({ ...none, totalMs: 100 }, 101), noTime)).toBe(false);
    expect(meets(remaining({ ...none, ttftMs: 10, totalMs: 100 }, 11), noTime)).toBe(false);
    expect(meets(remaining(none, 1e9), noTime)).toBe(true);
  });

  it.each([
    [{ totalMs: 500, ttftMs: 1, perTokenMs: 1 }, 500],
    [{ perTokenMs: 20 }, 200],
    [{ perTokenMs: 20, ttftMs: 300 }, 500],
    [{ ttftMs: 300 }, null],
    [{}, null],
  ])('%j comes to %d ms for ten tokens', (times, ms) => {
    expect(wholeMs({ ...none, ...times }, 10)).toBe(ms);
  });
});
