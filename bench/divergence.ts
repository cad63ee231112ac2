// Kullback-Leibler divergence of a side's next-token distributions from a reference's, after every token of a text. The
// reference's logits lie in a file between the sides' processes: 200 KB a token are too many for messages.

import { closeSync, openSync, readSync, writeSync } from 'node:fs';
import { divergence } from '../src/model/mode-fidelity.ts';
import { argmax, type RawResult, type ScoreJob, type Side, sampled } from './job.ts';

/** Writes the logits of every window, or compares with what was written: samples `kl` and `same` (1 or 0: the likeliest
 *  token is the reference's), one per token of the text. */
export function score(side: Side, { windows, referencePath, role }: ScoreJob): RawResult {
  if (side.windowLogits === undefined) throw new Error(`${side.description}: scores no text`);
  const start = performance.now();
  const [kl, same]: [number[], number[]] = [[], []];
  const file = openSync(referencePath, role === 'write' ? 'wx' : 'r');
  try {
    for (const window of windows) {
      const rows = side.windowLogits(window);
      for (const row of rows) {
        if (role === 'write') {
          writeWhole(file, row);
          continue;
        }
        const reference = new Float32Array(row.length);
        readWhole(file, reference);
        kl.push(divergence(reference, row));
        same.push(argmax(reference) === argmax(row) ? 1 : 0);
      }
    }
  } finally {
    closeSync(file);
  }
  return sampled(performance.now() - start, { kl, same });
}

function writeWhole(file: number, row: Float32Array): void {
  if (writeSync(file, row) !== row.byteLength) throw new Error('the disk is full');
}

function readWhole(file: number, row: Float32Array): void {
  if (readSync(file, row) !== row.byteLength) throw new Error('the reference has too few rows');
}
