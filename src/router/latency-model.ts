// Predicts when a request would get its first and its last token at so many ranks, from the learned step time
// (step-time.ts), the learned answer lengths (answer-length.ts) and the load of the moment. Its own mean error is learned
// from finished answers. Memory is bounded; the state is saved as JSON and belongs to one base model on one machine.

import { isDeepStrictEqual } from 'node:util';
import { z } from 'zod';
import type { StepCosts, StepReport } from '../engine/messages.ts';
import { AnswerLengths, savedCurves } from './answer-length.ts';
import type { Prediction, RouteInput } from './policy.ts';
import { parseSaved } from './saved-state.ts';
import { type StepEstimate, StepTime, type StepWork, savedStepTime } from './step-time.ts';

const adaptersMax = 4096; // ~1.5 MB of answer-length curves
/** Steps before a prediction is worth more than none. */
const stepsMin = 8;
const errorGain = 0.05;
const errorStart = 0.25; // relative deviation of a whole answer's time before any was seen (guess)
const errorClip = 1;
const biasGain = 0.05;
const biasMax = 4; // guess: beyond, steps alone say nothing
/** Relative deviation of the wait for a row (guess). */
const waitDoubt = 0.5;

export interface ModelIdentity {
  readonly baseHash: string;
  /** BaseInfo.backend: library, CPU variant, weights mode. */
  readonly backend: string;
  readonly threads: number;
}

export interface LatencyModelOptions {
  readonly identity: ModelIdentity;
  /** Most sequences in one step. */
  readonly rowsMax: number;
  /** Most prompt tokens that the engine processes in one step. */
  readonly prefillTokensMax: number;
}

export interface FinishedAnswer {
  /** null for the base model. */
  readonly adapter: string | null;
  /** The plan's, null when it had none. */
  readonly prediction: Prediction | null;
  readonly tokensMax: number;
  readonly completionTokens: number;
  readonly ttftMs: number;
  readonly totalMs: number;
}

const savedModel = z.strictObject({
  format: z.literal('rankgate-latency/1'),
  identity: z.strictObject({ baseHash: z.string(), backend: z.string(), threads: z.number() }),
  stepTime: savedStepTime,
  lengths: savedCurves,
  ttftError: z.number().nonnegative(),
  tokenError: z.number().nonnegative(),
  ttftBias: z.number().positive(),
  tokenBias: z.number().positive(),
});

export class LatencyModel {
  readonly #options: LatencyModelOptions;
  readonly #stepTime: StepTime = new StepTime();
  readonly #lengths: AnswerLengths = new AnswerLengths(adaptersMax);
  // Mean squared relative errors of finished answers: of the wait for the first token, and of the pace after it.
  #ttftError: number = errorStart ** 2;
  #tokenError: number = errorStart ** 2;
  // What first tokens and paces were, as multiples of what steps alone predict: prompts that come later, guesses that come
  // true and changed ranks are in no step that is known beforehand.
  #ttftBias = 1;
  #tokenBias = 1;
  /** How long answers take after their first token, of the moment: not saved. */
  #decodeMs = 0;

  constructor(options: LatencyModelOptions) {
    this.#options = options;
  }

  observe(report: StepReport): void {
    this.#stepTime.observe(report);
  }

  /** Tokens that an answer will hardly exceed. */
  tokensLikely({ adapter, tokensMax }: Pick<RouteInput, 'adapter' | 'tokensMax'>): number {
    const { mean, deviation } = this.#lengths.expect(adapter?.name ?? '', tokensMax);
    return Math.ceil(mean + 2 * deviation);
  }

  /** What a step takes, for the engine; null while nothing was learned. */
  get costs(): StepCosts | null {
    return this.#stepTime.steps < stepsMin ? null : this.#stepTime.costs;
  }

  /** Told of complete answers only; the times are from the plan, as its prediction was. */
  settle(answer: FinishedAnswer): void {
    const { completionTokens, tokensMax, ttftMs, totalMs, prediction: predicted } = answer;
    if (!(completionTokens >= 1) || !(totalMs >= ttftMs) || !(ttftMs >= 0)) return;
    this.#lengths.learn(answer.adapter ?? '', completionTokens, completionTokens >= tokensMax);
    this.#decodeMs += errorGain * (totalMs - ttftMs - this.#decodeMs);
    if (predicted === null) return;
    this.#ttftError = blend(this.#ttftError, ttftMs, predicted.ttftMs);
    this.#ttftBias = corrected(this.#ttftBias, ttftMs, predicted.ttftMs);
    if (completionTokens < 2) return;
    const pace = (totalMs - ttftMs) / (completionTokens - 1);
    this.#tokenError = blend(this.#tokenError, pace, predicted.perTokenMs);
    this.#tokenBias = corrected(this.#tokenBias, pace, predicted.perTokenMs);
  }

  predict(input: RouteInput, ranks: number): Prediction | null {
    if (this.#stepTime.steps < stepsMin) return null;
    const first = scaled(this.#firstToken(input, ranks), this.#ttftBias);
    const length = this.#lengths.expect(input.adapter?.name ?? '', input.tokensMax);
    const pace = scaled(this.#pace(input, ranks, length.mean), this.#tokenBias);
    const later = Math.max(0, length.mean - 1);
    const sigmas = [
      first.ms * Math.sqrt(this.#ttftError),
      first.doubtMs,
      // The pace's error is the same for all tokens of an answer, so it adds up with them and not with their root.
      later * pace.ms * Math.sqrt(this.#tokenError),
      later * pace.doubtMs,
      Math.sqrt(later) * pace.ms * this.#stepTime.relativeSigma,
      length.deviation * pace.ms,
    ];
    return {
      ttftMs: first.ms,
      perTokenMs: pace.ms,
      totalMs: first.ms + later * pace.ms,
      sigmaMs: Math.hypot(...sigmas),
      ttftSigmaMs: Math.hypot(first.ms * Math.sqrt(this.#ttftError), first.doubtMs),
      perTokenSigmaMs: Math.hypot(pace.ms * Math.sqrt(this.#tokenError), pace.doubtMs),
    };
  }

  /** How long until what waits has been prefilled, and has had a place among the rows, which come free as answers end. */
  drainMs(load: RouteInput['load']): number {
    const first = this.#firstToken({ load, promptTokens: 0 }, 0);
    return Math.max(first.ms, (load.waiting / Math.max(1, load.decodeRows)) * this.#decodeMs);
  }

  /** Everything that waits is prefilled first, in steps of at most prefillTokensMax that also decode the running rows; where
   *  that would be more rows than a step has, as many answers must end before. */
  #firstToken(input: Pick<RouteInput, 'load' | 'promptTokens'>, ranks: number): StepEstimate {
    const { load, promptTokens } = input;
    const { decodeRows, kvCells, waiting, waitingPromptTokens } = load;
    const { prefillTokensMax, rowsMax } = this.#options;
    const tokens = promptTokens + waitingPromptTokens;
    const prompts = Math.max(1, waiting);
    const steps = Math.max(1, Math.ceil(tokens / prefillTokensMax));
    const work: StepWork = [
      steps,
      steps * decodeRows,
      tokens,
      steps * load.decodeRanks,
      // The ranks of those that wait are not known: they are taken to be like those that run.
      promptTokens * ranks + waitingPromptTokens * rankMean(load),
      steps * kvCells + triangle(promptTokens) + prompts * triangle(waitingPromptTokens / prompts),
    ];
    const { ms, doubtMs } = this.#stepTime.estimate(work);
    const waitMs = (Math.max(0, decodeRows + waiting + 1 - rowsMax) / rowsMax) * this.#decodeMs;
    return { ms: ms + waitMs, doubtMs: Math.hypot(doubtMs, waitMs * waitDoubt) };
  }

  /** A decode step once this row and those that wait before it have joined, as far as there are rows. */
  #pace({ load, promptTokens }: RouteInput, ranks: number, tokens: number): StepEstimate {
    const { decodeRows, waiting, waitingPromptTokens } = load;
    const rows = Math.min(this.#options.rowsMax, decodeRows + waiting + 1);
    const joining = Math.max(0, rows - 1 - decodeRows) / Math.max(1, waiting);
    return this.#stepTime.estimate([
      1,
      rows,
      0,
      (rows - 1) * rankMean(load) + ranks,
      0,
      load.kvCells + joining * waitingPromptTokens + promptTokens + tokens / 2,
    ]);
  }

  save(): string {
    const state: z.infer<typeof savedModel> = {
      format: 'rankgate-latency/1',
      identity: this.#options.identity,
      stepTime: this.#stepTime.save(),
      lengths: this.#lengths.save(),
      ttftError: this.#ttftError,
      tokenError: this.#tokenError,
      ttftBias: this.#ttftBias,
      tokenBias: this.#tokenBias,
    };
    return JSON.stringify(state);
  }

  /** False, and nothing changed, when the text is damaged or belongs to another base, backend or thread count. */
  restore(text: string): boolean {
    const data = parseSaved(text, savedModel);
    if (data === null || !isDeepStrictEqual(data.identity, this.#options.identity)) return false;
    this.#stepTime.restore(data.stepTime);
    this.#lengths.restore(data.lengths);
    this.#ttftError = data.ttftError;
    this.#tokenError = data.tokenError;
    this.#ttftBias = data.ttftBias;
    this.#tokenBias = data.tokenBias;
    return true;
  }
}

function rankMean({ decodeRows, decodeRanks }: RouteInput['load']): number {
  return decodeRows === 0 ? 0 : decodeRanks / decodeRows;
}

/** Cells that a prompt's tokens attend to: token i sees i of them. */
function triangle(tokens: number): number {
  return (tokens * (tokens + 1)) / 2;
}

/** A step towards the multiple at which predictions are neither too short nor too long, on a scale of factors. */
function corrected(bias: number, actual: number, predicted: number): number {
  const ratio = Math.min(
    biasMax,
    Math.max(1 / biasMax, actual / Math.max(predicted, Number.EPSILON)),
  );
  return Math.min(biasMax, Math.max(1 / biasMax, bias * ratio ** biasGain));
}

function scaled({ ms, doubtMs }: StepEstimate, factor: number): StepEstimate {
  return { ms: ms * factor, doubtMs: doubtMs * factor };
}

/** A failed machine or a paused client makes one error huge; clipped, it counts as "off by as much as it said". */
function blend(mean: number, actual: number, predicted: number): number {
  const error = Math.abs(actual - predicted) / Math.max(predicted, Number.EPSILON);
  return mean + errorGain * (Math.min(errorClip, error) ** 2 - mean);
}
