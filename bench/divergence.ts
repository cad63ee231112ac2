// Kullback-Leibler divergence of a side's next-token distributions from a reference's, after every token of a text. The
// reference's logits lie in a file between the sides' processes: 200 KB a token are too many for messages.

import { closeSync, openSync, readSync, writeSync } from 'node:fs';
import { argmax, type RawResult, type ScoreJob, type Side, sampled } from './job.ts';

/** log Σ exp(x), in f64. */
function logSumExp(row: Float32Array): number {
  let max = Number.NEGATIVE_INFINITY;
  for (const x of row) max = Math.max(max, x);
  let sum = 0;
  for (const x of row) sum += Math.exp(x - max);
  return max + Math.log(sum);
}

/** Σ p·(log p − log q) in nats, p and q the softmax of the rows. Never below 0 but for rounding. */
export function divergence(reference: Float32Array, row: Float32Array): number {
  const [logP, logQ] = [logSumExp(reference), logSumExp(row)];
  let sum = 0;
  for (let i = 0; i < row.length; i++) {
    const p = reference[i]! - logP;
    sum += Math.exp(p) * (p - (row[i]! - logQ));
  }
  return sum;
}

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
