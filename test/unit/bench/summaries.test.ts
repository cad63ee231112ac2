// The arithmetic between what the sides measured and what a report says, on results whose figures are worked out by hand.

import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import { summariseAdapters } from '../../../bench/adapters.ts';
import { summariseContext, tokenBytes } from '../../../bench/context.ts';
import { summarise } from '../../../bench/decode.ts';
import { score } from '../../../bench/divergence.ts';
import { summariseFidelity } from '../../../bench/fidelity.ts';
import { type JobResult, type ScoreJob, type Side, sampled } from '../../../bench/job.ts';
import { takePrompts } from '../../../bench/prompts.ts';
import { summariseRanks } from '../../../bench/ranks.ts';
import { divergence } from '../../../src/model/mode-fidelity.ts';

const result = (rest: Partial<JobResult>): JobResult => ({
  ...sampled(1000, {}),
  cpuMs: 1,
  idleCpuMs: 0,
  ...rest,
});

describe('bench context', () => {
  it("counts a token's keys and values in f16", () => {
    // SmolLM2-135M: 30 blocks × (key + value) × 3 heads × 64 numbers × 2 bytes.
    expect(tokenBytes({ blocks: 30, kvHeads: 3, headSize: 64 })).toBe(23_040);
  });

  it('subtracts the reading of the longer contexts at the fastest rate of the run', () => {
    const steps = (...rounds: number[][]): JobResult[] =>
      rounds.map((stepMs) => result({ stepMs }));
    const reads = (...rounds: number[][]): JobResult[] =>
      rounds.map((bytesPerMs) => result({ samples: { bytesPerMs } }));
    const { figures, series } = summariseContext(
      new Map([
        ['long', steps([10, 90, 20], [22, 22], [40])],
        ['short', steps([5, 5, 70], [4], [11])],
        ['read', reads([100e6, 250e6], [200e6], [50e6])],
      ]),
      1e9,
    );
    expect(figures).toEqual({
      context_ratio: 3.6, // (22 − 4) / 5
      context_ratio_raw: 4.4, // 22 / 5
      context_own_kv_ms: 4, // 1e9 / 250e6
      context_own_kv_mb: 1000,
    });
    expect(series.context_long!.values).toEqual([20, 22, 40]);
    expect(series.memory_read!.values).toEqual([100, 250, 200, 50]);
  });
});

describe('bench decode', () => {
  const job = {
    kind: 'generate',
    prompts: takePrompts(2, 3),
    newTokens: 5,
    adapters: [null, null],
    order: 'round-robin',
  } as const;
  const ids = [
    [1, 2, 3, 4, 5],
    [6, 7, 8, 9, 10],
  ];
  const rounds = (decodeMs: number[], cpuMs: number, last = ids): JobResult[] =>
    decodeMs.map((ms, i) =>
      result({ decodeMs: ms, cpuMs, ids: i === decodeMs.length - 1 ? last : ids }),
    );
  // 2 streams × 4 tokens after the first: 8000 / decodeMs.
  const llamacpp = rounds([32, 80, 16], 90); // 250, 100, 500 tokens/s
  const parted = [
    [1, 2, 3, 4, 5],
    [6, 0, 8, 9, 10],
  ];
  const nodeLlamaCpp = rounds([64, 50, 40], 60, parted); // 125, 160, 200
  const faithful = rounds([40, 20, 80], 100); // 200, 400, 100

  it('divides by the faster opponent, and by the CPU time of the one that needs less', () => {
    const { figures, series } = summarise(
      'decode',
      job,
      new Map([
        ['llamacpp', llamacpp],
        ['node_llama_cpp', nodeLlamaCpp],
        ['faithful', faithful],
      ]),
    );
    expect(figures).toEqual({
      faithful_ratio: 0.8, // 200 / 250
      decode_faithful_cpu_ratio: 0.6, // 60 / 100
      decode_ids_equal_node_llama_cpp: 0.6, // 5 of 5 and 1 of 5, of the last round
      decode_idle_core_share_max: 0,
    });
    expect(series.decode_llamacpp!.values).toEqual([250, 100, 500]);
    expect(series.decode_faithful_ratio!.values).toEqual([0.8, 4, 0.2]); // round by round
    expect(series.decode_node_llama_cpp_cpu!.median).toBe(60);
  });

  it('names the figures of other jobs after them, and takes node-llama-cpp where it is faster', () => {
    const { figures } = summarise(
      'batch8',
      job,
      new Map([
        ['llamacpp', rounds([80], 50)], // 100
        ['node_llama_cpp', rounds([40], 60)], // 200
        ['parity', rounds([25], 25, parted)], // 320
        ['fast', rounds([16], 40)], // 500
      ]),
    );
    expect(figures).toMatchObject({
      batch8_parity_ratio: 1.6,
      batch8_fast_ratio: 2.5,
      batch8_parity_cpu_ratio: 2,
      batch8_fast_cpu_ratio: 1.25,
      batch8_ids_equal_parity: 0.6,
      batch8_ids_equal_node_llama_cpp: 1,
    });
  });

  it('counts the tokens of the prompt where the prompt is the job', () => {
    const prefill = { kind: 'prefill', prompt: takePrompts(1, 40)[0]! } as const;
    const { figures, series } = summarise(
      'prefill',
      prefill,
      new Map([
        ['llamacpp', [result({ totalMs: 50, ids: [[1]] })]], // 800
        ['fast', [result({ totalMs: 40, ids: [[1]] })]], // 1000
      ]),
    );
    expect(series.prefill_llamacpp!.median).toBe(800);
    expect(figures.prefill_fast_ratio).toBe(1.25);
  });
});

describe('bench divergence', () => {
  const row = (...logits: number[]): Float32Array => Float32Array.from(logits);

  it('is Σ p·log(p/q) of the softmaxes, in nats', () => {
    const [p, q] = [row(Math.log(3), 0), row(0, 0)]; // (¾, ¼) and (½, ½)
    expect(divergence(p, q)).toBeCloseTo(0.75 * Math.log(1.5) + 0.25 * Math.log(0.5), 7);
    expect(divergence(q, p)).toBeCloseTo(0.5 * Math.log(4 / 3), 7); // not symmetric
    expect(divergence(row(80, 0, 0, 0), row(1, 1, 1, 1))).toBeCloseTo(Math.log(4), 12);
  });

  // Whole numbers and shifts: their sums are exact in f32.
  const logits = fc.array(fc.integer({ min: -30, max: 30 }), { minLength: 4, maxLength: 4 });

  it('is 0 for equal rows, never below, and blind to a constant on either row', () => {
    fc.assert(
      fc.property(logits, logits, fc.integer({ min: -5000, max: 5000 }), (a, b, shift) => {
        const [p, q] = [row(...a), row(...b)];
        const shifted = (values: number[]): Float32Array => row(...values.map((x) => x + shift));
        expect(divergence(p, p)).toBe(0);
        expect(divergence(p, q)).toBeGreaterThan(-1e-12);
        expect(divergence(shifted(a), q)).toBeCloseTo(divergence(p, q), 9);
        expect(divergence(p, shifted(b))).toBeCloseTo(divergence(p, q), 9);
      }),
    );
  });

  const folder = mkdtempSync(join(tmpdir(), 'bench-divergence-'));
  afterAll(() => rmSync(folder, { recursive: true, force: true }));

  it('compares each token of each window with the reference in the file', () => {
    const side = (rows: Readonly<Record<number, Float32Array>>): Side => ({
      description: 'given rows',
      run: () => {
        throw new Error('runs nothing');
      },
      windowLogits: (tokens) => tokens.map((token) => rows[token]!),
      close: () => {},
    });
    const job = (role: ScoreJob['role'], windows: number[][]): ScoreJob => ({
      kind: 'score',
      windows,
      referencePath: join(folder, 'reference.f32'),
      role,
    });
    const exact = side({ 1: row(0, 2), 2: row(0, 0), 3: row(Math.log(3), 0) });
    const other = side({ 1: row(3, 5), 2: row(0, 0), 3: row(0, Math.log(3)) });
    const windows = [[1, 3], [2]];
    expect(score(exact, job('write', windows)).samples).toEqual({ kl: [], same: [] });
    const { kl, same } = score(other, job('compare', windows)).samples;
    expect(same).toEqual([1, 0, 1]);
    expect(kl![0]).toBeCloseTo(0, 12);
    expect(kl![1]).toBeCloseTo(0.5 * Math.log(3), 7); // (¾ − ¼)·log 3
    expect(kl![2]).toBe(0);
    expect(() => score(other, job('compare', [[1, 3, 2, 2]]))).toThrow('too few rows');
  });
});

describe('bench fidelity', () => {
  it('averages over all tokens, and each 512 of them for the series', () => {
    const fill = (count: number, value: number): number[] =>
      Array.from({ length: count }, () => value);
    const kl = [
      ...fill(256, 0.001),
      ...fill(256, 0.003), // the first 512: 0.002
      ...fill(86, 0.01),
      ...fill(2, 0.5), // the other 88: (0.86 + 1) / 88
    ];
    const { figures, series } = summariseFidelity(
      new Map([
        ['fast', { kl, same: [...fill(450, 1), ...fill(150, 0)] }],
        ['llamacpp', { kl: fill(600, 0.25), same: fill(600, 1) }],
      ]),
    );
    expect(figures).toEqual({
      kl_fast: 0.004807, // (1.024 + 1.86) / 600
      kl_p99_fast: 0.01, // the 594th of 600
      kl_median_fast: 0.003,
      same_top_fast: 0.75,
      kl_llamacpp: 0.25,
      kl_p99_llamacpp: 0.25,
      kl_median_llamacpp: 0.25,
      same_top_llamacpp: 1,
      tokens: 600,
    });
    expect(series.kl_fast!.values).toEqual([0.002, 0.02114]);
  });
});

describe('bench adapters', () => {
  it('takes the better order of llama.cpp for throughput, the better for CPU time, and each for the first token', () => {
    const ids = [
      [1, 2, 3, 4, 5],
      [6, 7, 8, 9, 10],
    ];
    // 10 tokens in totalMs.
    const side = (
      totalMs: number,
      ttftMs: number[],
      cpuMs: number,
      rest: Partial<JobResult> = {},
    ): JobResult[] => [result({ totalMs, ttftMs, cpuMs, ids, probes: [[1, 2]], ...rest })];
    const { figures, series } = summariseAdapters(
      new Map([
        ['llamacpp_serial', side(100, [10, 50], 90)], // 100 tokens/s
        ['llamacpp_round_robin', side(80, [8, 16], 120)], // 125
        ['llamacpp_no_adapter', side(40, [4, 4], 40, { probes: [[1, 4]] })], // 250
        ['parity', side(40, [5, 6], 45, { ids: [ids[0]!, [6, 0]], probes: [[1, 2.5]] })],
        ['parity_no_adapter', side(25, [4, 4], 25)], // 400
        ['faithful', side(50, [5, 7], 60, { probes: [[1, 3]] })], // 200
        ['faithful_no_adapter', side(20, [4, 4], 30)], // 500
        ['fast', side(16, [2, 3], 18, { probes: [[1, 3.5]] })], // 625
      ]),
    );
    expect(figures).toEqual({
      parity_ratio_to_llamacpp: 1.4, // 7 tokens in 40 ms: 175 / 125
      faithful_ratio_to_llamacpp: 1.6,
      fast_ratio_to_llamacpp: 5, // 625 / 125
      ratio_to_no_adapter: 0.4,
      parity_ratio_to_no_adapter: 0.4375, // 175 / 400
      llamacpp_ratio_to_no_adapter: 0.5,
      ttft_p50_ratio: 0.2, // 6 / 30
      ttft_p50_ratio_round_robin: 0.5, // 6 / 12
      parity_cpu_ratio_to_llamacpp: 2, // 90 / 45
      faithful_cpu_ratio_to_llamacpp: 1.5,
      fast_cpu_ratio_to_llamacpp: 5, // 90 / 18
      cpu_ratio_to_no_adapter: 0.5,
      ids_equal_parity: 0.8571, // 5 of 5 and 1 of 2
      first_logits_distance_parity: 0.25, // 0.5 / 2
      first_logits_distance_faithful: 0.5,
      first_logits_distance_fast: 0.75, // 1.5 / 2
      idle_core_share_max: 0,
    });
    expect(series.llamacpp_serial_ttft_worst!.median).toBe(50);
  });
});

describe('bench ranks', () => {
  it('is the cost of one large rank as a share of an equal part of the cost of all', () => {
    const cycles = (stepMs: number[][]): JobResult[] =>
      stepMs.map((one) => result({ stepMs: one }));
    const { figures } = summariseRanks(
      new Map([
        ['none', cycles([[9], [9], [9]])],
        ['all_4', cycles([[10, 80, 10], [12], [7]])],
        ['one_64', cycles([[13], [13, 13, 50], [20]])], // 3, 1 and 13 longer
        ['all_64', cycles([[26], [24], [90]])], // 16, 12 and 83 longer
      ]),
      8,
    );
    expect(figures).toEqual({ row_cost_ratio: 1.5 }); // 3 / (16 / 8)
  });
});
