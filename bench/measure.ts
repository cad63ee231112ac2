// Rounds, statistics and the description of where they were taken. One side works at a time; within a round every side does
// the same job, and the side that begins rotates, so that slow drift of the machine falls on all alike.

import { execFileSync } from 'node:child_process';
import { cpus, loadavg, totalmem } from 'node:os';
import type { Job, JobResult } from './job.ts';
import type { SideProcess } from './side-process.ts';

export interface Series {
  readonly unit: string;
  readonly median: number;
  readonly min: number;
  readonly max: number;
  /** (max − min) / median. */
  readonly spread: number;
  readonly values: readonly number[];
}

/** One entrant of a comparison: a side with the job as that side gets it. */
export interface Entrant {
  readonly name: string;
  readonly side: SideProcess;
  readonly job: Job;
}

export function median(values: readonly number[]): number {
  if (values.length === 0) throw new RangeError('no values');
  const sorted = [...values].sort((a, b) => a - b);
  const middle = Math.floor(sorted.length / 2);
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

/** The smallest value that at least `share` of all values do not exceed. */
export function quantile(values: readonly number[], share: number): number {
  if (values.length === 0) throw new RangeError('no values');
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.max(0, Math.ceil(share * sorted.length) - 1)]!;
}

export function seriesOf(unit: string, values: readonly number[]): Series {
  const [middle, min, max] = [median(values), Math.min(...values), Math.max(...values)];
  return {
    unit,
    median: round(middle),
    min: round(min),
    max: round(max),
    spread: round((max - min) / middle),
    values: values.map(round),
  };
}

/** Four significant digits: what a stopwatch on a shared machine can bear. */
export function round(value: number): number {
  return Number(value.toPrecision(4));
}

/** Every entrant once per round, after one run that is thrown away (programs recorded, pages touched). */
export async function runRounds(
  entrants: readonly Entrant[],
  rounds: number,
): Promise<Map<string, JobResult[]>> {
  const results = new Map<string, JobResult[]>(entrants.map(({ name }) => [name, []]));
  for (let index = -1; index < rounds; index++) {
    for (let i = 0; i < entrants.length; i++) {
      const entrant = entrants[(i + Math.max(0, index)) % entrants.length]!;
      const result = await entrant.side.run(entrant.job);
      checkComplete(entrant, result);
      if (index >= 0) results.get(entrant.name)!.push(result);
    }
  }
  return results;
}

/** A side that stopped early would look fast. */
function checkComplete({ name, job }: Entrant, result: JobResult): void {
  if (job.kind !== 'prefill' && job.kind !== 'generate') return;
  const wanted = job.kind === 'prefill' ? 1 : job.newTokens;
  const short = result.ids.findIndex((ids) => ids.length !== wanted);
  if (short >= 0) {
    const got = result.ids[short]!.length;
    throw new Error(`${name}: stream ${short} made ${got} tokens, want ${wanted}`);
  }
}

/** Share of tokens, counted from each stream's start, before the two sides part. 1 = the same answers. */
export function agreement(a: JobResult, b: JobResult): number {
  let equal = 0;
  let total = 0;
  a.ids.forEach((ids, stream) => {
    const other = b.ids[stream]!;
    const parting = ids.findIndex((id, i) => id !== other[i]);
    equal += parting < 0 ? ids.length : parting;
    total += ids.length;
  });
  return round(equal / total);
}

/** RMS distance between two sides' first logits, as a share of that between `a` and a run that should differ: ≪ 1 when
 *  both sides applied the same adapters. */
export function probeDistance(a: JobResult, b: JobResult, different: JobResult): number {
  return round(distance(a.probes, b.probes) / distance(a.probes, different.probes));
}

function distance(a: JobResult['probes'], b: JobResult['probes']): number {
  const [x, y] = [a.flat(), b.flat()];
  const sum = x.reduce((total, value, i) => total + (value - y[i]!) ** 2, 0);
  return Math.sqrt(sum / x.length);
}

/** Most CPU time, as a share of one core, that a side used while another one worked. */
export function idleShareMax(results: ReadonlyMap<string, readonly JobResult[]>): number {
  const all = [...results.values()];
  const rounds = all[0]!.length;
  const shares: number[] = [];
  for (let i = 1; i < rounds; i++) {
    const busyMs = all.reduce((sum, series) => sum + series[i]!.totalMs, 0);
    for (const series of all) shares.push(series[i]!.idleCpuMs / busyMs);
  }
  return round(Math.max(0, ...shares));
}

export interface Place {
  readonly commit: string;
  /** Files that differ from the commit: a figure for the books has none under src/ and bench/. */
  readonly uncommitted: readonly string[];
  readonly cpu: string;
  readonly cores: number;
  readonly memoryGb: number;
  readonly node: string;
  readonly loadAverageAtStart: number;
}

export function describePlace(): Place {
  const git = (...args: string[]): string => execFileSync('git', args, { encoding: 'utf8' }).trim();
  const changed = git('status', '--porcelain', '--', 'src', 'bench', 'test/oracle').split('\n');
  return {
    commit: git('rev-parse', 'HEAD'),
    uncommitted: changed.filter((line) => line !== '').map((line) => line.trim()),
    cpu: cpus()[0]?.model ?? 'unknown',
    cores: cpus().length,
    memoryGb: Math.round(totalmem() / 2 ** 30),
    node: process.version,
    loadAverageAtStart: round(loadavg()[0]!),
  };
}

export interface Report {
  readonly bench: string;
  /** The keys of the table, and others worth a number. */
  readonly figures: Readonly<Record<string, number>>;
  readonly series: Readonly<Record<string, Series>>;
  readonly sides: Readonly<Record<string, string>>;
  readonly notes: readonly string[];
}
