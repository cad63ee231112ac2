// A training file and a recipe → a packed adapter in a directory, from the first line to the last evaluation. What the trainer
// process runs; it owns no channel and no clock: it tells what happens, and asks between pieces of computing how to go on.

import { createReadStream } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { blobPath } from '../adapters/blobs.ts';
import { generationOf, openPacked, type PackedAdapter } from '../adapters/pack.ts';
import { asGatewayError, GatewayError } from '../errors.ts';
import { guardExamples } from '../jobs/guard-texts.ts';
import type { FromTrainer, TrainerSpec } from '../jobs/messages.ts';
import { defaultLearningRate, parseRecipe, type Recipe } from '../jobs/recipe.ts';
import type { Comparison } from '../jobs/refresh-gate.ts';
import { createKernels } from '../kernels/create-kernels.ts';
import { readDecoderConfig } from '../model/decoder-config.ts';
import { rememberedSha256 } from '../model/file-hash.ts';
import { type GgufFile, openGguf } from '../model/gguf.ts';
import { loadWeights } from '../model/weights.ts';
import { startOf } from './annealing.ts';
import { priorOf } from './atom-bank.ts';
import { readCheckpoint, writeCheckpoint } from './checkpoint.ts';
import { compareAdapters } from './compare.ts';
import { type Bases, directionsIn, readKept } from './continual.ts';
import { EggrollSession } from './eggroll-session.ts';
import { gainAurac } from './evaluation.ts';
import {
  createExampleEncoder,
  type Example,
  type ExampleEncoder,
  readExamples,
  type Split,
  splitExamples,
} from './examples.ts';
import { searchModules } from './module-search.ts';
import { type AdapterFiles, writePublished } from './publish.ts';
import {
  type Breathe,
  type SessionOptions,
  type TrainingBase,
  TrainingSession,
} from './session.ts';
import { chooseRate, firstRoundSteps, sweepRates } from './sweep.ts';
import { scoringOf } from './task-scores.ts';

export interface TrainHooks {
  readonly tell: (message: FromTrainer) => void;
  /** Waits for as long as computing must pause. `stop`: leave a checkpoint and end. */
  readonly breathe: () => Promise<'go' | 'stop'>;
  readonly nowMs: () => number;
}

/** Thrown through the session's computing: what was computed of the step under way is dropped. */
class Stopped extends Error {}

/** Ends with `result` or `stopped` told. Throws what is wrong with model, recipe, files or numbers. */
export async function trainFile(spec: TrainerSpec, hooks: TrainHooks): Promise<void> {
  const recipe = parseRecipe(spec.recipe, 'recipe');
  await checkModel(spec);
  using file = openGguf(spec.modelPath);
  const split = await readSplit(spec, recipe, file);
  const prepared = { spec, recipe, file, ...split, ...(await readStarts(spec, recipe)) };
  try {
    const modules = recipe.modules === 'all' ? null : await search(prepared, hooks);
    await trainModules({ ...prepared, modules }, hooks);
  } catch (error) {
    if (!(error instanceof Stopped)) throw error;
    hooks.tell({ kind: 'stopped' });
  }
}

interface Prepared extends Split {
  readonly spec: TrainerSpec;
  readonly recipe: Recipe;
  readonly file: GgufFile;
  readonly start: PackedAdapter | null;
  readonly bases: Bases;
  readonly bank: PackedAdapter | null;
}

/** In kernels of its own: nothing of it stays in memory. */
async function search(prepared: Prepared, hooks: TrainHooks): Promise<ReadonlySet<number>> {
  const base = await openBase(prepared.spec, prepared.file);
  using _ = base.kernels;
  const learningRate = rateOf(prepared.recipe, defaultLearningRate);
  const options = { ...prepared, base, recipe: { ...prepared.recipe, learningRate } };
  return (await searchModules(options, breatheBy(hooks))).kept;
}

async function trainModules(
  { spec, recipe, ...prepared }: Prepared & Pick<SessionOptions, 'modules'>,
  hooks: TrainHooks,
): Promise<void> {
  const base = await openBase(spec, prepared.file);
  using _ = base.kernels;
  const learningRate = rateOf(recipe, sweepRates[0]!);
  const start = startOf(recipe, prepared.start);
  const prior = priorOf(recipe, prepared, { file: prepared.file, width: base.config.width });
  const options = { ...prepared, start, prior, base, recipe: { ...recipe, learningRate } };
  using session =
    recipe.method === 'gradient'
      ? new TrainingSession(options)
      : new EggrollSession({
          ...options,
          scoring: scoringOf(prepared.file.metadata, recipe.method),
        });
  const compared = { ...prepared, base };
  const training: Training = { spec, recipe, session, hooks, compared };
  const { steps, memory } = session;
  const kept = recipe.continual === null ? null : directionsIn(prepared.bases);
  hooks.tell({ kind: 'started', steps, memory, kernels: base.kernels.description, kept });
  try {
    await train(training);
  } catch (error) {
    if (error instanceof Stopped && session.step > 0) await saveCheckpoint(training);
    throw error;
  }
}

/** The kernels are the caller's to dispose of. */
export async function openBase(
  { backend, threads, modelHash: hash }: Pick<TrainerSpec, 'backend' | 'threads' | 'modelHash'>,
  file: GgufFile,
): Promise<TrainingBase> {
  const config = readDecoderConfig(file);
  // f32 activations over the file's own weights: the numbers that serving is faithful to. TensorFlow.js has f32 only.
  const kernels = await createKernels(backend, { threads, f32Activations: true });
  const mode = backend === 'tfjs' ? 'exact' : 'faithful';
  const weights = loadWeights(file, config, { kernels, mode, cache: null });
  return { config, weights, kernels, hash };
}

function rateOf({ learningRate }: Recipe, sweeping: number): number {
  return learningRate === 'sweep' ? sweeping : learningRate;
}

function breatheBy(hooks: TrainHooks): Breathe {
  return async () => {
    if ((await hooks.breathe()) === 'stop') throw new Stopped();
  };
}

async function checkModel({ modelPath, modelHash, cacheDirectory }: TrainerSpec): Promise<void> {
  if ((await rememberedSha256(modelPath, cacheDirectory)) === modelHash) return;
  throw new GatewayError(
    'BASE_MISMATCH',
    'the model file is another one than the job was made for',
  );
}

async function readSplit(spec: TrainerSpec, recipe: Recipe, file: GgufFile): Promise<Split> {
  const encode = createExampleEncoder(file.metadata, recipe.windowTokens);
  // Nobody chose the lines of a refresh: what does not fit a window is left out.
  const isLenient = spec.compare !== null;
  const examples = await readExampleFile(spec.trainingPath, encode, {
    name: 'training file',
    isLenient,
  });
  if (spec.heldOutPath === null) return splitExamples(examples, recipe.heldOutShare);
  return {
    training: examples,
    heldOut: await readExampleFile(spec.heldOutPath, encode, {
      name: 'validation file',
      isLenient,
    }),
  };
}

/** Throws INVALID_FILE that names lines which cannot be learnt. */
export async function readExampleFile(
  path: string,
  encode: ExampleEncoder,
  { name, isLenient }: { readonly name: string; readonly isLenient: boolean },
): Promise<readonly Example[]> {
  const { examples, errors, errorCount } = await readExamples(createReadStream(path), encode);
  if (errorCount === 0 || isLenient) return examples;
  const shown = errors.slice(0, 3).map(({ line, message }) => `line ${line}: ${message}`);
  const message = `${name}: ${errorCount} lines cannot be learnt: ${shown.join('; ')}`;
  throw new GatewayError('INVALID_FILE', message, { lines: errors });
}

async function readStarts(
  { startFrom, compare: compared }: TrainerSpec,
  { kind, continual }: Recipe,
): Promise<Pick<Prepared, 'start' | 'bases' | 'bank'>> {
  if (compared !== null && kind === 'queryable') {
    const message = 'a refresh compares low-rank pairs, and a queryable adapter is none';
    throw new GatewayError('UNSUPPORTED', message, { param: 'kind' });
  }
  if (startFrom === null) return { start: null, bank: null, bases: new Map() };
  const start = await readStart(startFrom);
  const { needs } = start.manifest.options;
  const isOver = start.manifest.kind === 'queryable' && needs !== null;
  return {
    start,
    bank: isOver ? await readStart(blobPath(dirname(startFrom), needs)) : null,
    bases: continual === null ? new Map() : await readKept(startFrom, start),
  };
}

async function readStart(path: string): Promise<PackedAdapter> {
  const bytes = new Uint8Array(await readFile(path));
  return openPacked(bytes, generationOf(bytes));
}

interface Training {
  readonly spec: TrainerSpec;
  readonly recipe: Recipe;
  readonly session: TrainingSession | EggrollSession;
  readonly hooks: TrainHooks;
  readonly compared: Pick<SessionOptions, 'base' | 'heldOut' | 'start'> & {
    readonly file: GgufFile;
  };
}

async function train(training: Training): Promise<void> {
  const { spec, recipe, session, hooks } = training;
  const breathe = breatheBy(hooks);
  if (spec.resumeFrom !== null) {
    const checkpoint = readCheckpoint(spec.resumeFrom);
    if (recipe.learningRate === 'sweep') session.restart(checkpoint.learningRate, recipe.stepsMax);
    session.restore(checkpoint);
  } else if (recipe.learningRate === 'sweep') {
    await sweep(training, breathe);
  }
  while (session.step < session.steps) {
    const startMs = hooks.nowMs();
    const { step, loss, learningRate, tokens } = await session.takeStep(breathe);
    const ms = hooks.nowMs() - startMs;
    const { steps } = session;
    hooks.tell({ kind: 'progress', step, steps, loss, learningRate, tokens, ms });
    if (step === steps) break;
    if (step % recipe.checkpointEvery === 0) await saveCheckpoint(training);
    if (recipe.evaluateEvery !== null && step % recipe.evaluateEvery === 0) {
      hooks.tell({
        kind: 'evaluation',
        step,
        losses: await session.evaluate(session.files(), breathe),
      });
    }
  }
  await saveCheckpoint(training);
  const [files, bases] = publishLast(session);
  const baseLoss = await session.baseLoss(breathe);
  const losses = await session.evaluate(files, breathe);
  hooks.tell({ kind: 'evaluation', step: session.step, losses });
  const directory = join(spec.folder, 'adapter');
  await writePublished(directory, files, bases);
  const aurac = baseLoss === null ? null : gainAurac(baseLoss, losses).v1;
  const comparison = await compare(training, files.bytes, breathe);
  hooks.tell({ kind: 'result', directory, losses, baseLoss, aurac, comparison });
}

/** The adapter, and what the next training from it must keep. */
function publishLast(session: Training['session']): readonly [AdapterFiles, Uint8Array | null] {
  if (!(session instanceof TrainingSession)) return [session.files(), null];
  const bases = session.bases();
  return [session.files(bases), bases];
}

/** What was made beside what it was made from. */
async function compare(
  { spec, recipe, compared: { base, heldOut, start, file } }: Training,
  made: Uint8Array,
  breathe: Breathe,
): Promise<Comparison | null> {
  if (spec.compare === null || start === null) return null;
  const { earlier } = spec.compare;
  return compareAdapters(
    {
      before: start,
      after: openPacked(made, generationOf(made)),
      earlier: earlier === null ? null : await readStart(earlier),
    },
    {
      ...{ base, heldOut, breathe, ranks: recipe.ranks },
      guard: guardExamples.map(createExampleEncoder(file.metadata, recipe.windowTokens)),
    },
  );
}

/** Leaves the session at the start of the run, with the rate whose short run ended best. */
async function sweep({ session, recipe }: Training, breathe: Breathe): Promise<void> {
  const firstSteps = firstRoundSteps(session.steps);
  let rate = sweepRates[0]!;
  try {
    const chosen = await chooseRate(sweepRates, firstSteps, (tried, steps) => {
      session.restart(tried, steps);
      return trialLoss(session, breathe);
    });
    rate = chosen.rate;
  } finally {
    session.restart(rate, recipe.stepsMax); // also when stopped: a trial's steps are none of the run's
  }
}

/** On held-out examples at the largest rank; without any, the mean of the last quarter of the steps. */
async function trialLoss(session: Training['session'], breathe: Breathe): Promise<number> {
  const losses: number[] = [];
  try {
    while (session.step < session.steps) losses.push((await session.takeStep(breathe)).loss);
    const [last] = (await session.evaluate(session.files(), breathe)).slice(-1);
    if (last !== undefined) return last.loss;
  } catch (error) {
    // Diverged, or to numbers that no packed file holds.
    const { code, param } = asGatewayError(error);
    if (param === 'learningRate' || code === 'INVALID_ADAPTER') return Infinity;
    throw error;
  }
  const quarter = losses.slice(-Math.ceil(losses.length / 4));
  return quarter.reduce((sum, loss) => sum + loss, 0) / quarter.length;
}

async function saveCheckpoint({ spec, session, hooks }: Training): Promise<void> {
  const path = await writeCheckpoint(spec.folder, session.checkpoint());
  hooks.tell({ kind: 'checkpoint', step: session.step, path });
}
