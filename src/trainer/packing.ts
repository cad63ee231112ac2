// Examples → windows of rows, and windows → what a decoder computes at once. Examples share a window and see nothing of each
// other: each is a sequence of its own (loss-graph.ts). An order is a function of the seed and the epoch alone, so a
// job that goes on from a checkpoint meets the same windows.

import type { Random } from '../adapters/families/seeded-random.ts';
import type { TrainingBatch } from '../model/loss-graph.ts';
import type { Example } from './examples.ts';

/** Indices of the examples that share it. */
export type Window = readonly number[];

/** Rows of an example: its last token is a target only. */
export function rowsOf({ tokens }: Example): number {
  return tokens.length - 1;
}

/** Windows that are looked at for room, a guess: with more, little is left empty; each costs a comparison per example. */
const openMax = 64;

/** First fit in a shuffled order; null: in the given one. Every example is in exactly one window. */
export function packWindows(
  examples: readonly Example[],
  windowRows: number,
  random: Random | null,
): Window[] {
  const order = Array.from(examples.keys());
  if (random !== null) shuffle(order, random);
  const full: Window[] = [];
  const open: { readonly window: number[]; room: number }[] = [];
  for (const index of order) {
    const rows = rowsOf(examples[index]!);
    let place = open.find(({ room }) => room >= rows);
    if (place === undefined) {
      if (open.length === openMax) full.push(open.shift()!.window);
      place = { window: [], room: windowRows };
      open.push(place);
    }
    place.window.push(index);
    place.room -= rows;
  }
  return [...full, ...open.map(({ window }) => window)];
}

/** Fisher and Yates, in place. */
export function shuffle(items: number[], random: Random): void {
  for (let i = items.length - 1; i > 0; i--) {
    const j = random.below(i + 1);
    [items[i], items[j]] = [items[j]!, items[i]!];
  }
}

export function answersIn(examples: readonly Example[], windows: readonly Window[]): number {
  return windows.flat().reduce((sum, index) => sum + learntIn(examples[index]!), 0);
}

function learntIn({ learnt }: Example): number {
  return learnt.reduce((sum, one) => sum + one, 0);
}

export interface Layout extends Omit<TrainingBatch, 'gate'> {
  /** Rows that hold a token, of all. */
  readonly rows: number;
}

export interface LayoutSizes {
  readonly windows: number; // B; those that are not given stay empty
  readonly windowRows: number; // L
  /** Of each learnt token's loss in the sum. */
  readonly weight: number;
}

export function layOut(
  examples: readonly Example[],
  windows: readonly Window[],
  { windows: count, windowRows, weight }: LayoutSizes,
): Layout {
  const tokens = new Int32Array(count * windowRows);
  // Rows of no example are a sequence too, which nothing is learnt from: attention wants every row to see one.
  const sequences = new Int32Array(count * windowRows);
  const answers: { row: number; target: number; weight: number }[] = [];
  let sequence = 0;
  let rows = 0;
  windows.forEach((window, w) => {
    let row = w * windowRows;
    for (const index of window) {
      const example = examples[index]!;
      const length = rowsOf(example);
      sequence += 1;
      tokens.set(example.tokens.subarray(0, length), row);
      sequences.fill(sequence, row, row + length);
      for (let i = 0; i < length; i++) {
        if (example.learnt[i + 1] === 0) continue;
        answers.push({ row: row + i, target: example.tokens[i + 1]!, weight });
      }
      row += length;
      rows += length;
    }
  });
  return { tokens, sequences, answers, rows };
}
