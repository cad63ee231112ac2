import { beforeAll, describe, expect, it } from 'vitest';
import { svd } from '../../src/adapters/orthogonal.ts';
import { createKernels } from '../../src/kernels/create-kernels.ts';
import type { Decoder } from '../../src/model/decoder.ts';
import { scrapCells } from '../../src/model/step-inputs.ts';
import {
  type AdapterRows,
  type AtomBank,
  type AtomRouting,
  type Segment,
  uniformRows,
} from '../../src/model/stepper.ts';
import { openDeepTiny, PageBook, randomAtoms, randomBank } from '../support/adapter-kinds.ts';
import { createRng } from '../support/random.ts';

// What must hold exactly of queryable adapters (algorithms.md section 6), through the whole decoder.

const bank = randomBank({ r: 8, dq: 6, K: 5, blockLayers: 2 });
const blocks = 5;
const prompt = Int32Array.of(3, 14, 159, 265, 35);

function softmax(logits: readonly number[]): number[] {
  const top = Math.max(...logits);
  const powers = logits.map((logit) => Math.exp(logit - top));
  return powers.map((power) => power / powers.reduce((sum, one) => sum + one, 0));
}

describe.each(['reference', 'ggml'] as const)('queryable adapters on %s', (backend) => {
  let decoder: Decoder;
  let pages: number[];
  beforeAll(async () => {
    decoder = openDeepTiny(await createKernels(backend, { threads: 1 }), { blocks, pages: 4 });
    pages = new PageBook(decoder, 21).take(1);
    return () => decoder[Symbol.dispose]();
  });

  const lora = (): AdapterRows => uniformRows(pages, 8);
  const queried = (atoms: AtomRouting): AdapterRows => ({ ...lora(), atoms });
  const segment = (adapter: AdapterRows, tokens: Int32Array = prompt, run = 0): Segment => {
    const cellBase = scrapCells + 8 * run;
    return { tokens, cellBase, position: 0, adapter, wantsLogits: true };
  };
  const run = (use: AdapterRows): { logits: Float32Array; weights: number[] } => {
    const result = decoder.step([segment(use)]);
    return { logits: result.logits(0).slice(), weights: [...(result.atomWeights(0) ?? [])] };
  };

  it('one atom, the identity, is a LoRA bit for bit', () => {
    const atoms = Float32Array.from({ length: 64 }, (_, i) => (i % 9 === 0 ? 1 : 0));
    const one = { ...randomBank({ r: 8, dq: 6, K: 1, blockLayers: 2 }), id: 'identity', atoms };
    decoder.setAtomBank(one);
    const { logits, weights } = run(queried(randomAtoms(one, 1, 1)));
    expect(weights).toEqual([1, 1, 1]);
    expect(logits).toEqual(run(lora()).logits);
  });

  it('weights are a convex choice of topK atoms, and no mix is larger than the largest atom', () => {
    decoder.setAtomBank(bank);
    const norm = (map: ArrayLike<number>): number => {
      return Math.max(...svd({ rows: 8, columns: 8, data: Float64Array.from(map) }).sigma);
    };
    const atomsOf = ({ atoms, K }: AtomBank): Float32Array[] =>
      Array.from({ length: K }, (_, k) => atoms.subarray(64 * k, 64 * (k + 1)));
    const largest = Math.max(...atomsOf(bank).map(norm));
    const rng = createRng(2);
    let count = 0;
    let most = 0;
    while (count < 1000) {
      const topK = 1 + (count % 5);
      const use = queried(randomAtoms(bank, topK, count));
      const segments = Array.from({ length: 32 }, (_, i) =>
        segment(use, Int32Array.of(rng.below(320)), i),
      );
      const result = decoder.step(segments);
      for (let i = 0; i < 32; i++) {
        const weights = result.atomWeights(i)!;
        for (let at = 0; at < weights.length; at += 5, count++) {
          const pi = weights.subarray(at, at + 5);
          expect(pi.every((share) => share >= 0)).toBe(true);
          expect(pi.filter((share) => share > 0).length).toBeLessThanOrEqual(topK);
          expect(pi.reduce((sum, share) => sum + share, 0)).toBeCloseTo(1, 6);
          const mix = new Float64Array(64);
          atomsOf(bank).forEach((atom, k) => {
            for (let j = 0; j < 64; j++) mix[j]! += pi[k]! * atom[j]!;
          });
          most = Math.max(most, norm(mix) / largest);
        }
      }
    }
    expect(most).toBeLessThan(1 + 1e-6);
    expect(most).toBeGreaterThan(0.9); // some token uses the largest atom nearly alone: the bound is near
  });

  it('atoms in another order, with their keys, change nothing', () => {
    decoder.setAtomBank(bank);
    const atoms = randomAtoms(bank, 2, 1);
    const before = run(queried(atoms));
    const order = [3, 0, 4, 1, 2];
    const permuted = (flat: Float32Array): Float32Array => {
      const width = flat.length / bank.K;
      return Float32Array.from(
        flat,
        (_, i) => flat[order[Math.floor(i / width)]! * width + (i % width)]!,
      );
    };
    decoder.setAtomBank({ ...bank, id: 'permuted', atoms: permuted(bank.atoms) });
    const after = run(
      queried({
        bank: 'permuted',
        keys: permuted(atoms.keys),
        bias: permuted(atoms.bias),
        topK: 2,
      }),
    );
    after.weights.forEach((share, i) => {
      const from = bank.K * Math.floor(i / bank.K) + order[i % bank.K]!;
      expect(share).toBeCloseTo(before.weights[from]!, 6);
    });
    after.logits.forEach((logit, i) => {
      expect(Math.abs(logit - before.logits[i]!)).toBeLessThan(1e-4);
    });
  });

  it('with all atoms in the choice every weight counts; with a strong prior, the prior alone', () => {
    decoder.setAtomBank(bank);
    const atoms = randomAtoms(bank, bank.K, 1);
    const flat = run(queried(atoms)).weights;
    expect(flat.every((share) => share > 0)).toBe(true);
    // λ·log p: at λ = 1e6 what a token asks decides between equals only.
    const prior = softmax([0.3, -1, 2, 0.5, 2]);
    const strong = { ...atoms, bias: Float32Array.from(prior, (p) => 1e6 * Math.log(p)) };
    const two = run(queried({ ...strong, topK: 2 })).weights;
    two.forEach((share, i) => {
      if (prior[i % 5] !== prior[2]) expect(share).toBe(0);
    });
    const single = run(queried({ ...strong, topK: 1 })).weights;
    expect(single.filter((share) => share === 1)).toHaveLength(3);
    // At λ = 1, keys that ask nothing leave the prior itself, or the most likely of it.
    const silent = { ...atoms, keys: atoms.keys.map(() => 0) };
    const logPrior = Float32Array.from(prior, Math.log);
    const whole = run(queried({ ...silent, bias: logPrior })).weights;
    const near = (weights: number[], wanted: number[]): void => {
      for (const [i, share] of weights.entries()) expect(share).toBeCloseTo(wanted[i % 5]!, 6);
    };
    near(whole, prior);
    const best = run(queried({ ...silent, bias: logPrior, topK: 3 })).weights;
    const kept = prior.map((p, k) => (k === 1 || k === 0 ? 0 : p));
    const total = kept.reduce((sum, p) => sum + p, 0);
    near(
      best,
      kept.map((p) => p / total),
    );
  });

  it('tells the weights of the last token that is no guess', () => {
    decoder.setAtomBank(bank);
    const use = queried(randomAtoms(bank, 2, 1));
    const weights = (tokens: Int32Array, drafts: number, wantsLogits = true): Float32Array => {
      const result = decoder.step([
        { ...segment(use, tokens), drafts, wantsLogits },
        segment(lora(), prompt, 1),
      ]);
      expect(result.atomWeights(1)).toBeNull();
      return result.atomWeights(0)!;
    };
    const last = weights(prompt.subarray(0, 3), 0);
    const guessed = weights(prompt, 2);
    const unread = weights(prompt.subarray(0, 3), 0, false);
    for (const other of [guessed, unread]) {
      other.forEach((share, i) => {
        expect(share).toBeCloseTo(last[i]!, 5);
      });
    }
    expect(weights(prompt, 0)).not.toEqual(last);
  });

  it('one tenant’s keys change no bit of another’s answer beside it', () => {
    decoder.setAtomBank(bank);
    const own = queried(randomAtoms(bank, 2, 1));
    const beside = (other: AtomRouting): Float32Array =>
      decoder
        .step([segment(queried(other), prompt, 1), segment(own)])
        .logits(1)
        .slice();
    const before = beside(randomAtoms(bank, 2, 5));
    expect(beside(randomAtoms(bank, 4, 6))).toEqual(before);
  });

  it('atoms added to the bank change no answer of who has no keys for them, beside who has', () => {
    const few = { ...bank, id: 'few', K: 3, atoms: bank.atoms.subarray(0, 3 * 64) };
    const own = queried(randomAtoms(few, 2, 1));
    decoder.setAtomBank(few);
    const before = run(own);
    const grown = { ...bank, id: 'grown', covers: new Set(['few']) };
    decoder.setAtomBank(grown);
    const result = decoder.step([
      segment(own),
      segment(queried(randomAtoms(grown, 4, 2)), prompt, 1),
    ]);
    expect(result.atomWeights(0)).toHaveLength(3 * few.K);
    expect(result.atomWeights(1)).toHaveLength(3 * grown.K);
    result.atomWeights(0)!.forEach((share, i) => {
      expect(Math.abs(share - before.weights[i]!)).toBeLessThan(1e-6);
    });
    result.logits(0).forEach((logit, i) => {
      expect(Math.abs(logit - before.logits[i]!)).toBeLessThan(1e-5);
    });
    // What is for the bank as it was is no use of one that does not begin with it.
    decoder.setAtomBank({ ...bank, id: 'other' });
    expect(() => run(own)).toThrow(/atoms of bank few, the bank here is other/);
  });
});
