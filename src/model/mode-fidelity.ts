// How far a weight mode is from the same file in f32: the mean Kullback-Leibler divergence of next-token distributions over a
// text that the f32 model writes itself, so that no text need be shipped. Measured when asked for (rankgate doctor
// --measure), kept beside the converted weights under all that it depends on.

import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { mkdir } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { z } from 'zod';
import { writeFileDurably } from './file-hash.ts';
import { type OpenDecoderOptions, openDecoder } from './open-decoder.ts';
import { scrapCells } from './step-inputs.ts';
import type { Stepper } from './stepper.ts';

export interface ModeFidelity {
  /** Σ p·(log p − log q) in nats, p from f32 weights and cells, mean over `tokens`. */
  readonly kl: number;
  readonly tokens: number;
  /** What computed it: the kernels, and the way of multiplying that was chosen for every type of weight. */
  readonly description: string;
}

export type FidelityOptions = Pick<
  OpenDecoderOptions,
  'modelPath' | 'modelHash' | 'mode' | 'backend' | 'threads' | 'cacheDirectory'
>;

const memory = { cells: 1024, pages: 1, tokensMax: 16, segmentsMax: 1 } as const;

/** `draw`: uniform in [0, 1), one a token. `start`: the text's first token. */
export async function measureFidelity(
  options: FidelityOptions,
  {
    start,
    tokens,
    draw,
  }: { readonly start: number; readonly tokens: number; readonly draw: () => number },
): Promise<ModeFidelity> {
  const text = [start];
  const rows: Float32Array[] = [];
  {
    const { decoder } = await openDecoder({ ...options, ...memory, mode: 'exact' });
    using exact = decoder;
    for (let i = 0; i < tokens; i++) {
      const logits = logitsAfter(exact, text[i]!, i).slice();
      rows.push(logits);
      text.push(drawToken(logits, draw()));
    }
  }
  const { decoder, description } = await openDecoder({ ...options, ...memory });
  using other = decoder;
  const sum = rows.reduce(
    (total, row, i) => total + divergence(row, logitsAfter(other, text[i]!, i)),
    0,
  );
  return { kl: sum / tokens, tokens, description };
}

function logitsAfter(stepper: Stepper, token: number, position: number): Float32Array {
  const segment = { tokens: Int32Array.of(token), cellBase: scrapCells, position };
  return stepper.step([{ ...segment, adapter: null, wantsLogits: true }]).logits(0);
}

function logSumExp(row: Float32Array): number {
  const max = row.reduce((most, x) => Math.max(most, x), Number.NEGATIVE_INFINITY);
  let sum = 0;
  for (const x of row) sum += Math.exp(x - max);
  return max + Math.log(sum);
}

/** From the distribution at temperature 1. */
function drawToken(logits: Float32Array, draw: number): number {
  const total = logSumExp(logits);
  let sum = 0;
  for (let i = 0; i < logits.length; i++) {
    sum += Math.exp(logits[i]! - total);
    if (draw < sum) return i;
  }
  return logits.length - 1;
}

/** KL(p ‖ q) in nats of the softmaxes of two rows. */
export function divergence(p: Float32Array, q: Float32Array): number {
  const [totalP, totalQ] = [logSumExp(p), logSumExp(q)];
  let sum = 0;
  for (let i = 0; i < p.length; i++) {
    const logP = p[i]! - totalP;
    sum += Math.exp(logP) * (logP - (q[i]! - totalQ));
  }
  return sum;
}

const keptSchema = z.strictObject({
  kl: z.number(),
  tokens: z.int().min(1),
  description: z.string(),
});

function pathOf({ cacheDirectory, modelHash, mode, backend }: FidelityOptions): string | null {
  if (cacheDirectory === null) return null;
  const key = createHash('sha256')
    .update(JSON.stringify([modelHash, mode, backend]))
    .digest('hex');
  return join(cacheDirectory, `${key.slice(0, 32)}.fidelity.json`);
}

/** What was measured last for this file and mode; null: never, or damaged. */
export function keptFidelity(options: FidelityOptions): ModeFidelity | null {
  const path = pathOf(options);
  if (path === null) return null;
  try {
    return keptSchema.parse(JSON.parse(readFileSync(path, 'utf8')));
  } catch {
    return null;
  }
}

/** Rejects when it cannot be kept: whoever asked for it waited long. */
export async function keepFidelity(
  options: FidelityOptions,
  fidelity: ModeFidelity,
): Promise<void> {
  const path = pathOf(options);
  if (path === null) return;
  await mkdir(dirname(path), { recursive: true });
  await writeFileDurably(path, JSON.stringify(fidelity));
}
