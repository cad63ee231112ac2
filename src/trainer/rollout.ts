// Greedy answers to many prompts at once, each with its own adapter: rows of mixed batches over the stepper that serving uses.
// Prompts are computed as there is room, while rows before them answer already.

import { scrapCells } from '../model/step-inputs.ts';
import type { AdapterRows, Segment, Stepper, StepResult } from '../model/stepper.ts';

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

interface Rounds {
  readonly cellsPerRow: number;
  readonly breathe: () => Promise<void>;
  /** What becomes of a row whose tokens are computed: its last one's logits are segment `i`'s. */
  readonly goOn: (row: Running, result: StepResult, i: number) => void;
}

/** As many at a time as the stepper has segments. `breathe` is asked before each step. */
export async function answersOf(
  stepper: Stepper,
  asked: readonly Asked[],
  limits: RolloutLimits,
  breathe: () => Promise<void>,
): Promise<Answers> {
  const { cellsPerRow } = limits;
  const goOn: Rounds['goOn'] = (row, result, i) => takeToken(row, result.argmax(i), limits);
  const { rows, tokens } = await runRows(stepper, asked, { cellsPerRow, breathe, goOn });
  return { answers: rows.map((row) => row.tokens.slice(row.prompt.length)), tokens };
}

/** What `read` makes of the logits after each prompt, by the base alone. */
export async function readAfter(
  stepper: Stepper,
  prompts: readonly Int32Array[],
  { cellsPerRow, breathe }: Omit<Rounds, 'goOn'>,
  read: (logits: Float32Array) => number,
): Promise<{ readonly values: readonly number[]; readonly tokens: number }> {
  const values = new Map<Running, number>();
  const goOn: Rounds['goOn'] = (row, result, i) => {
    values.set(row, read(result.logits(i)));
    row.isDone = true;
  };
  const asked = prompts.map((prompt) => ({ prompt, adapter: null }));
  const { rows, tokens } = await runRows(stepper, asked, { cellsPerRow, breathe, goOn });
  return { values: rows.map((row) => values.get(row)!), tokens };
}

async function runRows(
  stepper: Stepper,
  asked: readonly Asked[],
  { cellsPerRow, breathe, goOn }: Rounds,
): Promise<{ readonly rows: readonly Running[]; readonly tokens: number }> {
  const rows: Running[] = [];
  let tokens = 0;
  for (let from = 0; from < asked.length; from += stepper.segmentsMax) {
    const running = asked.slice(from, from + stepper.segmentsMax).map(
      (row, i): Running => ({
        ...row,
        cellBase: scrapCells + i * cellsPerRow,
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
        if (segment.wantsLogits) goOn(row, result, i);
      });
      batch = nextBatch(running, stepper);
    }
    rows.push(...running);
  }
  return { rows, tokens };
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
function takeToken(row: Running, next: number, { answerTokens, ends }: RolloutLimits): void {
  const isEnd = ends.has(next);
  if (!isEnd) row.tokens.push(next);
  row.isDone = isEnd || row.tokens.length - row.prompt.length === answerTokens;
}
