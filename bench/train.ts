// `bench train`: adapters of rank 32 trained as the product trains them (a trainer process each), on a real text set, one for
// each objective: held-out loss at each rank as served, beside a plain LoRA truncated and squeezed, and the base. Besides:
// a training step against PEFT on torch, and what answers of the whole gateway notice of a job. `--study`: train-study.ts.

import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { Aurac } from '../src/adapters/aurac.ts';
import type { RankLoss, TrainingResult } from '../src/jobs/messages.ts';
import { parseRecipe, type Recipe } from '../src/jobs/recipe.ts';
import { sha256OfFile } from '../src/model/file-hash.ts';
import { gainAurac } from '../src/trainer/evaluation.ts';
import type { WeightMode } from './job.ts';
import { type Report, round, type Series, seriesOf } from './measure.ts';
import {
  passesPerStep,
  type RunPlace,
  type RunRequest,
  type RunResult,
  runAll,
  runTrainer,
  type StepTold,
} from './train-runs.ts';
import { measureServing, type ServingSizes, summariseServing } from './train-serving.ts';
import { asLines, readTask, type TextSizes, tasks, textSource } from './train-text.ts';
import { benchTrainstep } from './trainstep.ts';

export type RecipePart = Partial<Recipe>;

/** By name. `diag` is the default; the others' orders and scales are the recipe's defaults too. */
export const variants: Readonly<Record<string, RecipePart>> = {
  lora_truncated: { kind: 'lora', order: 'as-trained' },
  lora_squeezed: { kind: 'lora' },
  diag: { objective: 'diag' },
  binary: { objective: 'binary' },
  dylora: { objective: 'dylora' },
  multi: { objective: 'multi' },
  sandwich: { objective: 'sandwich' },
};
const defaultVariant = 'diag';
/** A rank may lose so much, in nats, to the one below it. */
const monotoneSlack = 0.02;

export interface TrainBenchSizes {
  /** Of each task; an adapter learns all tasks. */
  readonly texts: TextSizes;
  readonly recipe: RecipePart;
  readonly serving: ServingSizes;
  /** Beside PEFT: full windows, as it has them. */
  readonly product: { readonly texts: number; readonly recipe: RecipePart };
}

export const common: RecipePart = {
  ...{ rank: 32, batchWindows: 1, windowTokens: 128, accumulation: 1, recompute: false },
  ...{ learningRate: 1e-3, warmupShare: 0.1, seed: 42 },
};

const fullTrain: TrainBenchSizes = {
  texts: { training: 300, heldOut: 12 },
  recipe: { ...common, stepsMax: 30 },
  serving: {
    ...{ streams: 4, promptTokens: 32, newTokens: 64, seconds: 6, idleSeconds: 4 },
    recipe: { ...common, windowTokens: 64, stepsMax: 100_000, epochs: 100, heldOutShare: 0.02 },
  },
  product: {
    texts: 100,
    recipe: { ...common, kind: 'lora', rank: 16, batchWindows: 4, stepsMax: 6 },
  },
};

export interface TrainBenchSettings {
  readonly modelPath: string;
  readonly threads: number;
  readonly weights: WeightMode;
  readonly folder: string;
  /** What has been done so far, a line each. */
  readonly tell: (text: string) => void;
}

export type LossesByRank = Readonly<Record<string, number>>;

export interface TrainReport extends Report {
  /** In nats by variant and rank; `base` has rank 0. */
  readonly losses: Readonly<Record<string, LossesByRank>>;
}

export async function benchTrain(
  settings: TrainBenchSettings,
  rounds: number,
  sizes: TrainBenchSizes = fullTrain,
): Promise<TrainReport> {
  const { folder, threads, tell } = settings;
  const files = writeTexts(folder, sizes.texts);
  const requests = Object.entries(variants).map(
    ([name, part]): RunRequest => ({ ...files, name, recipe: recipeOf(sizes.recipe, part) }),
  );
  const place = await placeOf(settings);
  const runs = await runAll(place, requests, { atOnce: threads, tell });
  const step = await benchTrainstep(settings, rounds);
  tell(`ratio to PEFT: ${step.figures.ratio_to_peft}`);
  const product = await measureProduct(place, threads, sizes.product);
  const measured = await measureServing(settings, rounds, {
    sizes: sizes.serving,
    trainingText: asLines(tasks.flatMap((task) => readTask(task, sizes.texts).training)),
  });
  const serving = summariseServing(measured);
  const { losses, figures, series } = summariseRuns(runs);
  const peft = seriesOf('tokens/s', step.series.peft_step_ms!.values.map(perSecond(stepTokens)));
  const ours = seriesOf(
    'tokens/s',
    product.map(({ tokens, ms }) => perSecond(tokens)(ms)),
  );
  const { ratio_to_peft, recompute_ratio_to_peft, cpu_ratio_to_peft } = step.figures;
  return {
    bench: 'train',
    figures: {
      ...{ ratio_to_peft: ratio_to_peft!, recompute_ratio_to_peft: recompute_ratio_to_peft! },
      cpu_ratio_to_peft: cpu_ratio_to_peft!,
      product_ratio_to_peft: round(ours.median / peft.median),
      ...figures,
      ...serving.figures,
    },
    losses,
    series: { ...series, product: ours, peft, ...serving.series },
    sides: { ...step.sides, trainers: `${threads} at once, one thread each` },
    notes: notesOf(sizes, requests),
  };
}

/** Of trainstep: 4 × 128. */
const stepTokens = 512;
const perSecond =
  (tokens: number) =>
  (ms: number): number =>
    (1000 * tokens) / ms;

export async function placeOf({ modelPath, folder }: TrainBenchSettings): Promise<RunPlace> {
  return { modelPath, folder, modelHash: await sha256OfFile(modelPath) };
}

export function recipeOf(...parts: readonly RecipePart[]): Recipe {
  return parseRecipe(Object.assign({}, ...parts), 'recipe');
}

function writeTexts(
  folder: string,
  sizes: TextSizes,
): Pick<RunRequest, 'trainingPath' | 'heldOutPath'> {
  const texts = tasks.map((task) => readTask(task, sizes));
  const write = (side: 'training' | 'heldOut'): string => {
    const path = join(folder, `${side}.jsonl`);
    writeFileSync(path, asLines(texts.flatMap((one) => one[side])));
    return path;
  };
  return { trainingPath: write('training'), heldOutPath: write('heldOut') };
}

/** Steps of the product's own trainer, all threads, of the shape that trainstep gives both sides; the first is dropped. */
async function measureProduct(
  place: RunPlace,
  threads: number,
  { texts, recipe }: TrainBenchSizes['product'],
): Promise<readonly StepTold[]> {
  const trainingPath = join(place.folder, 'product.jsonl');
  const examples = readTask('de', { training: texts, heldOut: 0 }).training;
  writeFileSync(trainingPath, asLines(examples));
  const request = { name: 'product', trainingPath, heldOutPath: null };
  const parsed = recipeOf(recipe, { heldOutShare: 0 });
  const { steps } = await runTrainer(place, { ...request, recipe: parsed }, threads);
  return steps.slice(1);
}

/** By rank, as it is served. */
export function byRank(losses: readonly RankLoss[]): LossesByRank {
  return Object.fromEntries(losses.map(({ rank, loss }) => [String(rank), loss]));
}

/** 1 when no rank is worse than the one below it by more than the slack. */
export function isMonotone(losses: readonly RankLoss[]): number {
  return Number(
    losses.every(({ loss }, i) => loss <= (losses[i - 1]?.loss ?? Infinity) + monotoneSlack),
  );
}

export function auracsOf({ losses, baseLoss }: TrainingResult): Aurac {
  return gainAurac(baseLoss!, losses);
}

export function summariseRuns(runs: ReadonlyMap<string, RunResult>): {
  readonly losses: Readonly<Record<string, LossesByRank>>;
  readonly figures: Readonly<Record<string, number>>;
  readonly series: Readonly<Record<string, Series>>;
} {
  const ended = [...runs].map(([name, { result, steps }]) => {
    if (result === null) throw new Error(`${name}: training diverged`);
    return { name, result, steps };
  });
  const found = ended.find(({ name }) => name === defaultVariant)!.result;
  const areas = ended.map(({ name, result }) => ({ name, ...auracsOf(result) }));
  return {
    losses: {
      base: { 0: found.baseLoss! },
      ...Object.fromEntries(ended.map(({ name, result }) => [name, byRank(result.losses)])),
    },
    figures: {
      monotone: isMonotone(found.losses),
      ...Object.fromEntries(areas.map(({ name, v1 }) => [`aurac_${name}`, round(v1)])),
      ...Object.fromEntries(areas.map(({ name, v2 }) => [`aurac_v2_${name}`, round(v2)])),
    },
    series: Object.fromEntries(
      ended.map(({ name, steps }) => [
        `train_${name}`,
        seriesOf(
          'tokens/s',
          steps.slice(1).map(({ tokens, ms }) => perSecond(tokens)(ms)),
        ),
      ]),
    ),
  };
}

function notesOf({ texts, recipe }: TrainBenchSizes, requests: readonly RunRequest[]): string[] {
  const { rank, stepsMax, windowTokens, batchWindows, learningRate } = recipeOf(recipe);
  const passes = requests.map((one) => `${one.name} ${passesPerStep(one.recipe)}`).join(', ');
  return [
    `texts: ${textSource}; ${texts.training} messages to learn and ${texts.heldOut} held out by hash, of each of ${tasks.join(', ')}, both in one adapter`,
    `losses: nats per token of held-out translations, at each rank as it is served (f16 pairs), R = ${rank}, ${stepsMax} steps of ${batchWindows} × ${windowTokens} tokens, learning rate ${learningRate} for all; equal steps, not equal time`,
    `passes through the model a step: ${passes}`,
    'lora_truncated: ranks in the order they were trained in; lora_squeezed: the same numbers in the order of their SVD',
    `monotone: of ${defaultVariant}, the default, with ${monotoneSlack} nats of slack`,
    'ratio_to_peft: trainstep’s, the same f32 numbers on both sides; product_ratio_to_peft: tokens/s of the product’s trainer (quantised base, learnt tokens alone in the output layer, its own optimiser, clipping, messages) over PEFT’s',
    'serving_p99_ratio: 99th percentile of the time between two tokens of a stream, at the client, beside a job over without; medians of the rounds. _settled: without the first 2 s of each phase',
    'training_share_kept: tokens/s of the job beside the streams over those without any',
  ];
}
