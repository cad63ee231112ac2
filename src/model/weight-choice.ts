// Which way of multiplying is fastest on this machine, for every type of weight in a file: measured once, on one thread, and
// kept beside the converted weights under all that it depends on. What a way costs in fidelity is not asked here: a mode
// names the ways that are within its bound (weights.ts).

import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import {
  dtypeLayout,
  type Kernels,
  type LinearWay,
  linearWays,
  type WeightType,
} from '../kernels/kernels.ts';
import { writeFileDurably } from './file-hash.ts';

/** Rows of a decoding step of one and of eight streams, and of a prompt's panel. */
const rowCounts = [1, 8, 32] as const;
const [rowsOut, rowsIn] = [4096, 1024]; // 4 M numbers: beyond the second cache, and a multiple of every block and tile
const runsEach = 3;

export interface WayTime {
  readonly way: LinearWay;
  /** Milliseconds at each of `rowCounts`. */
  readonly ms: readonly number[];
}

export type WayTimes = Readonly<Partial<Record<WeightType, readonly WayTime[]>>>;

/** Geometric mean over the row counts of a way's times to another's: none of them outweighs the others. */
export function timeRatio(a: WayTime, b: WayTime): number {
  const logs = a.ms.map((ms, i) => Math.log(ms / b.ms[i]!));
  return Math.exp(logs.reduce((sum, log) => sum + log, 0) / logs.length);
}

/** The fastest; among equals the first. */
export function fastestWay(times: readonly WayTime[]): LinearWay {
  return times.reduce((best, time) => (timeRatio(time, best) < 1 ? time : best)).way;
}

/** `q4_1 int8 (f32 2.61 ×, library 3.00 ×)`: what was chosen, and how much longer the others took. */
export function explainChoice(times: WayTimes): string {
  const lines = Object.entries(times).map(([type, ways]) => {
    const way = fastestWay(ways);
    const best = ways.find((time) => time.way === way)!;
    const others = ways
      .filter((time) => time !== best)
      .map((time) => `${time.way} ${timeRatio(time, best).toFixed(2)} ×`);
    return others.length === 0 ? `${type} ${way}` : `${type} ${way} (${others.join(', ')})`;
  });
  return lines.join('; ');
}

/** Times every way that the kernels have for the type. The kernels keep what is stored: throwaway ones are wanted. */
export function timeWays(
  kernels: Kernels,
  type: WeightType,
  ways: readonly LinearWay[],
): WayTime[] {
  const { block, bytes } = dtypeLayout[type];
  const zeros = new Uint8Array(((rowsOut * rowsIn) / block) * bytes); // what the numbers are does not matter to the time
  return ways.flatMap((way) => {
    const w = kernels.storeWeight?.(type, [rowsOut, rowsIn], way) ?? null;
    if (w === null) return [];
    kernels.write(w, zeros, 0);
    const ms = rowCounts.map((rows) => {
      using program = kernels.compile(
        (ops) => ({ y: ops.linear(ops.input('x', 'f32', [rows, rowsIn]), w) }),
        { segments: 0 },
      );
      program.write('x', new Float32Array(rows * rowsIn).fill(1));
      program.run([]); // the first one finds nothing in the caches
      const runs = Array.from({ length: runsEach }, () => {
        const start = performance.now();
        program.run([]);
        return performance.now() - start;
      });
      return Math.min(...runs);
    });
    return [{ way, ms }];
  });
}

const keptSchema = z.record(
  z.string(),
  z
    .array(
      z.strictObject({
        way: z.enum(linearWays),
        ms: z.array(z.number().positive()).length(rowCounts.length),
      }),
    )
    .min(1),
);

/** What was measured before, or what `measure` finds now. `dependsOn`: whatever another result could come from. */
export async function keptTimes(
  directory: string | null,
  dependsOn: readonly string[],
  measure: () => Promise<WayTimes>,
): Promise<WayTimes> {
  if (directory === null) return measure();
  const hash = createHash('sha256').update(JSON.stringify(dependsOn)).digest('hex').slice(0, 32);
  const path = join(directory, `${hash}.ways.json`);
  try {
    return keptSchema.parse(JSON.parse(readFileSync(path, 'utf8'))) as WayTimes;
  } catch {
    // Not there yet, or damaged: measured again.
  }
  const times = await measure();
  try {
    await mkdir(directory, { recursive: true });
    await writeFileDurably(path, JSON.stringify(times));
  } catch {
    // A full disk costs the next start the measurement.
  }
  return times;
}
