// The fixture of test/oracle/trainer-numbers.py, and its noisy quadratic as an optimiser sees it.

import { readFileSync } from 'node:fs';
import type { Optimizer, Parameter } from '../../src/trainer/optimizers/optimizer.ts';

export interface TrainerNumbers {
  readonly problem: Readonly<Record<'start' | 'target' | 'noise' | 'curvature', string>>;
  readonly adamw: string;
  readonly sgd: string;
  readonly sgdPlain: string;
  readonly adabelief_runs: ReadonlyArray<{
    readonly rectify: boolean;
    readonly decay: 'decoupled' | 'gradient';
    readonly values: string;
  }>;
  readonly loraPro: {
    readonly scale: number;
    readonly learningRate: number;
    readonly weightDecay: number;
    readonly steps: number;
    readonly a: string;
    readonly b: string;
    readonly goal: string;
    readonly once: { readonly a: string; readonly b: string };
    readonly finalA: string;
    readonly finalB: string;
  };
  readonly growth: ReadonlyArray<{
    readonly samples: number;
    readonly gradients: string;
    readonly variance: number;
    readonly mean: number;
    readonly wanted: Readonly<Record<string, number>>;
  }>;
  readonly spectra: ReadonlyArray<{
    readonly sigma: string;
    readonly ranks: Readonly<Record<string, number>>;
  }>;
  readonly nuclear: Readonly<Record<'a' | 'b' | 'gradientA' | 'gradientB', string>> & {
    readonly scale: number;
  };
  readonly cosines: ReadonlyArray<{ readonly n: number; readonly x: string; readonly dct: string }>;
}

export const trainerNumbers: TrainerNumbers = JSON.parse(
  readFileSync(new URL('../golden/trainer/numbers.json', import.meta.url), 'utf8'),
);

export function doubles(text: string): Float64Array {
  return new Float64Array(Uint8Array.from(Buffer.from(text, 'base64')).buffer);
}
export function singles(text: string): Float32Array {
  return new Float32Array(Uint8Array.from(Buffer.from(text, 'base64')).buffer);
}

export interface Quadratic {
  readonly parameters: Parameter[];
  /** Steps `from` … `to`-1 of the run. */
  run(optimizer: Optimizer, from: number, to: number, learningRate?: number): void;
  /** All values, one parameter after another. */
  values(): Float32Array;
}

/** The fixture's 50 numbers as parameters a [2, 10] and b [2, 15]. */
export function quadratic(): Quadratic {
  const { start, target, noise, curvature } = trainerNumbers.problem;
  const [goal, rates, noises] = [singles(target), singles(curvature), singles(noise)];
  const all = singles(start);
  const parameters = (
    [
      ['x.a', 2, 10],
      ['x.b', 2, 15],
    ] as const
  ).map(([name, rows, columns]) => {
    const at = name === 'x.a' ? 0 : 20;
    const values = all.subarray(at, at + rows * columns);
    return { name, rows, columns, values, gradient: new Float32Array(values.length) };
  });
  return {
    parameters,
    run(optimizer, from, to, learningRate = 1e-2) {
      for (let t = from; t < to; t++) {
        parameters.forEach(({ values, gradient }, p) => {
          for (let i = 0; i < values.length; i++) {
            const at = (p === 0 ? 0 : 20) + i;
            gradient[i] = rates[at]! * (values[i]! - goal[at]!) + noises[t * all.length + at]!;
          }
        });
        optimizer.step(parameters, learningRate);
      }
    },
    values: () => all.slice(),
  };
}

export function largestDifference(x: ArrayLike<number>, y: ArrayLike<number>): number {
  let largest = x.length === y.length ? 0 : Number.NaN;
  for (let i = 0; i < x.length; i++) largest = Math.max(largest, Math.abs(x[i]! - y[i]!));
  return largest;
}
