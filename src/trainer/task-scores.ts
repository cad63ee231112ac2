// What answers to tasks are worth: each row answers, the judge is asked where the reward wants one, and the reward scores. And
// the scores of an adapter that is served, at any of its ranks.

import type { PackedAdapter } from '../adapters/pack.ts';
import { GatewayError } from '../errors.ts';
import type { RewardRecipe } from '../jobs/reward-recipe.ts';
import { ranksPerPage } from '../kernels/kernels.ts';
import { Decoder } from '../model/decoder.ts';
import { projectionShape, projections } from '../model/decoder-config.ts';
import type { GgufMetadata } from '../model/gguf-values.ts';
import { scrapCells } from '../model/step-inputs.ts';
import { type AdapterRows, type Stepper, uniformRows } from '../model/stepper.ts';
import { createJudge, type Judge, verdictOf } from './judge.ts';
import { writeRanks } from './member-pages.ts';
import { servedFactors } from './publish.ts';
import { questionOf, type Reward, rewardOf } from './rewards.ts';
import { answersOf, readAfter } from './rollout.ts';
import type { Breathe, TrainingBase } from './session.ts';
import { type AnswerText, answerText, type Task } from './tasks.ts';

/** How answers are made and scored. */
export interface Scoring {
  readonly text: AnswerText;
  readonly reward: Reward;
  readonly judge: Judge | null;
  /** After which an answer is cut. */
  readonly answerTokens: number;
}

/** Throws UNSUPPORTED where the base cannot be the judge. */
export function scoringOf(
  metadata: GgufMetadata,
  { reward, answerTokens }: { readonly reward: RewardRecipe; readonly answerTokens: number },
): Scoring {
  const question = questionOf(reward);
  const judge = question === null ? null : createJudge(metadata, question);
  return { text: answerText(metadata), reward: rewardOf(reward), judge, answerTokens };
}

/** Throws INVALID_REQUEST where the base's context has no room for them. */
export function cellsPerRow(
  tasks: readonly Task[],
  { answerTokens, judge }: Scoring,
  contextLength: number,
): number {
  const longest = tasks.reduce((most, { prompt }) => Math.max(most, prompt.length), 0);
  const question = judge?.suffix.length ?? 0;
  const cells = longest + answerTokens + question;
  if (cells <= contextLength) return cells;
  const more = question === 0 ? '' : ` and a question of ${question}`;
  const asked = `prompts of ${longest} tokens and answers of ${answerTokens}${more}`;
  throw new GatewayError('INVALID_REQUEST', `${asked}, the base has ${contextLength}`, {
    param: 'method.answerTokens',
  });
}

export interface AskedTask {
  readonly task: Task;
  readonly adapter: AdapterRows | null;
}

/** `tokens`: rows that were computed. */
export async function scoresOf(
  { stepper, cellsPerRow }: { readonly stepper: Stepper; readonly cellsPerRow: number },
  asked: readonly AskedTask[],
  { text, reward, judge, answerTokens }: Scoring,
  breathe: Breathe,
): Promise<{ readonly scores: readonly number[]; readonly tokens: number }> {
  const rows = asked.map(({ task, adapter }) => ({ prompt: task.prompt, adapter }));
  const limits = { cellsPerRow, answerTokens, ends: text.ends };
  const { answers, tokens } = await answersOf(stepper, rows, limits, breathe);
  const prompts =
    judge === null
      ? []
      : answers.map((answer, i) =>
          Int32Array.from([...asked[i]!.task.prompt, ...answer, ...judge.suffix]),
        );
  const read = (logits: Float32Array): number => verdictOf(judge!, logits);
  const verdicts = await readAfter(stepper, prompts, { cellsPerRow, breathe }, read);
  const scores = answers.map((answer, i) => {
    const { expected } = asked[i]!.task;
    const judged = { expected, answer: text.textOf(answer), length: answer.length };
    const verdict = verdicts.values[i];
    return reward(verdict === undefined ? judged : { ...judged, verdict });
  });
  return { scores, tokens: tokens + verdicts.tokens };
}

const rowsMax = 16;
const rowsPerStep = 512;

/** Of adapters that are pairs, over the decoder that serves. Its memory goes with the base's kernels, which are the caller's. */
export class TaskScores {
  readonly #tasks: readonly Task[];
  readonly #scoring: Scoring;
  readonly #decoder: Decoder;
  readonly #cellsPerRow: number;
  readonly #ranks: number;

  /** `ranks`: the most that an adapter is asked at. */
  constructor(
    { config, weights, kernels }: TrainingBase,
    tasks: readonly Task[],
    scoring: Scoring,
    ranks: number,
  ) {
    this.#tasks = tasks;
    this.#scoring = scoring;
    this.#ranks = ranks;
    this.#cellsPerRow = cellsPerRow(tasks, scoring, config.contextLength);
    this.#decoder = new Decoder({
      ...{ config, weights, kernels, cellType: 'f16', pageType: 'f16' },
      cells: scrapCells + rowsMax * this.#cellsPerRow,
      pages: 1 + Math.ceil(ranks / ranksPerPage),
      tokensMax: rowsPerStep,
      segmentsMax: rowsMax,
    });
  }

  /** One a task. null: the base alone. */
  async of(
    packed: PackedAdapter | null,
    level: number,
    breathe: Breathe,
  ): Promise<readonly number[]> {
    const adapter = packed === null ? null : this.#write(packed, level);
    const asked = this.#tasks.map((task) => ({ task, adapter }));
    const place = { stepper: this.#decoder, cellsPerRow: this.#cellsPerRow };
    return (await scoresOf(place, asked, this.#scoring, breathe)).scores;
  }

  #write(packed: PackedAdapter, level: number): AdapterRows {
    const { config, pages } = this.#decoder;
    const own = Array.from({ length: pages - 1 }, (_, i) => 1 + i);
    for (let block = 0; block < config.blocks; block++) {
      for (const projection of projections) {
        const site = { block, projection, ...projectionShape(config, projection) };
        const factors = servedFactors(packed, site, { level, ranks: this.#ranks });
        writeRanks(this.#decoder, site, factors, own);
      }
    }
    return uniformRows(own, this.#ranks);
  }
}
