import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { isMonotone, recipeOf, summariseRuns, variants } from '../../../bench/train.ts';
import { passesPerStep, type RunResult, runTrainer } from '../../../bench/train-runs.ts';
import { type ServingPhase, summariseServing } from '../../../bench/train-serving.ts';
import { benchTrainStudy, chooseRate, rowOf } from '../../../bench/train-study.ts';
import { englishMessages, readTask } from '../../../bench/train-text.ts';
import { tinyPath } from '../../support/open-test-decoder.ts';

const folder = mkdtempSync(join(tmpdir(), 'bench-train-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const base = 3;
function runOf(losses: readonly number[]): RunResult {
  const byRank = losses.map((loss, i) => ({ rank: 2 ** i, loss }));
  const step = { kind: 'progress', step: 1, steps: 3, loss: 1, learningRate: 1e-3 } as const;
  return {
    result: {
      ...{ directory: '', losses: byRank, baseLoss: base, aurac: null, comparison: null },
    },
    // The first step records its programs.
    steps: [
      { ...step, tokens: 100, ms: 10_000 },
      { ...step, tokens: 100, ms: 500 },
      { ...step, tokens: 100, ms: 400 },
    ],
  };
}

describe('bench train: texts', () => {
  it('reads messages as the compiler declares them', () => {
    const source = String.raw`
      Unterminated: diag(1002, 1 /* Error */, "Unterminated_1002", "Unterminated \"string\"."),
      Other: diag(6001, 3 /* Message */, "Other_6001", "A\\B", /*reportsUnnecessary*/ true),
      no: dialog(1, 1 /* Error */, "no_1", "No.")`;
    expect([...englishMessages(source)]).toEqual([
      ['Unterminated_1002', 'Unterminated "string".'],
      ['Other_6001', String.raw`A\B`],
    ]);
  });

  it('holds a message out of every language or of none', () => {
    const sizes = { training: 400, heldOut: 80 };
    const [de, es] = [readTask('de', sizes), readTask('es', sizes)];
    const english = (examples: typeof de.heldOut): Set<string> =>
      new Set(examples.map(({ prompt }) => prompt.split('\n')[0]!));
    const learnt = [...english(de.training), ...english(es.training)];
    const heldOut = new Set([...english(de.heldOut), ...english(es.heldOut)]);
    expect(learnt.filter((message) => heldOut.has(message))).toEqual([]);
    expect(de.training).toHaveLength(400);
    expect(es.training[1]).toEqual({
      prompt: 'English: Expected a Unicode property value.\nSpanish:',
      completion: ' Se esperaba un valor de propiedad Unicode.',
    });
    expect(() => readTask('de', { training: 5000, heldOut: 1 })).toThrow('want 5000');
  });
});

describe('bench train: summaries', () => {
  it('is monotone within the slack', () => {
    const of = (losses: number[]): number => isMonotone(runOf(losses).result!.losses);
    expect(of([2, 1.9, 1.919])).toBe(1);
    expect(of([2, 1.9, 1.921])).toBe(0);
    expect(of([2, 1.5, 1.5])).toBe(1);
  });

  it('has losses by variant and rank, areas, and the speed without the first step', () => {
    const runs = new Map([
      ['lora_squeezed', runOf([2.5, 2.5, 2.5])],
      ['diag', runOf([2.5, 2, 1.5])],
    ]);
    const { losses, figures, series } = summariseRuns(runs);
    expect(losses).toEqual({
      base: { 0: 3 },
      lora_squeezed: { 1: 2.5, 2: 2.5, 4: 2.5 },
      diag: { 1: 2.5, 2: 2, 4: 1.5 },
    });
    expect(figures).toEqual({
      monotone: 1,
      aurac_lora_squeezed: 0.5,
      aurac_diag: 1.083, // (0.75 · 1 + 1.25 · 2) / 3
      aurac_v2_lora_squeezed: 0.5,
      aurac_v2_diag: 1,
    });
    expect(series.train_diag!.values).toEqual([200, 250]);
    expect(() => summariseRuns(new Map([['diag', { result: null, steps: [] }]]))).toThrow(
      'diverged',
    );
  });

  it('trains every objective under one rule', () => {
    const recipes = Object.entries(variants).map(([name, part]) => ({
      ...{ name, trainingPath: '', heldOutPath: null },
      recipe: recipeOf({ rank: 32 }, part),
    }));
    expect(recipes.map(({ recipe }) => passesPerStep(recipe))).toEqual([1, 1, 1, 1, 1, 6, 2]);
    expect(recipes.map(({ recipe }) => recipe.objective)).toEqual([
      ...['plain', 'plain', 'diag', 'binary', 'dylora', 'multi', 'sandwich'],
    ]);
    expect(recipes.map(({ recipe }) => recipe.order)).toEqual([
      ...['as-trained', 'svd', 'svd', 'svd', 'as-trained', 'as-trained', 'as-trained'],
    ]);
  });

  it('serving: p99 and speed beside a job over those without, and what the job gave up', () => {
    const phase = (gaps: readonly (readonly [atMs: number, ms: number])[]): ServingPhase => ({
      gaps: gaps.map(([atMs, ms]) => ({ atMs, ms })),
      ttftMs: [50],
      tokens: 200,
      ms: 4000,
    });
    const round = {
      alone: phase([
        [100, 10],
        [2500, 20],
      ]),
      beside: {
        ...phase([
          [100, 40],
          [2500, 22],
        ]),
        tokens: 100,
      },
      ...{ trainedBeside: 10, trainedIdle: 80 },
    };
    expect(summariseServing([round, round, round]).figures).toEqual({
      serving_p99_ratio: 2,
      serving_p99_ratio_settled: 1.1,
      serving_p50_ratio: 2.067, // 31 / 15
      serving_ttft_p50_ratio: 1,
      serving_tokens_ratio: 0.5,
      training_share_kept: 0.125,
    });
    expect(() => summariseServing([{ ...round, trainedIdle: 0 }])).toThrow('learnt nothing');
  });
});

describe('bench train --study', () => {
  const cell = { task: 'de', variant: 'diag' } as const;
  const diverged: RunResult = { result: null, steps: [] };

  it('takes the rate with the largest area, and none that diverged', () => {
    const tried = new Map([
      ['de diag 0.001 7', runOf([2.5, 2.5])],
      ['de diag 0.003 7', runOf([2, 2])],
      ['de diag 0.01 7', diverged],
    ]);
    expect(chooseRate(cell, 7, [0.001, 0.003, 0.01], tried)).toEqual({
      rate: 0.003,
      validation: { 0.001: 0.5, 0.003: 1, 0.01: null },
    });
    expect(() => chooseRate(cell, 7, [0.01], tried)).toThrow('diverged at every rate');
  });

  it('shows means and spread of the seeds that ended', () => {
    const row = rowOf({ ...cell, rate: 0.003, validation: {} }, [
      { seed: 1, ...runOf([2, 1]) },
      { seed: 2, ...runOf([2.5, 2.75]) },
      { seed: 3, ...diverged },
    ]);
    expect(row).toMatchObject({
      mean: { 1: 2.25, 2: 1.875 },
      spread: { 1: 0.5, 2: 1.75 },
      monotone: 1,
    });
    expect(row.runs.map(({ seed, aurac }) => [seed, aurac])).toEqual([
      [1, 1.5],
      [2, 0.375],
    ]);
  });

  it('runs a trainer process for each rate and each seed of each variant', async () => {
    const variants = ['lora_truncated', 'lora_squeezed', 'diag_as_published'];
    const told: string[] = [];
    const settings = {
      ...({ modelPath: tinyPath, threads: 2, weights: 'faithful', folder } as const),
      tell: (text: string) => void told.push(text),
    };
    const sizes = {
      ...({ training: 12, heldOut: 2, tasks: ['de'], rates: [1e-2], seeds: [1] } as const),
      variants,
      recipe: { rank: 2, batchWindows: 1, windowTokens: 128, accumulation: 1, stepsMax: 2 },
    };
    const { study, losses } = await benchTrainStudy(settings, sizes);
    expect(study.map(({ variant }) => variant)).toEqual(variants);
    expect(told).toHaveLength(2 * variants.length);
    // Serving the same numbers in another order changes what rank 1 is, and nothing at all ranks.
    const [truncated, squeezed] = [losses.de_lora_truncated!, losses.de_lora_squeezed!];
    expect(squeezed['2']).toBeCloseTo(truncated['2']!, 2);
    expect(squeezed['1']).not.toBe(truncated['1']);
    expect(readdirSync(folder).filter((name) => name.startsWith('run-'))).toEqual([]);
    const place = { modelPath: tinyPath, modelHash: 'another', folder };
    const request = { name: 'broken', recipe: recipeOf({}), trainingPath: '', heldOutPath: null };
    await expect(runTrainer(place, request, 1)).rejects.toThrow('BASE_MISMATCH');
  }, 120_000);
});
