// A training run without gradients: each generation's members answer prompts with the serving decoder, and what their answers
// are worth moves the adapter (eggroll.ts). What is trained is B of each module; A stays as it began, so that no member's
// weights are ever made (member-pages.ts). A step's loss is what its answers lack of the full score.

import { createRandom } from '../adapters/families/seeded-random.ts';
import { generationOf, openPacked } from '../adapters/pack.ts';
import type { Packed } from '../adapters/pack-pairs.ts';
import { packedConfig } from '../adapters/packed-import.ts';
import type { RankLoss } from '../jobs/messages.ts';
import type { EggrollRecipe } from '../jobs/recipe.ts';
import { Decoder } from '../model/decoder.ts';
import { moduleIndex } from '../model/decoder-config.ts';
import { scrapCells } from '../model/step-inputs.ts';
import { type AdapterRows, uniformRows } from '../model/stepper.ts';
import { tensorName } from '../model/trained-delta.ts';
import { type Checkpoint, joinValues, refused, splitValues } from './checkpoint.ts';
import { addNoise, type PairNoise, pairNoise, pairWeights, shapeFitness } from './eggroll.ts';
import { FamilyTraining } from './family-training.ts';
import { clipGradients } from './gradient-norm.ts';
import { learningRateAt } from './learning-rate.ts';
import {
  memberRows,
  type PageLayout,
  pageLayout,
  type TrainedPair,
  writeNoise,
  writeRanks,
} from './member-pages.ts';
import { bytesOfWeights } from './memory-estimate.ts';
import { streams } from './objective.ts';
import type { Optimizer, Parameter } from './optimizers/optimizer.ts';
import { shuffle } from './packing.ts';
import { type AdapterFiles, choiceOf, publishModules, servedFactors } from './publish.ts';
import {
  type Breathe,
  checkSizes,
  dataOf,
  hashRun,
  optimizerOf,
  type RunRecipe,
  type SessionOptions,
  type StepReport,
} from './session.ts';
import { startModules } from './start.ts';
import { type AskedTask, cellsPerRow, type Scoring, scoresOf } from './task-scores.ts';
import { type Task, taskOf } from './tasks.ts';

export interface EggrollOptions extends SessionOptions {
  /** As the recipe has it. */
  readonly scoring: Scoring;
}

/** Rows of a step: prompts are computed in pieces of so many tokens. */
const rowsPerStep = 512;

export class EggrollSession implements Disposable {
  readonly #options: EggrollOptions;
  readonly #method: EggrollRecipe;
  readonly #training: FamilyTraining;
  readonly #pairs: readonly TrainedPair[];
  readonly #trained: readonly Parameter[];
  readonly #tasks: readonly Task[];
  readonly #heldOut: readonly Task[];
  readonly #cellsPerRow: number;
  readonly #decoder: Decoder;
  readonly #pages: PageLayout;
  readonly #members: readonly AdapterRows[];
  readonly #data: string;
  #recipe: RunRecipe;
  #optimizer: Optimizer;
  #step = 0;

  constructor(options: EggrollOptions) {
    const { base, recipe, scoring } = options;
    const method = recipe.method as EggrollRecipe;
    checkSizes(options);
    this.#options = options;
    this.#recipe = recipe;
    this.#method = method;
    this.#data = dataOf(options);
    this.#tasks = options.training.map((example) => taskOf(example, scoring.text));
    this.#heldOut = options.heldOut.map((example) => taskOf(example, scoring.text));
    this.#training = new FamilyTraining(choiceOf(recipe), startModules(options));
    this.#pairs = pairsOf(this.#training);
    this.#trained = this.#pairs.map(({ b }) => b);
    this.#optimizer = optimizerOf(recipe, this.#trained);

    this.#pages = pageLayout(recipe.rank, method);
    this.#members = memberRows(recipe.rank, method, base.config);
    const all = [...this.#tasks, ...this.#heldOut];
    this.#cellsPerRow = cellsPerRow(all, scoring, base.config.contextLength);
    this.#decoder = new Decoder({
      ...{ config: base.config, weights: base.weights, kernels: base.kernels },
      cells: scrapCells + method.population * this.#cellsPerRow,
      cellType: 'f16',
      pages: this.#pages.pages,
      pageType: 'f16',
      tokensMax: Math.max(rowsPerStep, method.population),
      segmentsMax: method.population,
    });
  }

  /** Begins anew, with this learning rate and number of generations. */
  restart(learningRate: number, stepsMax: number | null): void {
    this.#recipe = { ...this.#recipe, learningRate, stepsMax };
    this.#optimizer = optimizerOf(this.#recipe, this.#trained);
    this.#training.restart();
    this.#step = 0;
  }

  get #groups(): number {
    return this.#method.population / this.#method.groupSize;
  }

  get steps(): number {
    const { epochs, stepsMax } = this.#recipe;
    return Math.min(Math.ceil((epochs * this.#tasks.length) / this.#groups), stepsMax ?? Infinity);
  }

  /** Generations so far. */
  get step(): number {
    return this.#step;
  }

  /** What is trained: [R, out] of each module. */
  get parameters(): readonly (Parameter & { readonly module: number })[] {
    return this.#pairs.map(({ module, b }) => ({ ...b, module }));
  }

  /** Names all that the result depends on. */
  get run(): string {
    return hashRun(this.#recipe, this.#data);
  }

  get memory(): Readonly<Record<string, number>> {
    const { config, weights } = this.#options.base;
    const { pages, pageBytes, cells } = this.#decoder;
    return {
      weights: bytesOfWeights(weights),
      factors: 4 * 4 * this.#training.numbers.trained,
      optimizer: this.#optimizer.stateBytes,
      pages: pages * pageBytes,
      cells: 2 * 2 * cells * config.blocks * config.kvHeads * config.headSize,
    };
  }

  /** One generation. An interrupted one leaves no trace. */
  async takeStep(
    breathe: Breathe,
  ): Promise<Pick<StepReport, 'step' | 'loss' | 'learningRate' | 'tokens'>> {
    const { population, groupSize, noiseRank } = this.#method;
    for (const pair of this.#pairs) {
      const noises = Array.from({ length: population / 2 }, (_, i) => this.#noise(pair, i));
      writeNoise(this.#decoder, pair, noises, this.#pages.noise);
      const { site, a, b } = pair;
      writeRanks(this.#decoder, site, { a, b: b.values }, this.#pages.own);
    }
    const tasks = this.#tasksOfStep();
    const asked = this.#members.map((adapter, i) => {
      return { task: tasks[Math.floor(i / groupSize)]!, adapter };
    });
    const { scores, tokens } = await this.#ask(asked, breathe);
    const weights = pairWeights(shapeFitness(scores, groupSize));
    for (const pair of this.#pairs) {
      pair.b.gradient.fill(0);
      weights.forEach((weight, i) => {
        if (weight !== 0) addNoise(pair.b.gradient, this.#noise(pair, i), -weight, noiseRank);
      });
    }
    clipGradients(this.#trained, this.#recipe.clipNorm ?? Infinity);
    const learningRate = learningRateAt(this.#step, this.steps, this.#recipe);
    this.#optimizer.step(this.#trained, learningRate);
    this.#step += 1;
    return { step: this.#step, loss: 1 - meanOf(scores), learningRate, tokens };
  }

  /** One task a group: all of them once an epoch, in an order of its own. */
  #tasksOfStep(): Task[] {
    const count = this.#tasks.length;
    const first = this.#step * this.#groups;
    const orders = new Map<number, readonly number[]>(); // by epoch
    return Array.from({ length: this.#groups }, (_, i) => {
      const epoch = Math.floor((first + i) / count);
      const order = orders.get(epoch) ?? this.#orderOf(epoch);
      orders.set(epoch, order);
      return this.#tasks[order[(first + i) % count]!]!;
    });
  }

  #orderOf(epoch: number): readonly number[] {
    const order = this.#tasks.map((_, i) => i);
    shuffle(order, createRandom(BigInt(this.#recipe.seed), [streams.order, epoch]));
    return order;
  }

  #ask(asked: readonly AskedTask[], breathe: Breathe): ReturnType<typeof scoresOf> {
    const place = { stepper: this.#decoder, cellsPerRow: this.#cellsPerRow };
    return scoresOf(place, asked, this.#options.scoring, breathe);
  }

  #noise({ module, b }: TrainedPair, pair: number): PairNoise {
    const key = { seed: this.#recipe.seed, generation: this.#step, pair, module };
    return pairNoise(key, b, this.#method.noiseRank);
  }

  /** The adapter as it is now. */
  publish(): Packed {
    const { base, recipe, start } = this.#options;
    const about = { baseHash: base.hash, step: this.#step, start, bases: null };
    return publishModules(recipe, this.#training.modules(), about);
  }

  files(): AdapterFiles {
    return { config: packedConfig, bytes: this.publish().bytes };
  }

  /** What answers of the base to held-out prompts lack; null without any. */
  async baseLoss(breathe: Breathe): Promise<number | null> {
    return this.#heldOut.length === 0 ? null : await this.#heldOutLoss(null, breathe);
  }

  /** Of what was published, at the recipe's ranks. */
  async evaluate({ bytes }: Packed | AdapterFiles, breathe: Breathe): Promise<RankLoss[]> {
    if (this.#heldOut.length === 0) return [];
    const packed = openPacked(bytes, generationOf(bytes));
    const { ranks, rank: all } = this.#recipe;
    const losses: RankLoss[] = [];
    for (const rank of ranks) {
      for (const { site } of this.#pairs) {
        const factors = servedFactors(packed, site, { level: rank, ranks: all });
        writeRanks(this.#decoder, site, factors, this.#pages.own);
      }
      const loss = await this.#heldOutLoss(uniformRows(this.#pages.own, all), breathe);
      losses.push({ rank, loss });
    }
    return losses;
  }

  async #heldOutLoss(adapter: AdapterRows | null, breathe: Breathe): Promise<number> {
    const asked = this.#heldOut.map((task) => ({ task, adapter }));
    return 1 - meanOf((await this.#ask(asked, breathe)).scores);
  }

  checkpoint(): Checkpoint {
    const parameters = joinValues(this.#trained.map(({ values }) => values));
    const { learningRate } = this.#recipe;
    const progress = { step: this.#step, skipped: false, taken: 0, accumulation: 1, learningRate };
    return { ...progress, run: this.run, parameters, optimizer: this.#optimizer.save() };
  }

  /** Of a checkpoint of the same run. */
  restore({ step, run, parameters, optimizer }: Checkpoint): void {
    if (run !== this.run) throw refused('it is of another recipe, base or file');
    this.#optimizer.restore(optimizer);
    splitValues(
      parameters,
      this.#trained.map(({ values }) => values),
    );
    this.#step = step;
  }

  /** Cells and pages go with the base's kernels, which are the caller's. */
  [Symbol.dispose](): void {}
}

function pairsOf(training: FamilyTraining): TrainedPair[] {
  const named = new Map(training.parameters.map((parameter) => [parameter.name, parameter]));
  return training.modules().map(({ site }) => ({
    site,
    module: moduleIndex(site.block, site.projection),
    a: named.get(tensorName(site, 'a'))!.values,
    b: named.get(tensorName(site, 'b'))!,
  }));
}

function meanOf(values: readonly number[]): number {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}
