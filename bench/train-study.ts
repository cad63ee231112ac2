// `bench train --study`: which objective, at its own best learning rate. For each task and variant the rate is chosen by AURAC
// on validation texts with the first seed; then every seed is trained at that rate and evaluated on texts that no choice saw.

import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { median, round, seriesOf } from './measure.ts';
import {
  auracsOf,
  byRank,
  common,
  isMonotone,
  type LossesByRank,
  placeOf,
  type RecipePart,
  recipeOf,
  type TrainBenchSettings,
  type TrainReport,
  variants,
} from './train.ts';
import { passesPerStep, type RunRequest, type RunResult, runAll } from './train-runs.ts';
import { asLines, readTask, type Task, tasks, textSource } from './train-text.ts';

export interface StudySizes {
  readonly training: number;
  /** Of validation and of test. */
  readonly heldOut: number;
  readonly tasks: readonly Task[];
  /** Keys of `studied`. */
  readonly variants: readonly string[];
  readonly rates: readonly number[];
  readonly seeds: readonly number[];
  readonly recipe: RecipePart;
}

/** What is served as the publication's repository serves it, too. */
const studied: Readonly<Record<string, RecipePart>> = {
  ...variants,
  diag_as_published: { objective: 'diag', scaling: 'none', order: 'as-published' },
};

const fullStudy: StudySizes = {
  ...{ training: 600, heldOut: 40, tasks, variants: Object.keys(studied) },
  rates: [3e-4, 1e-3, 3e-3, 1e-2],
  seeds: [42, 666, 2408], // the publication's
  recipe: { ...common, stepsMax: 100 },
};

interface Cell {
  readonly task: Task;
  readonly variant: string;
}

export interface StudyRow extends Cell {
  readonly rate: number;
  /** AURAC on validation texts by rate; null: diverged. */
  readonly validation: Readonly<Record<string, number | null>>;
  /** One per seed that did not diverge. */
  readonly runs: readonly {
    readonly seed: number;
    readonly aurac: number;
    readonly losses: LossesByRank;
  }[];
  readonly mean: LossesByRank;
  /** Largest less smallest of the seeds. */
  readonly spread: LossesByRank;
  /** Seeds whose ranks were monotone. */
  readonly monotone: number;
}

export interface StudyReport extends TrainReport {
  readonly study: readonly StudyRow[];
}

export async function benchTrainStudy(
  settings: TrainBenchSettings,
  sizes: StudySizes = fullStudy,
): Promise<StudyReport> {
  const { threads, tell } = settings;
  const place = await placeOf(settings);
  const paths = new Map(sizes.tasks.map((task) => [task, writeTask(settings.folder, task, sizes)]));
  const cells = sizes.tasks.flatMap((task) =>
    sizes.variants.map((variant): Cell => ({ task, variant })),
  );
  const requestOf = (cell: Cell, rate: number, seed: number, side: HeldOut): RunRequest => ({
    name: nameOf(cell, rate, seed),
    recipe: recipeOf(sizes.recipe, studied[cell.variant]!, { learningRate: rate, seed }),
    trainingPath: paths.get(cell.task)!.training,
    heldOutPath: paths.get(cell.task)![side],
  });
  const [first] = sizes.seeds;
  const tried = await runAll(
    place,
    cells.flatMap((cell) => sizes.rates.map((rate) => requestOf(cell, rate, first!, 'validation'))),
    { atOnce: threads, tell },
  );
  const chosen = cells.map((cell) => ({ cell, ...chooseRate(cell, first!, sizes.rates, tried) }));
  const final = await runAll(
    place,
    chosen.flatMap(({ cell, rate }) =>
      sizes.seeds.map((seed) => requestOf(cell, rate, seed, 'test')),
    ),
    { atOnce: threads, tell },
  );
  const rows = chosen.map(({ cell, rate, validation }) => {
    const runs = sizes.seeds.map((seed) => ({ seed, ...final.get(nameOf(cell, rate, seed))! }));
    return rowOf({ ...cell, rate, validation }, runs);
  });
  return { ...summariseStudy(rows), sides: { trainers: `${threads} at once, one thread each` } };
}

type HeldOut = 'validation' | 'test';
const nameOf = ({ task, variant }: Cell, rate: number, seed: number): string =>
  `${task} ${variant} ${rate} ${seed}`;

function writeTask(
  folder: string,
  task: Task,
  { training, heldOut }: StudySizes,
): Readonly<Record<HeldOut | 'training', string>> {
  const texts = readTask(task, { training, heldOut: 2 * heldOut });
  const write = (name: string, examples: typeof texts.training): string => {
    const path = join(folder, `${task}-${name}.jsonl`);
    writeFileSync(path, asLines(examples));
    return path;
  };
  return {
    training: write('training', texts.training),
    validation: write('validation', texts.heldOut.slice(heldOut)),
    test: write('test', texts.heldOut.slice(0, heldOut)),
  };
}

/** Throws where all diverged. */
export function chooseRate(
  cell: Cell,
  seed: number,
  rates: readonly number[],
  tried: ReadonlyMap<string, RunResult>,
): Pick<StudyRow, 'rate' | 'validation'> {
  const areas = rates.map((rate) => {
    const { result } = tried.get(nameOf(cell, rate, seed))!;
    return { rate, area: result === null ? null : auracsOf(result).v1 };
  });
  const [best] = areas
    .filter(({ area }) => area !== null)
    .toSorted((a, b) => b.area! - a.area! || a.rate - b.rate);
  if (best === undefined) throw new Error(`${cell.task} ${cell.variant}: diverged at every rate`);
  const validation = areas.map(({ rate, area }) => [rate, area === null ? null : round(area)]);
  return { rate: best.rate, validation: Object.fromEntries(validation) };
}

type SeedRun = RunResult & { readonly seed: number };

export function rowOf(
  about: Cell & Pick<StudyRow, 'rate' | 'validation'>,
  runs: readonly SeedRun[],
): StudyRow {
  const ended = runs.flatMap(({ seed, result }) => (result === null ? [] : [{ seed, result }]));
  if (ended.length === 0) throw new Error(`${about.task} ${about.variant}: every seed diverged`);
  const ranks = ended[0]!.result.losses.map(({ rank }) => rank);
  const each = (figure: (losses: readonly number[]) => number): LossesByRank =>
    Object.fromEntries(
      ranks.map((rank, i) => [rank, figure(ended.map(({ result }) => result.losses[i]!.loss))]),
    );
  return {
    ...about,
    runs: ended.map(({ seed, result }) => ({
      seed,
      aurac: auracsOf(result).v1,
      losses: byRank(result.losses),
    })),
    mean: each((losses) => losses.reduce((sum, loss) => sum + loss, 0) / losses.length),
    spread: each((losses) => Math.max(...losses) - Math.min(...losses)),
    monotone: ended.filter(({ result }) => isMonotone(result.losses) === 1).length,
  };
}

function summariseStudy(rows: readonly StudyRow[]): Omit<StudyReport, 'sides'> {
  const of = (row: StudyRow): string => `${row.task}_${row.variant}`;
  const areas = (row: StudyRow): number[] => row.runs.map(({ aurac }) => aurac);
  const perStep = Object.entries(studied).map(
    ([name, part]) => `${name} ${passesPerStep(recipeOf(common, part))}`,
  );
  return {
    bench: 'train --study',
    figures: Object.fromEntries(rows.map((row) => [`aurac_${of(row)}`, round(median(areas(row)))])),
    losses: Object.fromEntries(rows.map((row) => [of(row), row.mean])),
    study: rows,
    series: Object.fromEntries(
      rows.map((row) => [`aurac_${of(row)}`, seriesOf('nats', areas(row))]),
    ),
    notes: [
      `texts: ${textSource}; an adapter for each task`,
      'aurac: area under the nats gained over the base, over the ranks, on texts that the choice of the rate did not see; losses: means of the seeds',
      `passes through the model a step: ${perStep.join(', ')}`,
      'diag_as_published: served without P, without folding and ordering, as the publication’s repository does; scale 1, which a packed prefix can have',
    ],
  };
}
