// The training loop of one adapter: owns a TrainingDecoder, the factors that it trains, their optimiser and the order of the
// data. A step's micro-batches and passes add up their gradients; then they are clipped, and the optimiser takes its step.
//
// Nothing depends on time or on how often a job was interrupted: a session restored at step n goes on with the bytes that an
// uninterrupted one has, on a CPU with one thread.

import { createHash } from 'node:crypto';
import { scaleOf } from '../adapters/families/matryoshka.ts';
import type { PackedAdapter } from '../adapters/pack.ts';
import { generationOf, openPacked } from '../adapters/pack.ts';
import type { Packed } from '../adapters/pack-pairs.ts';
import { packedConfig } from '../adapters/packed-import.ts';
import { GatewayError } from '../errors.ts';
import type { RankLoss } from '../jobs/messages.ts';
import type { Recipe } from '../jobs/recipe.ts';
import type { Kernels } from '../kernels/kernels.ts';
import type { DecoderWeights } from '../model/decoder.ts';
import type { DecoderConfig } from '../model/decoder-config.ts';
import { TrainingDecoder } from '../model/training-decoder.ts';
import { cutProducts, ranksAfter, ranksBefore } from './annealing.ts';
import { checkQueryable, labelsOf, queryableFiles, queryableStart } from './atom-bank.ts';
import { nextBatchSize } from './batch-growth.ts';
import { type Checkpoint, joinValues, refused, splitValues } from './checkpoint.ts';
import { shrinkRanks, thresholdAt } from './codyra.ts';
import { type Bases, cosoOf } from './continual.ts';
import type { Coso } from './coso.ts';
import { writeBases } from './coso-file.ts';
import { ServedLoss } from './evaluation.ts';
import { type Example, hashExamples } from './examples.ts';
import { FamilyTraining, type Observer, type TrainingChoice } from './family-training.ts';
import { clipGradients } from './gradient-norm.ts';
import { learningRateAt } from './learning-rate.ts';
import { bytesOfWeights, estimateMemory, type TrainingMemory } from './memory-estimate.ts';
import { createOptimizer, type Optimizer, type Parameter } from './optimizers/optimizer.ts';
import { answersIn, type Layout, layOut, packWindows } from './packing.ts';
import { type AdapterFiles, checkStart, choiceOf, growthOf, publishModules } from './publish.ts';
import { addPenalty, pruneProducts } from './regularizer.ts';
import { startModules } from './start.ts';
import { computeGradients } from './step-gradients.ts';
import { inGroups, planSteps, type StepPlan } from './step-plan.ts';

/** What is trained on: nothing of it is changed. */
export interface TrainingBase {
  readonly config: DecoderConfig;
  readonly weights: DecoderWeights;
  readonly kernels: Kernels;
  /** SHA-256 of the model file, hex. */
  readonly hash: string;
}

/** A recipe whose learning rate is decided. */
export interface RunRecipe extends Recipe {
  readonly learningRate: number;
}

export interface SessionOptions {
  readonly base: TrainingBase;
  readonly recipe: RunRecipe;
  /** At least one. */
  readonly training: readonly Example[];
  readonly heldOut: readonly Example[];
  readonly start: PackedAdapter | null;
  /** moduleIndex of those that are trained, of the targets'; null: all. */
  readonly modules?: ReadonlySet<number> | null;
  /** What `start` must keep, where the recipe has coso. */
  readonly bases?: Bases;
  /** The bank that `start` is over, of a queryable adapter. */
  readonly bank?: PackedAdapter | null;
  /** What a queryable's instruction adds to its atoms' logits. */
  readonly prior?: readonly number[] | null;
}

export interface StepReport {
  /** Steps taken, this one included. */
  readonly step: number;
  /** Mean over the step's learnt tokens, before it was taken. */
  readonly loss: number;
  /** Before clipping. */
  readonly gradientNorm: number;
  readonly learningRate: number;
  /** Rows that held a token. */
  readonly tokens: number;
  readonly microBatches: number;
  /** False: loss or gradient was not finite, and the factors stay as they were. */
  readonly isTaken: boolean;
}

/** Between pieces of computing: returns when it may go on, throws when it must not. */
export type Breathe = () => Promise<void>;

export class TrainingSession implements Disposable {
  /** By module, in the family's order. */
  readonly parameters: readonly Parameter[];
  readonly #options: SessionOptions;
  readonly #choice: TrainingChoice;
  readonly #training: FamilyTraining;
  readonly #plan: StepPlan;
  readonly #heldOut: readonly Layout[];
  readonly #answersMax: number;
  readonly #decoder: TrainingDecoder;
  readonly #served: ServedLoss;
  readonly #added: Float32Array;
  /** Of all examples and the generation that training goes on from. */
  readonly #data: string;
  #recipe: RunRecipe;
  #optimizer: Optimizer;
  /** The same, where the recipe has it. */
  #coso: Coso | null = null;
  #step = 0;
  #skipped = false;
  /** Micro-batches that were taken, and how many the next step takes. */
  #taken = 0;
  #accumulation: number;

  constructor(options: SessionOptions) {
    const { base, recipe, training, heldOut } = options;
    const { config, kernels } = base;
    checkSizes(options);
    this.#options = options;
    this.#recipe = recipe;
    this.#accumulation = recipe.accumulation;
    this.#data = dataOf(options);
    this.#plan = planSteps(training, recipe);
    this.#heldOut = heldOutBatches(heldOut, recipe);
    this.#answersMax = this.#heldOut.reduce(
      (most, { answers }) => Math.max(most, answers.length),
      this.#plan.answersMax,
    );
    const { recompute, batchWindows: windows, windowTokens: windowRows } = recipe;
    const modules = startModules(options);
    const growth = growthOf(recipe, modules.length);
    this.#choice = choiceOf(recipe, queryableStart(options), options.prior);
    this.#training = new FamilyTraining(this.#choice, modules, growth);
    this.parameters = this.#training.parameters;
    this.#added = new Float32Array(Math.max(...this.parameters.map(({ values }) => values.length)));
    const sizes = { windows, windowRows, answersMax: this.#answersMax };
    const over = { config, weights: base.weights, kernels, ...sizes };
    this.#decoder = new TrainingDecoder({ ...over, delta: this.#training.delta, recompute });
    this.#served = new ServedLoss(over, recipe, this.#training);
    for (const [name, values] of this.#training.constants) this.#decoder.write(name, values);
    this.#optimizer = this.#createOptimizer();
    this.#upload();
  }

  /** Begins anew, with this learning rate and number of steps. */
  restart(learningRate: number, stepsMax: number | null): void {
    this.#recipe = { ...this.#recipe, learningRate, stepsMax };
    this.#optimizer = this.#createOptimizer();
    this.#step = 0;
    this.#skipped = false;
    this.#taken = 0;
    this.#accumulation = this.#recipe.accumulation;
    this.#training.restart();
    this.#upload();
  }

  #createOptimizer(): Optimizer {
    this.#coso = cosoOf(this.#recipe, this.parameters, this.#options.bases ?? new Map());
    return this.#coso ?? optimizerOf(this.#recipe, this.parameters);
  }

  /** Names all that the result depends on. */
  get run(): string {
    return hashRun(this.#recipe, this.#data);
  }

  get #observer(): Observer {
    const { batchWindows, windowTokens } = this.#options.recipe;
    const read = (name: string, out: Float32Array): void => this.#decoder.read(name, out);
    const [step, steps] = [this.#step + 1, this.steps];
    return { rows: batchWindows * windowTokens, read, step, steps };
  }

  /** Where batches grow, fewer as they do. */
  get steps(): number {
    const { batchSchedule, stepsMax } = this.#recipe;
    const left = this.#plan.microBatchCount - this.#taken;
    const all =
      batchSchedule === null ? this.#plan.steps : this.#step + Math.ceil(left / this.#accumulation);
    return Math.min(all, stepsMax ?? Infinity);
  }

  /** Steps taken. */
  get step(): number {
    return this.#step;
  }

  get memory(): TrainingMemory {
    const { base, recipe } = this.#options;
    return estimateMemory({
      config: base.config,
      recipe: { ...recipe, rank: ranksBefore(recipe) },
      answersMax: this.#answersMax,
      weightBytes: bytesOfWeights(base.weights),
      optimizerBytes: this.#optimizer.stateBytes,
      numbers: this.#training.numbers,
    });
  }

  /** Throws INVALID_REQUEST when two steps in a row have no finite loss. An interrupted step leaves no trace. */
  async takeStep(breathe: Breathe): Promise<StepReport> {
    const recipe = this.#recipe;
    const groups =
      recipe.batchSchedule === null
        ? this.#plan.microBatches(this.#step)
        : this.#plan.slice(this.#taken, this.#accumulation);
    const source = {
      decoder: this.#decoder,
      delta: this.#training.deltaAt(this.#step, this.steps),
      parameters: this.parameters,
      gateRanks: Math.max(0, ...this.#training.delta.gateRanks),
      added: this.#added,
    };
    const { training } = this.#options;
    const data = { recipe, training, step: this.#step, groups };
    const { loss, tokens, statistics } = await computeGradients(source, data, breathe);
    if (Number.isFinite(loss)) addPenalty(recipe, this.parameters);
    this.#training.beforeStep();
    const gradientNorm = clipGradients(this.parameters, recipe.clipNorm ?? Infinity);
    const learningRate = learningRateAt(this.#step, this.steps, recipe);
    const isTaken = Number.isFinite(loss) && Number.isFinite(gradientNorm);
    if (!isTaken && this.#skipped) {
      const what = `loss ${loss}, gradient ${gradientNorm} at steps ${this.#step} and ${this.#step + 1}`;
      throw new GatewayError('INVALID_REQUEST', `training diverged: ${what}`, {
        param: 'learningRate',
      });
    }
    if (isTaken) {
      this.#optimizer.step(this.parameters, learningRate);
      this.#reduceRanks();
      this.#training.afterStep(this.#observer);
      this.#upload();
    }
    this.#skipped = !isTaken;
    this.#step += 1;
    this.#taken += statistics.samples;
    if (isTaken && recipe.batchSchedule !== null) {
      this.#accumulation = nextBatchSize(this.#accumulation, statistics, recipe.batchSchedule);
    }
    const microBatches = statistics.samples;
    return { step: this.#step, loss, gradientNorm, learningRate, tokens, microBatches, isTaken };
  }

  /** After the optimiser's step. */
  #reduceRanks(): void {
    const { parameters, steps } = this;
    const { rankSelection, squeeze } = this.#recipe;
    pruneProducts(this.#recipe, parameters, this.#step + 1);
    if (rankSelection !== null) {
      shrinkRanks(parameters, thresholdAt(this.#step, steps, rankSelection));
    }
    if (squeeze === null) return;
    const ranks = ranksAfter(this.#recipe, this.#step + 1, steps);
    if (cutProducts(parameters, ranks)) this.#optimizer = this.#createOptimizer();
  }

  /** The adapter as it is now, and what will be beside it. */
  publish(bases: Uint8Array | null = null): Packed {
    const { base, recipe, start } = this.#options;
    const about = { baseHash: base.hash, step: this.#step, start, bases };
    return publishModules(recipe, this.#training.modules(), about);
  }

  /** What an import takes of it. */
  files(bases: Uint8Array | null = null): AdapterFiles {
    const { base, recipe, start } = this.#options;
    const choice = this.#choice;
    if (choice.kind !== 'queryable') {
      return { config: packedConfig, bytes: this.publish(bases).bytes };
    }
    const labels = labelsOf(recipe, choice.atoms, start);
    return queryableFiles(choice, this.#training.modules(), { labels, baseHash: base.hash });
  }

  /** What the next training must leave as it is; null where the recipe wants nothing kept. */
  bases(): Uint8Array | null {
    return this.#coso === null ? null : writeBases(this.#coso.consolidated());
  }

  /** Held-out loss of the base; null without held-out examples. */
  async baseLoss(breathe: Breathe): Promise<number | null> {
    return this.#heldOut.length === 0 ? null : await this.#served.ofBase(this.#heldOut, breathe);
  }

  /** Held-out loss of what was published, at the recipe's ranks; empty without held-out examples. */
  async evaluate({ bytes }: Packed | AdapterFiles, breathe: Breathe): Promise<RankLoss[]> {
    if (this.#heldOut.length === 0) return [];
    const isPacked = this.#choice.kind !== 'queryable';
    const packed = isPacked ? openPacked(bytes, generationOf(bytes)) : null;
    return await this.#served.byRank(packed, this.#heldOut, breathe);
  }

  checkpoint(): Checkpoint {
    const parameters = joinValues(this.#training.state);
    const optimizer = this.#optimizer.save();
    const { learningRate } = this.#recipe;
    const progress = { step: this.#step, skipped: this.#skipped, learningRate };
    const batches = { taken: this.#taken, accumulation: this.#accumulation };
    return { ...progress, ...batches, run: this.run, parameters, optimizer };
  }

  /** Of a checkpoint of the same run. */
  restore(checkpoint: Checkpoint): void {
    const { step, skipped, taken, accumulation, run, parameters, optimizer } = checkpoint;
    if (run !== this.run) throw refused('it is of another recipe, base or file');
    this.#optimizer.restore(optimizer);
    splitValues(parameters, this.#training.state);
    this.#step = step;
    this.#skipped = skipped;
    this.#taken = taken;
    this.#accumulation = accumulation;
    this.#upload();
  }

  #upload(): void {
    for (const { name, values } of this.parameters) this.#decoder.write(name, values);
    for (const name of this.#training.moving) {
      this.#decoder.write(name, this.#training.constants.get(name)!);
    }
  }

  /** The base is the caller's. */
  [Symbol.dispose](): void {
    this.#decoder[Symbol.dispose]();
    this.#served[Symbol.dispose]();
  }
}

export function checkSizes(options: SessionOptions): void {
  const { base, recipe, training, start } = options;
  const { contextLength } = base.config;
  if (recipe.windowTokens > contextLength) {
    const message = `windows of ${recipe.windowTokens} tokens, the base has ${contextLength}`;
    throw new GatewayError('INVALID_REQUEST', message, { param: 'windowTokens' });
  }
  if (training.length === 0) {
    throw new GatewayError('INVALID_REQUEST', 'there is no example to train on');
  }
  if (start !== null) checkStart(recipe, start, base.hash);
  if (recipe.kind === 'queryable') checkQueryable(recipe, base.config, options);
}

function heldOutBatches(examples: readonly Example[], recipe: Recipe): Layout[] {
  const { batchWindows: windows, windowTokens: windowRows } = recipe;
  const packed = packWindows(examples, windowRows, null);
  const weight = 1 / answersIn(examples, packed);
  return inGroups(packed, windows).map((group) =>
    layOut(examples, group, { windows, windowRows, weight }),
  );
}

export function dataOf({ base, training, heldOut, start }: SessionOptions): string {
  const hashes = [hashExamples(training), hashExamples(heldOut)];
  return JSON.stringify([base.hash, ...hashes, start?.generation ?? null]);
}

/** Of its recipe as it was decided, and of `dataOf`. */
export function hashRun(recipe: RunRecipe, data: string): string {
  return createHash('sha256')
    .update(JSON.stringify([recipe, data]))
    .digest('hex');
}

export function optimizerOf(recipe: Recipe, parameters: readonly Parameter[]): Optimizer {
  const { optimizer, weightDecay, seed, scaling, rank } = recipe;
  const scale = scaleOf(scaling, rank);
  const options = { ...optimizer, weightDecay, seed, scale };
  return createOptimizer(options, parameters);
}
