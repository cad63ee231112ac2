// LoRA-Pro (arXiv 2407.18242): steps of A and B whose product moves as full fine-tuning would, as far as rank R can. With
// dW = s·B·A and the gradients gA = s·Bᵀ·g, gB = s·g·Aᵀ of the factors, K = (BᵀB)⁻¹, L = (AAᵀ)⁻¹:
//   A takes K·gA/s² + X·A, B takes (I − B·K·Bᵀ)·gB·L/s² − B·X, where BᵀB·X + X·AAᵀ = −K·gA·Aᵀ/s².
// X changes no product; of all solutions it is the one nearest to gA, gB. The reference has s = 2 and a bias correction that
// is one step ahead; here s is the job's. Factors are rank-major, so as columns A is [in, R] and B [out, R].

import { added, scaled, times } from '../../adapters/families/matrices.ts';
import {
  type Columns,
  scaled as eachScaled,
  innerProducts,
  jacobiSvd,
  multiplyTransposed,
} from '../../adapters/orthogonal.ts';
import { GatewayError } from '../../errors.ts';
import { type AdamOptions, adamStep, momentLengths, momentsOf } from './adam.ts';
import type { Optimizer, Parameter, ParameterShape } from './optimizer.ts';
import { createState, withState } from './state.ts';

export interface LoraProSgdOptions {
  readonly name: 'lora-pro-sgd';
  /** s: what B·A is multiplied with where it is used. */
  readonly scale: number;
  /** Added to the eigenvalues of BᵀB and AAᵀ; the reference's is 1e-8. 0 is exact, and wild where B is nearly singular. */
  readonly damping: number;
  readonly weightDecay: number;
}

/** Adam's moments are those of the product, [out, in]: as much memory as full fine-tuning has for them. */
export interface LoraProOptions extends AdamOptions {
  readonly name: 'lora-pro';
  readonly scale: number;
  readonly damping: number;
}

export interface Factors {
  readonly a: Columns; // [in, R]
  readonly b: Columns; // [out, R]
}

/** What to take from A and from B. */
export function adjustedGradients(
  { a, b }: Factors,
  gradient: Factors,
  { scale, damping }: { readonly scale: number; readonly damping: number },
): Factors {
  const ofB = spectrum(innerProducts(b, b));
  const ofA = spectrum(innerProducts(a, a));
  const [k, l] = [inverse(ofB, damping), inverse(ofA, damping)];
  const share = 1 / (scale * scale);
  const right = times(k, innerProducts(gradient.a, a)); // [R, R]
  const x = solveSylvester(ofB, ofA, scaled(right, -share)); // [R, R]
  const seen = times(k, innerProducts(b, gradient.b)); // [R, R]
  const outside = minus(gradient.b, times(b, seen)); // [out, R]
  return {
    a: added(scaled(multiplyTransposed(gradient.a, k), share), multiplyTransposed(a, x)),
    b: minus(scaled(multiplyTransposed(outside, l), share), times(b, x)),
  };
}

interface Spectrum {
  readonly vectors: Columns; // [R, R]
  readonly values: Float64Array; // [R]
}

/** Of a symmetric matrix without negative eigenvalues: its singular values and vectors. */
function spectrum(x: Columns): Spectrum {
  const { v, sigma } = jacobiSvd(x);
  return { vectors: v, values: sigma };
}

// Of the largest eigenvalue: below this it is what rounding left of a zero.
const negligible = 1e-13;

function inverse({ vectors, values }: Spectrum, damping: number): Columns {
  const least = negligible * values[0]!;
  const inverted = values.map((x) => (x + damping > least ? 1 / (x + damping) : 0));
  return multiplyTransposed(eachScaled(vectors, inverted), vectors);
}

/** X with P·X + X·Q = c for symmetric P and Q without negative eigenvalues; where both have a zero, X has one. */
function solveSylvester(p: Spectrum, q: Spectrum, c: Columns): Columns {
  const turned = times(innerProducts(p.vectors, c), q.vectors);
  const { rows } = turned;
  const data = turned.data.map((value, at) => {
    const sum = p.values[at % rows]! + q.values[Math.floor(at / rows)]!;
    return sum > 0 ? value / sum : 0;
  });
  return multiplyTransposed(times(p.vectors, { ...turned, data }), q.vectors);
}

function minus(x: Columns, y: Columns): Columns {
  return added(x, scaled(y, -1));
}

export function createLoraProSgd(
  options: LoraProSgdOptions,
  parameters: readonly ParameterShape[],
): Optimizer {
  const pairs = pairsOf(options.name, parameters);
  const state = createState([]);
  return withState({ name: options.name, state, parameters }, (current, learningRate) => {
    const kept = 1 - learningRate * options.weightDecay;
    for (const [a, b] of pairs) {
      const pair = [current[a]!, current[b]!] as const;
      const gradient = { a: columnsOf(pair[0], 'gradient'), b: columnsOf(pair[1], 'gradient') };
      const step = adjustedGradients(factorsOf(pair), gradient, options);
      take(pair, step, { learningRate, kept });
    }
  });
}

export function createLoraPro(
  options: LoraProOptions,
  parameters: readonly ParameterShape[],
): Optimizer {
  const pairs = pairsOf(options.name, parameters);
  const state = createState(
    pairs.flatMap(([a, b]) =>
      momentLengths(parameters[a]!.name, parameters[a]!.columns * parameters[b]!.columns),
    ),
  );
  return withState({ name: options.name, state, parameters }, (current, learningRate) => {
    const adam = { ...options, weightDecay: 0, learningRate: -1, steps: state.steps };
    const kept = 1 - learningRate * options.weightDecay;
    for (const [a, b] of pairs) {
      const pair = [current[a]!, current[b]!] as const;
      const factors = factorsOf(pair);
      const gradient = { a: columnsOf(pair[0], 'gradient'), b: columnsOf(pair[1], 'gradient') };
      const low = adjustedGradients(factors, gradient, options);
      const full = productChange(factors, low, options.scale); // [out, in]
      const direction = new Float32Array(full.length);
      adamStep(direction, full, momentsOf(state, pair[0].name), adam); // From 0 by −1: m̂/(√v̂ + ε).
      const again = factorGradients(factors, direction, options.scale);
      take(pair, adjustedGradients(factors, again, options), { learningRate, kept });
    }
  });
}

/** Indices of each module's A and B. */
function pairsOf(
  name: string,
  parameters: readonly ParameterShape[],
): ReadonlyArray<readonly [number, number]> {
  const indices = new Map(parameters.map((parameter, i) => [parameter.name, i]));
  const firsts = parameters.filter((parameter) => parameter.name.endsWith('.a'));
  const pairs = firsts.map((parameter) => {
    const b = indices.get(`${parameter.name.slice(0, -1)}b`) ?? -1;
    return [indices.get(parameter.name)!, b] as const;
  });
  const fits = pairs.every(([a, b]) => parameters[a]!.rows === parameters[b]?.rows);
  if (!fits || 2 * pairs.length !== parameters.length) {
    const message = `optimizer ${name} trains low-rank pairs, a [R, in] and b [R, out], and nothing else`;
    throw new GatewayError('INVALID_REQUEST', message);
  }
  return pairs;
}

function columnsOf(parameter: Parameter, part: 'values' | 'gradient'): Columns {
  const { rows, columns } = parameter;
  return { rows: columns, columns: rows, data: Float64Array.from(parameter[part]) };
}

function factorsOf([a, b]: readonly [Parameter, Parameter]): Factors {
  return { a: columnsOf(a, 'values'), b: columnsOf(b, 'values') };
}

/** How s·B·A moves with the steps of both: s·(B·dA + dB·A), one row an output. */
function productChange({ a, b }: Factors, step: Factors, scale: number): Float32Array {
  const [width, height] = [a.rows, b.rows];
  const change = new Float32Array(height * width);
  const row = new Float64Array(width);
  for (let o = 0; o < height; o++) {
    row.fill(0);
    for (let r = 0; r < a.columns; r++) {
      const [left, right] = [scale * b.data[r * height + o]!, scale * step.b.data[r * height + o]!];
      for (let i = 0; i < width; i++) {
        row[i]! += left * step.a.data[r * width + i]! + right * a.data[r * width + i]!;
      }
    }
    change.set(row, o * width);
  }
  return change;
}

/** Gradients of A and B where `full` [out, in] is that of the product. */
function factorGradients({ a, b }: Factors, full: Float32Array, scale: number): Factors {
  const [width, height] = [a.rows, b.rows];
  const [ofA, ofB] = [new Float64Array(a.data.length), new Float64Array(b.data.length)];
  for (let o = 0; o < height; o++) {
    const row = full.subarray(o * width, (o + 1) * width);
    for (let r = 0; r < a.columns; r++) {
      const factor = scale * b.data[r * height + o]!;
      let sum = 0;
      for (let i = 0; i < width; i++) {
        ofA[r * width + i]! += factor * row[i]!;
        sum += a.data[r * width + i]! * row[i]!;
      }
      ofB[r * height + o] = scale * sum;
    }
  }
  return { a: { ...a, data: ofA }, b: { ...b, data: ofB } };
}

function take(
  [a, b]: readonly [Parameter, Parameter],
  step: Factors,
  { learningRate, kept }: { readonly learningRate: number; readonly kept: number },
): void {
  for (const [{ values }, { data }] of [
    [a, step.a],
    [b, step.b],
  ] as const) {
    for (let i = 0; i < values.length; i++) {
      values[i] = values[i]! * kept - learningRate * data[i]!;
    }
  }
}
