// The training ops of the reference backend: one obvious loop nest each, sums in f64, results in f32.

import { elementCount } from './check.ts';
import { type RopeOptions, ranksPerPage, type ShrinkPart, type Tensor } from './kernels.ts';
import { softmaxTop } from './rank-routing.ts';
import type {
  ExpandGradients,
  LowRankRows,
  MixGradients,
  ShrinkGradients,
  TrainingOps,
} from './training-ops.ts';

type Numbers = Float32Array<ArrayBufferLike>;
interface Zeros extends Tensor {
  readonly values: Numbers;
}

function zeros(shape: readonly number[]): Zeros {
  return { dtype: 'f32', shape, values: new Float32Array(elementCount(shape)) };
}

/** Of a computed value or of a stored tensor: both have `values` (reference-ops.ts). */
function numbers(tensor: Tensor): Numbers {
  return (tensor as Zeros).values;
}

/** `c[i,j] += Σ_l a[i·ai + l·al] · b[l·bl + j·bj]`, the strides saying which axis is which. */
function accumulate(
  c: Numbers,
  [a, ai, al]: readonly [Numbers, number, number],
  [b, bl, bj]: readonly [Numbers, number, number],
  [rows, inner, columns]: readonly [number, number, number],
): void {
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++) {
      let sum = 0;
      for (let l = 0; l < inner; l++) sum += a[i * ai + l * al]! * b[l * bl + j * bj]!;
      c[i * columns + j]! += sum;
    }
  }
}

function softmax(scores: Numbers): Float64Array {
  const top = scores.reduce((p, s) => Math.max(p, s), Number.NEGATIVE_INFINITY);
  const weights = Float64Array.from(scores, (score) => Math.exp(score - top));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return weights.map((weight) => weight / total);
}

interface Heads {
  readonly rows: number;
  readonly headSize: number;
  /** Distance of a row's numbers for one head from the next row's: of q and y, and of k and v. */
  readonly qStride: number;
  readonly kvStride: number;
}

export class ReferenceTraining implements TrainingOps {
  fill(shape: readonly number[], value: number): Tensor {
    const y = zeros(shape);
    y.values.fill(value);
    return y;
  }

  linearT(x: Tensor, w: Tensor): Tensor {
    const [rows, inner, outer] = [x.shape[0]!, x.shape[1]!, w.shape[1]!];
    const y = zeros([rows, outer]);
    const sizes = [rows, inner, outer] as const;
    accumulate(y.values, [numbers(x), inner, 1], [numbers(w), outer, 1], sizes);
    return y;
  }

  outer(a: Tensor, b: Tensor): Tensor {
    const [rows, left, right] = [a.shape[0]!, a.shape[1]!, b.shape[1]!];
    const y = zeros([left, right]);
    const sizes = [left, rows, right] as const;
    accumulate(y.values, [numbers(a), 1, left], [numbers(b), right, 1], sizes);
    return y;
  }

  sign(x: Tensor): Tensor {
    return { ...zeros(x.shape), values: numbers(x).map(Math.sign) } as Tensor;
  }

  softmaxTop(x: Tensor, k: number, scale: number): Tensor {
    const values = softmaxTop(numbers(x), x.shape[1]!, { k, scale });
    return { ...zeros(x.shape), values } as Tensor;
  }

  softmaxTopBack(dy: Tensor, y: Tensor, scale: number): Tensor {
    const dx = zeros(y.shape);
    const width = y.shape[1]!;
    for (let row = 0; row < dx.values.length; row += width) {
      const [shares, d] = [y, dy].map((of) => numbers(of).subarray(row, row + width));
      const mean = shares!.reduce((sum, share, i) => sum + share * d![i]!, 0);
      shares!.forEach((share, i) => {
        dx.values[row + i] = scale * share * (d![i]! - mean);
      });
    }
    return dx;
  }

  rmsNormBack(dy: Tensor, x: Tensor, weight: Tensor, eps: number): Tensor {
    const width = x.shape.at(-1)!;
    const dx = zeros(x.shape);
    const scale = numbers(weight);
    for (let start = 0; start < dx.values.length; start += width) {
      const row = numbers(x).subarray(start, start + width);
      const scaled = numbers(dy)
        .subarray(start, start + width)
        .map((d, i) => d * scale[i]!);
      const power = row.reduce((sum, p) => sum + p * p, 0) / width + eps;
      const along = row.reduce((sum, p, i) => sum + p * scaled[i]!, 0) / (width * power);
      row.forEach((p, i) => {
        dx.values[start + i] = (scaled[i]! - p * along) / Math.sqrt(power);
      });
    }
    return dx;
  }

  rmsNormBackWeight(dy: Tensor, x: Tensor, eps: number): Tensor {
    const width = x.shape.at(-1)!;
    const sums = new Float64Array(width);
    for (let start = 0; start < numbers(x).length; start += width) {
      const row = numbers(x).subarray(start, start + width);
      const power = row.reduce((sum, p) => sum + p * p, 0) / width + eps;
      for (let i = 0; i < width; i++) {
        sums[i]! += (numbers(dy)[start + i]! * row[i]!) / Math.sqrt(power);
      }
    }
    return { ...zeros([width]), values: Float32Array.from(sums) } as Tensor;
  }

  swigluBack(dy: Tensor, gate: Tensor, up: Tensor): readonly [Tensor, Tensor] {
    const [dGate, dUp] = [zeros(dy.shape), zeros(dy.shape)];
    numbers(dy).forEach((d, i) => {
      const [g, u] = [numbers(gate)[i]!, numbers(up)[i]!];
      const sigmoid = 1 / (1 + Math.exp(-g));
      dGate.values[i] = d * u * sigmoid * (1 + g * (1 - sigmoid));
      dUp.values[i] = d * g * sigmoid;
    });
    return [dGate, dUp];
  }

  ropeBack(dy: Tensor, positions: Tensor, { size, base, style }: RopeOptions): Tensor {
    const [rows, heads, headSize] = dy.shape as [number, number, number];
    const dx: Zeros = { ...zeros(dy.shape), values: numbers(dy).slice() };
    for (let head = 0; head < rows * heads; head++) {
      for (let i = 0; i < size / 2; i++) {
        const angle = numbers(positions)[Math.floor(head / heads)]! * base ** ((-2 * i) / size);
        const first = head * headSize + (style === 'norm' ? 2 * i : i);
        const second = first + (style === 'norm' ? 1 : size / 2);
        const [p, q] = [numbers(dy)[first]!, numbers(dy)[second]!];
        dx.values[first] = p * Math.cos(angle) + q * Math.sin(angle);
        dx.values[second] = q * Math.cos(angle) - p * Math.sin(angle);
      }
    }
    return dx;
  }

  scatterRows(x: Tensor, rows: Tensor, count: number): Tensor {
    const width = x.shape[1]!;
    const y = zeros([count, width]);
    numbers(rows).forEach((row, i) => {
      for (let n = 0; n < width; n++) y.values[row * width + n]! += numbers(x)[i * width + n]!;
    });
    return y;
  }

  attendSelf(q: Tensor, k: Tensor, v: Tensor, mask: Tensor): Tensor {
    const y = zeros([q.shape[0]!, q.shape[1]! * q.shape[2]!]);
    this.#eachHead(q, k, mask, (seen, at, from, { rows, headSize, qStride, kvStride }) => {
      const values = numbers(v).subarray(from);
      const shares: Numbers = Float32Array.from(seen.flat());
      const into = new Float32Array(rows * headSize);
      accumulate(into, [shares, rows, 1], [values, kvStride, 1], [rows, rows, headSize]);
      into.forEach((number, i) => {
        y.values[at + Math.floor(i / headSize) * qStride + (i % headSize)] = number;
      });
    });
    return y;
  }

  /** Per window and query head: the shares [L][L] of the values that its rows see, where its q and its k begin. */
  #eachHead(
    q: Tensor,
    k: Tensor,
    mask: Tensor,
    visit: (shares: readonly number[][], at: number, from: number, heads: Heads) => void,
  ): void {
    const [windows, rows] = mask.shape as [number, number];
    const [, heads, headSize] = q.shape as [number, number, number];
    const kvHeads = k.shape[1]!;
    const [qStride, kvStride] = [heads * headSize, kvHeads * headSize];
    for (let window = 0; window < windows; window++) {
      for (let head = 0; head < heads; head++) {
        const at = window * rows * qStride + head * headSize;
        const kvHead = Math.floor((head * kvHeads) / heads);
        const from = window * rows * kvStride + kvHead * headSize;
        const shares = Array.from({ length: rows }, (_, i) => {
          const hidden = numbers(mask).subarray((window * rows + i) * rows);
          const scores = Float32Array.from({ length: rows }, (_, j) => {
            let dot = 0;
            for (let d = 0; d < headSize; d++) {
              dot += numbers(q)[at + i * qStride + d]! * numbers(k)[from + j * kvStride + d]!;
            }
            return dot / Math.sqrt(headSize) + hidden[j]!;
          });
          return [...softmax(scores)];
        });
        visit(shares, at, from, { rows, headSize, qStride, kvStride });
      }
    }
  }

  attendSelfBack(
    dy: Tensor,
    ...[q, k, v, mask]: readonly [Tensor, Tensor, Tensor, Tensor]
  ): readonly [Tensor, Tensor, Tensor] {
    const [dq, dk, dv] = [zeros(q.shape), zeros(k.shape), zeros(v.shape)];
    this.#eachHead(q, k, mask, (shares, at, from, { rows, headSize, qStride, kvStride }) => {
      for (let i = 0; i < rows; i++) {
        const own = at + i * qStride;
        const dShares = shares[i]!.map((_, j) => {
          let dot = 0;
          for (let d = 0; d < headSize; d++) {
            dot += numbers(dy)[own + d]! * numbers(v)[from + j * kvStride + d]!;
          }
          return dot;
        });
        const mean = dShares.reduce((sum, d, j) => sum + d * shares[i]![j]!, 0);
        for (let j = 0; j < rows; j++) {
          const share = shares[i]![j]!;
          const dScore = (share * (dShares[j]! - mean)) / Math.sqrt(headSize);
          const other = from + j * kvStride;
          for (let d = 0; d < headSize; d++) {
            dq.values[own + d]! += dScore * numbers(k)[other + d]!;
            dk.values[other + d]! += dScore * numbers(q)[own + d]!;
            dv.values[other + d]! += share * numbers(dy)[own + d]!;
          }
        }
      }
    });
    return [dq, dk, dv];
  }

  crossEntropy(logits: Tensor, targets: Tensor, weights: Tensor): Tensor {
    const loss = zeros([1]);
    const words = logits.shape[1]!;
    let sum = 0;
    numbers(targets).forEach((target, t) => {
      const row = numbers(logits).subarray(t * words, (t + 1) * words);
      const top = row.reduce((p, s) => Math.max(p, s), Number.NEGATIVE_INFINITY);
      const total = row.reduce((all, score) => all + Math.exp(score - top), 0);
      sum += numbers(weights)[t]! * (Math.log(total) + top - row[target]!);
    });
    loss.values[0] = sum;
    return loss;
  }

  crossEntropyBack(dy: Tensor, logits: Tensor, targets: Tensor, weights: Tensor): Tensor {
    const dLogits = zeros(logits.shape);
    const words = logits.shape[1]!;
    numbers(targets).forEach((target, t) => {
      const scale = numbers(dy)[0]! * numbers(weights)[t]!;
      softmax(numbers(logits).subarray(t * words, (t + 1) * words)).forEach((share, word) => {
        dLogits.values[t * words + word] = scale * (share - (word === target ? 1 : 0));
      });
    });
    return dLogits;
  }

  shrinkBack(
    dHs: readonly Tensor[],
    x: Tensor,
    { pages, uses }: LowRankRows,
    parts: readonly ShrinkPart[],
  ): ShrinkGradients {
    const dx = zeros(x.shape);
    const [width, ranks] = [x.shape[1]!, pages.shape[1]! * ranksPerPage];
    const gradients = parts.map(({ a, gate }, part) => {
      const [dA, dGate] = [zeros(a.shape), zeros(gate.shape)];
      eachRank(pages, (i, row, at) => {
        const dH = numbers(dHs[part]!)[i]!;
        const use = numbers(uses)[row]! * ranks + (i % ranks);
        const scale = numbers(gate)[use]!;
        for (let k = 0; k < width; k++) {
          const [p, weight] = [numbers(x)[row * width + k]!, numbers(a)[at * width + k]!];
          dGate.values[use]! += dH * weight * p;
          dA.values[at * width + k]! += dH * scale * p;
          dx.values[row * width + k]! += dH * scale * weight;
        }
      });
      return { a: dA, gate: dGate };
    });
    return { x: dx, parts: gradients };
  }

  mixRanksBack(dy: Tensor, h: Tensor, atoms: Tensor, weights: Tensor): MixGradients {
    const [rows, ranks] = h.shape as [number, number];
    const mixes = atoms.shape[0]!;
    const [dH, dAtoms, dWeights] = [zeros(h.shape), zeros(atoms.shape), zeros(weights.shape)];
    for (let i = 0; i < rows * ranks; i++) {
      const row = Math.floor(i / ranks);
      const [d, first] = [numbers(dy)[i]!, row * (1 + mixes)];
      dH.values[i]! += numbers(weights)[first]! * d;
      dWeights.values[first]! += numbers(h)[i]! * d;
      for (let j = 0; j < mixes; j++) {
        const weight = numbers(weights)[first + 1 + j]!;
        for (let s = 0; s < ranks; s++) {
          const at = (j * ranks + (i % ranks)) * ranks + s;
          const from = row * ranks + s;
          dH.values[from]! += weight * numbers(atoms)[at]! * d;
          dAtoms.values[at]! += weight * numbers(h)[from]! * d;
          dWeights.values[first + 1 + j]! += numbers(atoms)[at]! * numbers(h)[from]! * d;
        }
      }
    }
    return { h: dH, atoms: dAtoms, weights: dWeights };
  }

  expandBack(dy: Tensor, h: Tensor, pages: Tensor, b: Tensor): ExpandGradients {
    const [dH, dB] = [zeros(h.shape), zeros(b.shape)];
    const width = dy.shape[1]!;
    eachRank(pages, (i, row, at) => {
      for (let n = 0; n < width; n++) {
        const d = numbers(dy)[row * width + n]!;
        dH.values[i]! += d * numbers(b)[at * width + n]!;
        dB.values[at * width + n]! += d * numbers(h)[i]!;
      }
    });
    return { h: dH, b: dB };
  }
}

/** Every rank of every row with a page other than 0: its flat index in [T,8P], its row, and its row of the pool. */
function eachRank(pages: Tensor, visit: (i: number, row: number, at: number) => void): void {
  const count = pages.shape[1]!;
  numbers(pages).forEach((page, slot) => {
    for (let r = 0; page !== 0 && r < ranksPerPage; r++) {
      visit(slot * ranksPerPage + r, Math.floor(slot / count), page * ranksPerPage + r);
    }
  });
}
