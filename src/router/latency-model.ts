// Predicts when a request would get its first and its last token at so many ranks, from the learned step time
// (step-time.ts), the learned answer lengths (answer-length.ts) and the load of the moment. By how much answers come out
// otherwise is learned from them (error-spread.ts). Memory is bounded; the state is saved as JSON and belongs to one base
// model on one machine.

import { isDeepStrictEqual } from 'node:util';
import { z } from 'zod';
import type { StepCosts, StepReport } from '../engine/messages.ts';
import { AnswerLengths, savedCurves } from './answer-length.ts';
import { ErrorSpread, savedSpread } from './error-spread.ts';
import type { Prediction, RouteInput } from './policy.ts';
import { parseSaved } from './saved-state.ts';
import { type StepEstimate, StepTime, type StepWork, savedStepTime } from './step-time.ts';

const adaptersMax = 4096; // ~1.5 MB of answer-length curves
/** Steps before a prediction is worth more than none. */
const stepsMin = 8;
const decodeGain = 0.05;
const biasGain = 0.05;
const biasMax = 4; // guess: beyond, steps alone say nothing
/** Answers beside each other have their luck in common: of more than so many each counts for less (guess). */
const besideMax = 8;
const besideGain = 0.001; // of a step (guess)
const chunkGain = 0.01; // of a step with prompts in it (guess)
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
  /** When it was planned. */
  readonly load: RouteInput['load'];
  /** Since the engine heard of it. */
  readonly ttftMs: number;
  readonly totalMs: number;
}

const savedModel = z.strictObject({
  format: z.literal('rankgate-latency/2'),
  identity: z.strictObject({ baseHash: z.string(), backend: z.string(), threads: z.number() }),
  stepTime: savedStepTime,
  lengths: savedCurves,
  ttftSpread: savedSpread,
  totalSpread: savedSpread,
  ttftBias: z.number().positive(),
  tokenBias: z.number().positive(),
});

export class LatencyModel {
  readonly #options: LatencyModelOptions;
  readonly #stepTime: StepTime = new StepTime();
  readonly #lengths: AnswerLengths = new AnswerLengths(adaptersMax);
  readonly #ttftSpread: ErrorSpread = new ErrorSpread();
  /** At the length that the answer had. */
  readonly #totalSpread: ErrorSpread = new ErrorSpread();
  // What first tokens and paces were, as multiples of what steps alone predict: prompts that come later, guesses that come
  // true and changed ranks are in no step that is known beforehand.
  #ttftBias = 1;
  #tokenBias = 1;
  // Of the moment, not saved: how long answers take after their first token, how many decode in a step, and how many tokens
  // of prompts a step has that has any.
  #decodeMs = 0;
  #beside = 0;
  #chunk: number;

  constructor(options: LatencyModelOptions) {
    this.#options = options;
    this.#chunk = options.prefillTokensMax;
  }

  observe(report: StepReport): void {
    const { decodeRows, prefillTokens } = report;
    this.#stepTime.observe(report);
    this.#beside += besideGain * (decodeRows - this.#beside);
    if (prefillTokens > 0) this.#chunk += chunkGain * (prefillTokens - this.#chunk);
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

  /** Told of complete answers only. */
  settle(answer: FinishedAnswer): void {
    const { completionTokens, tokensMax, prediction: predicted } = answer;
    const decodeMs = answer.totalMs - answer.ttftMs;
    if (!(completionTokens >= 1) || !(decodeMs >= 0) || !(answer.ttftMs >= 0)) return;
    this.#lengths.learn(answer.adapter ?? '', completionTokens, completionTokens >= tokensMax);
    this.#decodeMs += decodeGain * (decodeMs - this.#decodeMs);
    if (predicted === null) return;
    const weight = Math.min(1, besideMax / Math.max(1, this.#beside));
    const ttftMs = this.#lagMs(answer.load) + answer.ttftMs;
    const later = completionTokens - 1;
    const totalMs = predicted.ttftMs + later * predicted.perTokenMs;
    this.#ttftSpread.learn(predicted.ttftMs, ttftMs, weight);
    this.#totalSpread.learn(totalMs, ttftMs + decodeMs, weight);
    this.#ttftBias = corrected(this.#ttftBias, ttftMs / predicted.ttftMs, weight);
    if (later === 0) return;
    this.#tokenBias = corrected(this.#tokenBias, decodeMs / later / predicted.perTokenMs, weight);
  }

  predict(input: RouteInput, ranks: number): Prediction | null {
    if (this.#stepTime.steps < stepsMin) return null;
    const first = this.#firstToken(input, ranks);
    const ttftMs = (this.#lagMs(input.load) + first.ms) * this.#ttftBias;
    const ttftDoubtMs = first.doubtMs * this.#ttftBias;
    const length = this.#lengths.expect(input.adapter?.name ?? '', input.tokensMax);
    const pace = scaled(this.#pace(input, ranks, length.mean), this.#tokenBias);
    const later = Math.max(0, length.mean - 1);
    const totalMs = ttftMs + later * pace.ms;
    const tokens = Math.max(1, later);
    return {
      ttftMs,
      perTokenMs: pace.ms,
      totalMs,
      sigmaMs: Math.hypot(
        Math.sqrt(this.#totalSpread.variance(totalMs)),
        ttftDoubtMs,
        // The pace's doubt is the same for all tokens of an answer, so it adds up with them and not with their root.
        later * pace.doubtMs,
        length.deviation * pace.ms,
      ),
      ttftSigmaMs: Math.hypot(Math.sqrt(this.#ttftSpread.variance(ttftMs)), ttftDoubtMs),
      perTokenSigmaMs: Math.hypot(
        Math.sqrt(this.#totalSpread.variance(tokens * pace.ms)) / tokens,
        pace.doubtMs,
      ),
    };
  }

  /** How long until what waits has been prefilled, and has had a place among the rows, which come free as answers end. */
  drainMs(load: RouteInput['load']): number {
    const first = this.#firstToken({ load, promptTokens: 0 }, 0);
    return Math.max(first.ms, (load.waiting / Math.max(1, load.decodeRows)) * this.#decodeMs);
  }

  /** Until the step under way has ended, of which half is left on average. Only then does the engine hear of a request, and
   *  its times begin. */
  #lagMs(load: RouteInput['load']): number {
    const { decodeRows, decodeRanks, kvCells } = load;
    if (decodeRows + load.waiting === 0) return 0;
    const tokens = this.#underWay(load);
    const work: StepWork = [1, decodeRows, tokens, decodeRanks, tokens * rankMean(load), kvCells];
    return this.#stepTime.estimate(work).ms / 2;
  }

  /** Tokens of prompts in that step. */
  #underWay({ waitingPromptTokens }: RouteInput['load']): number {
    return Math.min(waitingPromptTokens, this.#chunk);
  }

  /** What waits behind the step under way is prefilled first, in steps of at most prefillTokensMax that also decode the running
   *  rows; where that would be more rows than a step has, as many answers must end before. */
  #firstToken(input: Pick<RouteInput, 'load' | 'promptTokens'>, ranks: number): StepEstimate {
    const { load, promptTokens } = input;
    const { decodeRows, kvCells, waiting } = load;
    const { prefillTokensMax, rowsMax } = this.#options;
    const before = load.waitingPromptTokens - this.#underWay(load);
    const tokens = promptTokens + before;
    const prompts = Math.max(1, waiting);
    const steps = Math.max(1, Math.ceil(tokens / prefillTokensMax));
    const work: StepWork = [
      steps,
      steps * decodeRows,
      tokens,
      steps * load.decodeRanks,
      // The ranks of those that wait are not known: they are taken to be like those that run.
      promptTokens * ranks + before * rankMean(load),
      steps * kvCells + triangle(promptTokens) + prompts * triangle(before / prompts),
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
      format: 'rankgate-latency/2',
      identity: this.#options.identity,
      stepTime: this.#stepTime.save(),
      lengths: this.#lengths.save(),
      ttftSpread: this.#ttftSpread.save(),
      totalSpread: this.#totalSpread.save(),
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
    this.#ttftSpread.restore(data.ttftSpread);
    this.#totalSpread.restore(data.totalSpread);
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
function corrected(bias: number, ratio: number, weight: number): number {
  return within(bias * within(ratio) ** (weight * biasGain));
}

function within(factor: number): number {
  return Math.min(biasMax, Math.max(1 / biasMax, factor));
}

function scaled({ ms, doubtMs }: StepEstimate, factor: number): StepEstimate {
  return { ms: ms * factor, doubtMs: doubtMs * factor };
}
