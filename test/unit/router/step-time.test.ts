import { describe, expect, it } from 'vitest';
import type { StepReport } from '../../../src/engine/messages.ts';
import { StepTime, workOf } from '../../../src/router/step-time.ts';
import { createRng, type Rng } from '../../support/random.ts';

// Planted: ms per step, decode row, prefill token, decode rank, prefill rank, KV cell.
const truth = [9, 1.5, 2.2, 0.06, 0.02, 0.0008] as const;

function timeOf(report: StepReport, scale = 1): number {
  return scale * workOf(report).reduce((sum, work, i) => sum + work * truth[i]!, 0);
}

/** The mix of steps that a busy engine runs. */
function randomStep(random: Rng): StepReport {
  const decodeRows = random.below(17);
  const prefillTokens = random.next() < 0.4 ? 1 + random.below(256) : 0;
  const rank = random.below(65);
  return {
    ms: 0,
    decodeRows,
    prefillTokens,
    decodeRanks: Math.floor(decodeRows * random.next() * 64),
    prefillRanks: prefillTokens * rank,
    kvCells: decodeRows * (10 + random.below(600)) + prefillTokens,
  };
}

function train(model: StepTime, random: Rng, steps: number, scale = 1): void {
  for (let i = 0; i < steps; i++) {
    const report = randomStep(random);
    model.observe({ ...report, ms: timeOf(report, scale) * (1 + 0.05 * random.normal()) });
  }
}

/** Mean relative error on fresh steps. */
function errorOf(model: StepTime, random: Rng, scale = 1): number {
  let sum = 0;
  for (let i = 0; i < 200; i++) {
    const report = randomStep(random);
    const wanted = timeOf(report, scale);
    sum += Math.abs(model.estimate(workOf(report)).ms - wanted) / wanted;
  }
  return sum / 200;
}

describe('the step time model', () => {
  it('recovers planted coefficients under 5 % noise', () => {
    const model = new StepTime();
    train(model, createRng(1), 3000);
    // The share of each coefficient in what predictions are made of; a cell weighs least, so it is known least well.
    const tolerances = [0.15, 0.15, 0.05, 0.15, 0.15, 0.5];
    Object.values(model.costs).forEach((found, i) => {
      expect(Math.abs(found - truth[i]!) / truth[i]!, `coefficient ${i}`).toBeLessThan(
        tolerances[i]!,
      );
    });
    expect(errorOf(model, createRng(2))).toBeLessThan(0.02);
  });

  it('measures the noise of a step', () => {
    const model = new StepTime();
    train(model, createRng(3), 3000);
    expect(model.relativeSigma).toBeGreaterThan(0.04);
    expect(model.relativeSigma).toBeLessThan(0.07);
  });

  it('is not wrecked by a step during which the machine paused', () => {
    const model = new StepTime();
    const random = createRng(4);
    train(model, random, 1000);
    for (let pause = 0; pause < 5; pause++) {
      const report = randomStep(random);
      model.observe({ ...report, ms: 10 * timeOf(report) });
      expect(errorOf(model, createRng(5))).toBeLessThan(0.12);
      train(model, random, 40);
    }
    expect(errorOf(model, createRng(5))).toBeLessThan(0.04);
  });

  it('believes a machine that became three times slower within 300 steps', () => {
    const model = new StepTime();
    const random = createRng(6);
    train(model, random, 1000);
    train(model, random, 300, 3);
    expect(errorOf(model, createRng(7), 3)).toBeLessThan(0.1);
  });

  it('recovers from a first step that was a hundred times too long', () => {
    const model = new StepTime();
    const first = { ...randomStep(createRng(8)), decodeRows: 1 };
    model.observe({ ...first, ms: 100 * timeOf(first) });
    train(model, createRng(9), 300);
    expect(errorOf(model, createRng(10))).toBeLessThan(0.08);
  });

  it('predicts single streams although rows, ranks and the step itself are then one thing', () => {
    const model = new StepTime();
    const random = createRng(11);
    const report = (cells: number, rank: number): StepReport => ({
      ms: 0,
      decodeRows: 1,
      prefillTokens: 0,
      decodeRanks: rank,
      prefillRanks: 0,
      kvCells: cells,
    });
    for (let i = 0; i < 500; i++) {
      const one = report(50 + i, 16);
      model.observe({ ...one, ms: timeOf(one) * (1 + 0.05 * random.normal()) });
    }
    const asked = report(300, 16);
    const wanted = timeOf(asked);
    const seen = model.estimate(workOf(asked));
    expect(Math.abs(seen.ms - wanted) / wanted).toBeLessThan(0.03);
    // What was never seen apart is known to be unknown.
    const unseen = model.estimate(workOf({ ...report(300, 64), decodeRows: 8 }));
    expect(unseen.doubtMs).toBeGreaterThan(10 * seen.doubtMs);
  });

  it('keeps what it learned of ranks while no adapter is used', () => {
    const model = new StepTime();
    const random = createRng(12);
    train(model, random, 2000);
    const before = model.costs.decodeRank;
    for (let i = 0; i < 5000; i++) {
      const report = { ...randomStep(random), decodeRanks: 0, prefillRanks: 0 };
      model.observe({ ...report, ms: timeOf(report) * (1 + 0.05 * random.normal()) });
    }
    expect(Math.abs(model.costs.decodeRank - before) / before).toBeLessThan(0.5);
    expect(errorOf(model, createRng(13))).toBeLessThan(0.1);
    // And what is not seen becomes unknown, at most as unknown as at the start.
    const [doubtMs, startMs] = [model, new StepTime()].map(
      (one) => one.estimate([0, 0, 0, 128, 0, 0]).doubtMs,
    ) as [number, number];
    expect(doubtMs).toBeGreaterThan(0.2 * startMs);
    expect(doubtMs).toBeLessThanOrEqual(startMs + 1e-9);
  });

  it('never predicts less for more work, whatever it was fed', () => {
    for (let seed = 0; seed < 20; seed++) {
      const model = new StepTime();
      const random = createRng(100 + seed);
      for (let i = 0; i < 200; i++)
        model.observe({ ...randomStep(random), ms: 200 * random.next() });
      const costs = Object.values(model.costs);
      expect(costs.every((cost) => cost >= 0 && Number.isFinite(cost))).toBe(true);
      expect(Number.isFinite(model.estimate([1, 1, 1, 1, 1, 1]).doubtMs)).toBe(true);
    }
  });

  it('ignores reports that are no measurement', () => {
    const model = new StepTime();
    const report = randomStep(createRng(14));
    for (const ms of [0, -1, Number.NaN, Number.POSITIVE_INFINITY])
      model.observe({ ...report, ms });
    model.observe({ ...report, ms: 5, kvCells: Number.NaN });
    expect(model.steps).toBe(0);
  });

  it('continues after a restart as if there had been none', () => {
    const [whole, first] = [new StepTime(), new StepTime()];
    const [a, b] = [createRng(15), createRng(15)];
    train(whole, a, 300);
    train(first, b, 150);
    const second = new StepTime();
    second.restore(JSON.parse(JSON.stringify(first.save())));
    train(second, b, 150);
    const costs = Object.values(whole.costs);
    Object.values(second.costs).forEach((cost, i) => {
      expect(cost).toBeCloseTo(costs[i]!, 9);
    });
  });
});
