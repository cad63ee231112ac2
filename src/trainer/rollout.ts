// Greedy answers to many prompts at once, each with its own adapter: rows of mixed batches over the stepper that serving uses.
// Prompts are computed as there is room, while rows before them answer already.

import { scrapCells } from '../model/step-inputs.ts';
import type { AdapterRows, Segment, Stepper } from '../model/stepper.ts';

export interface Asked {
  readonly prompt: Int32Array;
  readonly adapter: AdapterRows | null;
}

export interface RolloutLimits {
  /** Cells of a row: its prompt, and `answerTokens`. */
  readonly cellsPerRow: number;
  readonly answerTokens: number;
  /** Tokens that end an answer, and are none of it. */
  readonly ends: ReadonlySet<number>;
}

export interface Answers {
  readonly answers: readonly (readonly number[])[];
  /** Rows that were computed. */
  readonly tokens: number;
}

interface Running extends Asked {
  readonly cellBase: number;
  readonly tokens: number[];
  computed: number;
  isDone: boolean;
}

/** As many at a time as the stepper has segments. `breathe` is asked before each step. */
export async function answersOf(
  stepper: Stepper,
  asked: readonly Asked[],
  limits: RolloutLimits,
  breathe: () => Promise<void>,
): Promise<Answers> {
  const answers: (readonly number[])[] = [];
  let tokens = 0;
  for (let from = 0; from < asked.length; from += stepper.segmentsMax) {
    const running = asked.slice(from, from + stepper.segmentsMax).map(
      (row, i): Running => ({
        ...row,
        cellBase: scrapCells + i * limits.cellsPerRow,
        tokens: [...row.prompt],
        computed: 0,
        isDone: false,
      }),
    );
    for (let batch = nextBatch(running, stepper); batch.length > 0; ) {
      await breathe();
      const result = stepper.step(batch.map(({ segment }) => segment));
      batch.forEach(({ row, segment }, i) => {
        row.computed += segment.tokens.length;
        tokens += segment.tokens.length;
        if (segment.wantsLogits) goOn(row, result.argmax(i), limits);
      });
      batch = nextBatch(running, stepper);
    }
    answers.push(...running.map((row) => row.tokens.slice(row.prompt.length)));
  }
  return { answers, tokens };
}

function nextBatch(
  running: readonly Running[],
  { tokensMax }: Stepper,
): { readonly row: Running; readonly segment: Segment }[] {
  let room = tokensMax;
  const batch = [];
  for (const row of running) {
    const { tokens, computed: position, cellBase, adapter } = row;
    const count = row.isDone ? 0 : Math.min(room, tokens.length - position);
    if (count === 0) continue;
    room -= count;
    const some = Int32Array.from(tokens.slice(position, position + count));
    const wantsLogits = position + count === tokens.length;
    batch.push({ row, segment: { tokens: some, cellBase, position, adapter, wantsLogits } });
  }
  return batch;
}

/** The last token of an answer that is as long as it may be is never computed. */
function goOn(row: Running, next: number, { answerTokens, ends }: RolloutLimits): void {
  const isEnd = ends.has(next);
  if (!isEnd) row.tokens.push(next);
  row.isDone = isEnd || row.tokens.length - row.prompt.length === answerTokens;
}
