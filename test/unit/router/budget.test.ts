import { describe, expect, it } from 'vitest';
import { type BudgetDefaults, type BudgetSource, parseBudget } from '../../../src/router/budget.ts';

const none = { totalMs: null, ttftMs: null, perTokenMs: null, strict: false, rankMin: 0 };
const defaults: BudgetDefaults = {
  tiers: {
    instant: { ...none, totalMs: 500, strict: true, rankMin: 2 },
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
