import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { createRandom } from '../../../src/adapters/families/seeded-random.ts';
import type { Example } from '../../../src/trainer/examples.ts';
import { answersIn, layOut, packWindows, rowsOf } from '../../../src/trainer/packing.ts';
import { planSteps } from '../../../src/trainer/step-plan.ts';

const windowRows = 20;

/** Numbers 1, 2, … over all examples, so that every token says where it comes from. */
function examplesOf(lengths: readonly number[]): Example[] {
  let next = 1;
  return lengths.map((length) => {
    const tokens = Int32Array.from({ length }, () => next++);
    const learnt = Uint8Array.from({ length }, (_, i) => (i > 0 && i % 3 !== 0 ? 1 : 0));
    return { tokens, learnt };
  });
}

const lengths = fc.array(fc.integer({ min: 2, max: windowRows + 1 }), {
  minLength: 1,
  maxLength: 300,
});

describe('packing', () => {
  it('puts every example into exactly one window, and none has more rows than there are', () => {
    fc.assert(
      fc.property(lengths, fc.integer({ min: 0, max: 2 ** 40 }), (given, seed) => {
        const examples = examplesOf(given);
        const windows = packWindows(examples, windowRows, createRandom(BigInt(seed)));
        const all = windows.flat().sort((a, b) => a - b);
        expect(all).toEqual(Array.from(examples.keys()));
        for (const window of windows) {
          const rows = window.reduce((sum, index) => sum + rowsOf(examples[index]!), 0);
          expect(rows).toBeLessThanOrEqual(windowRows);
        }
      }),
    );
  });

  it('leaves less than a tenth of the rows empty where examples are short', () => {
    const random = createRandom(7n);
    const examples = examplesOf(Array.from({ length: 500 }, () => 2 + random.below(9)));
    const rows = examples.reduce((sum, example) => sum + rowsOf(example), 0);
    const windows = packWindows(examples, windowRows, random);
    expect(rows / (windows.length * windowRows)).toBeGreaterThan(0.9);
  });

  it('lays each example out as a sequence of its own, with what follows each learnt row', () => {
    fc.assert(
      fc.property(lengths, (given) => {
        const examples = examplesOf(given);
        const windows = packWindows(examples, windowRows, null);
        const sizes = { windows: windows.length + 1, windowRows, weight: 0.5 };
        const layout = layOut(examples, windows, sizes);
        const { tokens, sequences, answers, rows } = layout;
        expect(tokens.length).toBe((windows.length + 1) * windowRows);
        const bySequence = new Map<number, number[]>();
        tokens.forEach((token, row) => {
          if (token === 0) return;
          const own = bySequence.get(sequences[row]!) ?? [];
          bySequence.set(sequences[row]!, [...own, token]);
        });
        const wanted = windows.flat().map((i) => Array.from(examples[i]!.tokens.slice(0, -1)));
        expect(Array.from(bySequence.values())).toEqual(wanted);
        expect(rows).toBe(wanted.flat().length);
        // A token's number is its place, so what follows it is the next number.
        for (const { row, target, weight } of answers) {
          expect(target).toBe(tokens[row]! + 1);
          expect(weight).toBe(0.5);
        }
        expect(answers).toHaveLength(answersIn(examples, windows));
      }),
    );
  });
});

describe('the plan of the steps', () => {
  const examples = examplesOf(Array.from({ length: 83 }, (_, i) => 2 + ((7 * i) % 19)));
  const recipe = {
    epochs: 3,
    stepsMax: null,
    batchWindows: 2,
    windowTokens: windowRows,
    accumulation: 3,
    batchSchedule: null,
    seed: 5,
  };

  it('goes through all examples once an epoch, each time in another order', () => {
    const plan = planSteps(examples, recipe);
    const order = Array.from({ length: plan.steps }, (_, step) => plan.microBatches(step));
    const perEpoch = new Map<number, number>();
    for (const index of order.flat(3)) perEpoch.set(index, (perEpoch.get(index) ?? 0) + 1);
    expect(Array.from(perEpoch.values())).toEqual(Array(83).fill(3));
    expect(order[0]).not.toEqual(order[Math.floor(plan.steps / 3)]);
    const most = Math.max(...order.flat().map((windows) => answersIn(examples, windows)));
    expect(plan.answersMax).toBe(most);
    for (const groups of order) {
      expect(groups.length).toBeGreaterThan(0);
      expect(groups.length).toBeLessThanOrEqual(3);
      for (const windows of groups) expect(windows.length).toBeLessThanOrEqual(2);
    }
  });

  it('is a function of seed and step', () => {
    const [plan, again] = [planSteps(examples, recipe), planSteps(examples, recipe)];
    for (const step of [plan.steps - 1, 0, 4]) {
      expect(again.microBatches(step)).toEqual(plan.microBatches(step));
    }
    const other = planSteps(examples, { ...recipe, seed: 6 });
    expect(other.microBatches(0)).not.toEqual(plan.microBatches(0));
  });

  it('ends where it is told to', () => {
    expect(planSteps(examples, { ...recipe, epochs: 100, stepsMax: 7 }).steps).toBe(7);
    const { steps } = planSteps(examples, { ...recipe, epochs: 1 });
    expect(planSteps(examples, { ...recipe, epochs: 1, stepsMax: 1000 }).steps).toBe(steps);
  });
});
