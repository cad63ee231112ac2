// Reverse-mode differentiation of a program's closure: a Tape is Ops that note how each result came about, and then emit
// the gradients as further ops of the same program. So one implementation trains on every backend.
//
// Only what leads from a `trainable` tensor is noted; frozen weights cost nothing. A frozen linear goes backward through
// the transposed copy that the caller hands in (algorithms of ggml over quantised rows are about 10× slower, figures.md).
// A weight's gradient is `outer(dy, x)` of the low-rank factors themselves: the dense N×K gradient of a frozen weight is
// never formed. Ops without a rule refuse a tensor that needs a gradient.

import { GatewayError } from '../errors.ts';
import type {
  AtomRouter,
  AtomUses,
  ExpandPart,
  ForwardOps,
  Ops,
  RankRouter,
  RopeOptions,
  ShrinkPart,
  Tensor,
} from './kernels.ts';

export interface TapeOptions {
  /** Stored tensors (f32) and inputs whose gradients are wanted. */
  readonly trainable: Iterable<Tensor>;
  /** Frozen weight [N,K] → the same numbers as [K,N]. An f32 weight without a copy is transposed at every step. */
  readonly transposed: ReadonlyMap<Tensor, Tensor>;
}

/** A tensor and the gradient of what is minimised with respect to it. */
export interface Seed {
  readonly of: Tensor;
  readonly gradient: Tensor;
}

type Gradients = Map<Tensor, Tensor>;
/** The emitted gradient of each result (undefined where nothing depends on it) → gradients of the arguments, added up. */
type Backward = (dys: ReadonlyArray<Tensor | undefined>, into: Gradients) => void;

interface Step {
  readonly results: readonly Tensor[];
  readonly backward: Backward;
}

export class Tape implements ForwardOps {
  readonly training: ForwardOps['training'];
  readonly #ops: Ops;
  readonly #options: TapeOptions;
  /** Tensors that a gradient must reach or pass. */
  readonly #active: Set<Tensor>;
  readonly #steps: Step[] = [];

  constructor(ops: Ops, options: TapeOptions) {
    this.#ops = ops;
    this.#options = options;
    this.#active = new Set(options.trainable);
    this.training = {
      fill: (shape, value) => ops.training.fill(shape, value),
      sign: (x) => ops.training.sign(x),
      softmaxTop: (x, k, scale) => this.#softmaxTop(x, k, scale),
      linearT: (x, w) => this.#linearT(x, w),
      attendSelf: (q, k, v, mask) => this.#attendSelf(q, k, v, mask),
      crossEntropy: (logits, targets, weights) => this.#crossEntropy(logits, targets, weights),
    };
  }

  /** Gradients with respect to `wanted`, each of which must be trainable (or lie on the way) and reached by a seed. Emits
   *  ops; call it once. */
  gradients(seeds: readonly Seed[], wanted: readonly Tensor[]): Tensor[] {
    const gradients: Gradients = new Map();
    for (const { of, gradient } of seeds) this.#add(gradients, of, () => gradient);
    this.#unwind(gradients);
    return wanted.map((tensor) => {
      const gradient = gradients.get(tensor);
      if (gradient === undefined) {
        const shape = tensor.shape.join('×');
        throw new GatewayError('INVALID_REQUEST', `gradients: none reaches a tensor of ${shape}`);
      }
      return gradient;
    });
  }

  /** `build(tape, xs)` without keeping its intermediate values: they are computed again on the way back, so a deep model
   *  needs memory for one block's values instead of all (activation recomputation). `build` declares no inputs. */
  checkpoint(xs: readonly Tensor[], build: (tape: Tape, xs: readonly Tensor[]) => Tensor): Tensor {
    const first = new Tape(this.#ops, { ...this.#options, trainable: this.#active });
    const y = build(first, xs);
    if (!first.#active.has(y)) return y;
    return this.#note([y], (dys, into) => {
      const again = new Tape(this.#ops, { ...this.#options, trainable: this.#active });
      const inner: Gradients = new Map();
      again.#add(inner, build(again, xs), () => dys[0]!);
      again.#unwind(inner);
      for (const [tensor, gradient] of inner) this.#add(into, tensor, () => gradient);
    })[0]!;
  }

  #unwind(gradients: Gradients): void {
    for (const { results, backward } of this.#steps.toReversed()) {
      const dys = results.map((result) => gradients.get(result));
      // What is behind a result is not looked at again: dropping it leaves only gradients of leaves.
      for (const result of results) gradients.delete(result);
      if (dys.some((dy) => dy !== undefined)) backward(dys, gradients);
    }
  }

  #add(gradients: Gradients, tensor: Tensor, gradient: () => Tensor): void {
    if (!this.#active.has(tensor)) return;
    const sum = gradients.get(tensor);
    gradients.set(tensor, sum === undefined ? gradient() : this.#ops.add(sum, gradient()));
  }

  #note(results: readonly Tensor[], backward: Backward): readonly Tensor[] {
    for (const result of results) this.#active.add(result);
    this.#steps.push({ results, backward });
    return results;
  }

  #needs(...tensors: readonly Tensor[]): boolean {
    return tensors.some((tensor) => this.#active.has(tensor));
  }

  /** Notes one result if any of `from` needs a gradient. `rule` yields, per argument, how to make its gradient. */
  #derive(
    y: Tensor,
    from: readonly Tensor[],
    rule: (dy: Tensor) => ReadonlyArray<() => Tensor>,
  ): Tensor {
    if (!this.#needs(...from)) return y;
    return this.#note([y], (dys, into) => {
      const makers = rule(dys[0]!);
      makers.forEach((make, i) => {
        this.#add(into, from[i]!, make);
      });
    })[0]!;
  }

  #refuse(op: string, ...tensors: readonly Tensor[]): void {
    if (this.#needs(...tensors)) throw new GatewayError('UNSUPPORTED', `${op} has no gradient`);
  }

  input(name: string, dtype: 'f32' | 'i32' | 'i64', shape: readonly number[]): Tensor {
    return this.#ops.input(name, dtype, shape);
  }

  /** y [T,E], table [V,E]. */
  embed(table: Tensor, ids: Tensor): Tensor {
    return this.#derive(this.#ops.embed(table, ids), [table], (dy) => [
      () => this.#ops.training.scatterRows(dy, ids, table.shape[0]!), // [V, E]
    ]);
  }

  /** x and y [T,E], weight [E]. */
  rmsNorm(x: Tensor, weight: Tensor, eps: number): Tensor {
    const { training } = this.#ops;
    return this.#derive(this.#ops.rmsNorm(x, weight, eps), [x, weight], (dy) => [
      () => training.rmsNormBack(dy, x, weight, eps), // [T, E]
      () => training.rmsNormBackWeight(dy, x, eps), // [E]
    ]);
  }

  /** x [T,K], w [N,K], y [T,N]. */
  linear(x: Tensor, w: Tensor): Tensor {
    return this.#derive(this.#ops.linear(x, w), [x, w], (dy) => [
      () => this.#throughWeight(dy, w), // [T, K]
      () => this.#ops.training.outer(dy, x), // [N, K]
    ]);
  }

  #throughWeight(dy: Tensor, w: Tensor): Tensor {
    const copy = this.#options.transposed.get(w);
    if (copy !== undefined) return this.#ops.linear(dy, copy);
    if (w.dtype === 'f32') return this.#ops.training.linearT(dy, w);
    const shape = `${w.shape.join('×')} ${w.dtype}`;
    throw new GatewayError('UNSUPPORTED', `linear: a weight of ${shape} needs a transposed copy`);
  }

  /** x [T,K], w [K,N], y [T,N]. */
  #linearT(x: Tensor, w: Tensor): Tensor {
    const { training } = this.#ops;
    return this.#derive(training.linearT(x, w), [x, w], (dy) => [
      () => this.#ops.linear(dy, w), // [T, K]
      () => training.outer(x, dy), // [K, N]
    ]);
  }

  #softmaxTop(x: Tensor, k: number, scale: number): Tensor {
    const { training } = this.#ops;
    const y = training.softmaxTop(x, k, scale);
    if (scale === 0) return y;
    return this.#derive(y, [x], (dy) => [() => training.softmaxTopBack(dy, y, scale)]);
  }

  add(a: Tensor, b: Tensor): Tensor {
    return this.#derive(this.#ops.add(a, b), [a, b], (dy) => [() => dy, () => dy]);
  }

  mul(a: Tensor, b: Tensor): Tensor {
    return this.#derive(this.#ops.mul(a, b), [a, b], (dy) => [
      () => this.#ops.mul(dy, b),
      () => this.#ops.mul(dy, a),
    ]);
  }

  /** All [T,F]. */
  swiglu(gate: Tensor, up: Tensor): Tensor {
    return this.#derive(this.#ops.swiglu(gate, up), [gate, up], (dy) => {
      const [dGate, dUp] = this.#ops.training.swigluBack(dy, gate, up);
      return [() => dGate, () => dUp];
    });
  }

  /** x and y [T,H,D]. */
  rope(x: Tensor, positions: Tensor, options: RopeOptions): Tensor {
    return this.#derive(this.#ops.rope(x, positions, options), [x], (dy) => [
      () => this.#ops.training.ropeBack(dy, positions, options), // [T, H, D]
    ]);
  }

  reshape(x: Tensor, shape: readonly number[]): Tensor {
    return this.#derive(this.#ops.reshape(x, shape), [x], (dy) => [
      () => this.#ops.reshape(dy, x.shape),
    ]);
  }

  /** x [T,N], rows [R], y [R,N]. */
  gatherRows(x: Tensor, rows: Tensor): Tensor {
    return this.#derive(this.#ops.gatherRows(x, rows), [x], (dy) => [
      () => this.#ops.training.scatterRows(dy, rows, x.shape[0]!), // [T, N]
    ]);
  }

  slice(x: Tensor, index: number): Tensor {
    this.#refuse('slice', x);
    return this.#ops.slice(x, index);
  }

  writeCells(cache: Tensor, x: Tensor, cells: Tensor): void {
    this.#refuse('writeCells', cache, x);
    this.#ops.writeCells(cache, x, cells);
  }

  attend(q: Tensor, k: Tensor, v: Tensor): Tensor {
    this.#refuse('attend over cells', q, k, v);
    return this.#ops.attend(q, k, v);
  }

  /** q [T,H,D], k and v [T,Hkv,D], y [T,H·D]. */
  #attendSelf(q: Tensor, k: Tensor, v: Tensor, mask: Tensor): Tensor {
    this.#refuse('the mask of attendSelf', mask);
    const { training } = this.#ops;
    return this.#derive(training.attendSelf(q, k, v, mask), [q, k, v], (dy) => {
      const gradients = training.attendSelfBack(dy, q, k, v, mask);
      return gradients.map((gradient) => () => gradient);
    });
  }

  /** x [T,K], pages [T,P], uses [T]; per part a [pages,8,K], gate [G,8P], h [T,8P]. */
  shrink(x: Tensor, pages: Tensor, parts: readonly ShrinkPart[], uses: Tensor): Tensor[] {
    const hs = this.#ops.shrink(x, pages, parts, uses);
    if (!this.#needs(x, ...parts.flatMap(({ a, gate }) => [a, gate]))) return hs;
    this.#note(hs, (dys, into) => {
      // A part that nothing depends on takes no share of the gradient.
      const used = parts.filter((_, i) => dys[i] !== undefined);
      const dHs = dys.filter((dy) => dy !== undefined);
      const gradients = this.#ops.training.shrinkBack(dHs, x, { pages, uses }, used);
      this.#add(into, x, () => gradients.x);
      used.forEach(({ a, gate }, i) => {
        this.#add(into, a, () => gradients.parts[i]!.a);
        this.#add(into, gate, () => gradients.parts[i]!.gate);
      });
    });
    return hs;
  }

  routeRanks(x: Tensor, hs: readonly Tensor[], router: RankRouter): Tensor[] {
    this.#refuse('routeRanks', x, ...hs, ...router.biases);
    return this.#ops.routeRanks(x, hs, router);
  }

  routeAtoms(h: Tensor, earlier: readonly Tensor[], router: AtomRouter, uses: AtomUses): Tensor {
    this.#refuse('routeAtoms', h, ...earlier, ...Object.values(router), uses.keys, uses.bias);
    return this.#ops.routeAtoms(h, earlier, router, uses);
  }

  /** h and y [T,R], atoms [J,R,R], weights [T,1+J]. */
  mixRanks(h: Tensor, atoms: Tensor, weights: Tensor): Tensor {
    return this.#derive(this.#ops.mixRanks(h, atoms, weights), [h, atoms, weights], (dy) => {
      const gradients = this.#ops.training.mixRanksBack(dy, h, atoms, weights);
      return [() => gradients.h, () => gradients.atoms, () => gradients.weights];
    });
  }

  /** pages [T,P]; per part y [T,N], h [T,8P], b [pages,8,N]. */
  expand(pages: Tensor, parts: readonly ExpandPart[]): Tensor[] {
    const sums = this.#ops.expand(pages, parts);
    return parts.map(({ y, h, b }, i) =>
      this.#derive(sums[i]!, [y, h, b], (dy) => {
        const gradients = this.#ops.training.expandBack(dy, h, pages, b);
        return [() => dy, () => gradients.h, () => gradients.b];
      }),
    );
  }

  /** logits [T,V], targets and weights [T], loss [1]. */
  #crossEntropy(logits: Tensor, targets: Tensor, weights: Tensor): Tensor {
    this.#refuse('the weights of crossEntropy', weights);
    const { training } = this.#ops;
    return this.#derive(training.crossEntropy(logits, targets, weights), [logits], (dy) => [
      () => training.crossEntropyBack(dy, logits, targets, weights), // [T, V]
    ]);
  }
}
