import { describe, expect, it } from 'vitest';
import type { StepReport } from '../../../src/engine/messages.ts';
import { LatencyModel } from '../../../src/router/latency-model.ts';
import type { RouteInput } from '../../../src/router/policy.ts';
import { createRng } from '../../support/random.ts';
import { routedAdapter } from '../../support/routed-adapter.ts';

const chunk = 64;
const idle = { decodeRows: 0, decodeRanks: 0, waiting: 0, waitingPromptTokens: 0, kvCells: 0 };

function stepMs(report: Omit<StepReport, 'ms'>): number {
  const { decodeRows, prefillTokens, decodeRanks, prefillRanks, kvCells } = report;
  return (
    8 +
    1.5 * decodeRows +
    2 * prefillTokens +
    0.2 * decodeRanks +
    0.02 * prefillRanks +
    0.001 * kvCells
  );
}

/** Without noise, over every kind of step: what is left is how the model adds steps up. */
function trainedModel(): LatencyModel {
  const model = new LatencyModel({
    identity: { baseHash: '', backend: '', threads: 1 },
    prefillTokensMax: chunk,
    rowsMax: 32,
  });
  const rng = createRng(1);
  for (let i = 0; i < 4000; i++) {
    const prefillTokens = rng.next() < 0.5 ? rng.below(chunk + 1) : 0;
    const decodeRows = rng.below(12);
    const report = {
      decodeRows,
      prefillTokens,
      decodeRanks: rng.below(12 * 32),
      prefillRanks: prefillTokens * rng.below(32),
      kvCells: rng.below(20_000),
    };
    model.observe({ ...report, ms: stepMs(report) });
  }
  return model;
}

function inputOf(load: Partial<RouteInput['load']>, tokensMax = 101): RouteInput {
  return {
    budget: {
      totalMs: null,
      ttftMs: null,
      perTokenMs: null,
      strict: false,
      rank: null,
      rankMin: 0,
      priority: 5,
    },
    promptTokens: 100,
    tokensMax,
    adapter: { ...routedAdapter(16), name: 'a' },
    system: null,
    load: { ...idle, ...load },
  };
}

describe('a prediction', () => {
  const model = trainedModel();

  it('of the first token adds up prefill steps, each with the rows that decode beside it', () => {
    // Two steps of prompt at rank 16 beside three rows of rank 8 that attend to 19,000 cells, and half of the one under way.
    const beside = { decodeRows: 3, decodeRanks: 24, kvCells: 19_000 };
    const wanted =
      stepMs({ ...noWork, ...beside }) / 2 +
      stepMs({
        ...beside,
        prefillTokens: 64,
        prefillRanks: 64 * 16,
        kvCells: 19_000 + (64 * 65) / 2,
      }) +
      stepMs({
        ...beside,
        prefillTokens: 36,
        prefillRanks: 36 * 16,
        kvCells: 19_000 + 36 * 64 + (36 * 37) / 2,
      });
    const { ttftMs } = model.predict(inputOf(beside), 16)!;
    expect(Math.abs(ttftMs - wanted) / wanted).toBeLessThan(0.01);
  });

  it('of the first token waits for all that came before', () => {
    const alone = model.predict(inputOf({}), 4)!;
    const one = model.predict(inputOf({ waiting: 2, waitingPromptTokens: 640 }), 4)!;
    const two = model.predict(inputOf({ waiting: 2, waitingPromptTokens: 1280 }), 4)!;
    // Ten more steps of 64 tokens: ranks unknown, cells of two prompts.
    const added = two.ttftMs - one.ttftMs;
    const wanted = 10 * stepMs({ ...noWork, prefillTokens: 64 });
    const cells = added - wanted;
    expect(cells).toBeGreaterThan(0.001 * 640 ** 2 * 0.5);
    expect(cells).toBeLessThan(0.001 * 640 ** 2);
    // Of the first 640 the step under way has some, half as long as the others on average.
    expect(one.ttftMs - alone.ttftMs).toBeLessThan(0.98 * added);
    expect(one.ttftMs - alone.ttftMs).toBeGreaterThan(0.8 * wanted);
  });

  it('of the pace counts this row, those that run and those that wait', () => {
    const load = {
      decodeRows: 2,
      decodeRanks: 16,
      waiting: 3,
      waitingPromptTokens: 0,
      kvCells: 500,
    };
    const { perTokenMs, ttftMs, totalMs } = model.predict(inputOf(load), 4)!;
    const wanted = stepMs({
      ...noWork,
      decodeRows: 6,
      decodeRanks: 16 + 3 * 8 + 4,
      kvCells: 500 + 100 + 50.5,
    });
    expect(Math.abs(perTokenMs - wanted) / wanted).toBeLessThan(0.01);
    expect(totalMs).toBeCloseTo(ttftMs + 100 * perTokenMs, 6);
  });

  it('waits for answers to end where every row is taken, and shares a step with no more rows than it has', () => {
    const held = trainedModel();
    const answer = {
      adapter: 'b',
      tokensMax: 90,
      completionTokens: 90,
      load: idle,
      prediction: null,
    };
    for (let i = 0; i < 200; i++) held.settle({ ...answer, ttftMs: 10, totalMs: 1610 });
    const full = inputOf({ decodeRows: 32, decodeRanks: 256, waiting: 3 });
    const [after, before] = [held.predict(full, 4)!, model.predict(full, 4)!];
    expect(after.ttftMs - before.ttftMs).toBeCloseTo((1600 * 4) / 32, 0);
    expect(after.ttftSigmaMs).toBeGreaterThan(before.ttftSigmaMs);
    const roomy = inputOf({ decodeRows: 28, decodeRanks: 224, waiting: 3 });
    expect(held.predict(roomy, 4)!.ttftMs).toBeCloseTo(model.predict(roomy, 4)!.ttftMs, 6);
    const wanted = stepMs({ ...noWork, decodeRows: 32, decodeRanks: 31 * 8 + 4, kvCells: 150.5 });
    expect(Math.abs(before.perTokenMs - wanted) / wanted).toBeLessThan(0.01);
  });

  it('learns the length of answers, and is less sure when lengths vary', () => {
    const [steady, varied] = [trainedModel(), trainedModel()];
    const rng = createRng(2);
    for (let i = 0; i < 200; i++) {
      const answer = { adapter: 'a', tokensMax: 4000, load: idle, ttftMs: 10, totalMs: 1000 };
      steady.settle({ ...answer, completionTokens: 95, prediction: null });
      varied.settle({ ...answer, completionTokens: 10 + rng.below(180), prediction: null });
    }
    const input = inputOf({}, 4000);
    const [one, other] = [steady.predict(input, 4)!, varied.predict(input, 4)!];
    expect(one.totalMs).toBeLessThan(0.05 * model.predict(input, 4)!.totalMs);
    expect(other.sigmaMs / other.totalMs).toBeGreaterThan(1.3 * (one.sigmaMs / one.totalMs));
    // Another adapter has said nothing yet.
    const unknown = { ...input, adapter: { ...input.adapter!, name: 'b' } };
    expect(steady.predict(unknown, 4)!.totalMs).toBeCloseTo(model.predict(unknown, 4)!.totalMs, 6);
  });

  it('learns by how much answers are slower than their steps, and forgets it', () => {
    const one = trainedModel();
    const input = inputOf({});
    const steps = model.predict(input, 4)!;
    const settle = (factor: number): void => {
      const answer = { adapter: 'a', tokensMax: 101, completionTokens: 101, load: idle };
      const [ttftMs, paceMs] = [2 * factor * steps.ttftMs, factor * steps.perTokenMs];
      const totalMs = ttftMs + 100 * paceMs;
      one.settle({ ...answer, ttftMs, totalMs, prediction: one.predict(input, 4)! });
    };
    for (let i = 0; i < 200; i++) settle(1.5);
    const slow = one.predict(input, 4)!;
    expect(slow.ttftMs / steps.ttftMs).toBeCloseTo(3, 1);
    expect(slow.perTokenMs / steps.perTokenMs).toBeCloseTo(1.5, 1);
    expect(slow.totalMs).toBeCloseTo(slow.ttftMs + 100 * slow.perTokenMs, 6);
    for (let i = 0; i < 400; i++) settle(0.5);
    const fast = one.predict(input, 4)!;
    expect(fast.ttftMs / steps.ttftMs).toBeCloseTo(1, 1);
    expect(fast.perTokenMs / steps.perTokenMs).toBeCloseTo(0.5, 1);
    // A pause of the machine is no speed, and nothing is beyond four times.
    for (let i = 0; i < 400; i++) settle(1000);
    expect(one.predict(input, 4)!.ttftMs / steps.ttftMs).toBeLessThanOrEqual(4);
  });

  it('grows less sure when answers come late, and surer when they come as predicted', () => {
    const [late, punctual] = [trainedModel(), trainedModel()];
    const input = inputOf({});
    const before = model.predict(input, 4)!;
    for (let i = 0; i < 100; i++) {
      const answer = { adapter: 'a', tokensMax: 101, completionTokens: 101, load: idle };
      const { ttftMs, totalMs } = before;
      late.settle({ ...answer, ttftMs: 1.6 * ttftMs, totalMs: 1.6 * totalMs, prediction: before });
      punctual.settle({
        ...answer,
        ttftMs: 1.02 * ttftMs,
        totalMs: 1.02 * totalMs,
        prediction: before,
      });
    }
    expect(late.predict(input, 4)!.sigmaMs).toBeGreaterThan(1.8 * before.sigmaMs);
    expect(late.predict(input, 4)!.ttftSigmaMs).toBeGreaterThan(1.8 * before.ttftSigmaMs);
    expect(late.predict(input, 4)!.perTokenSigmaMs).toBeGreaterThan(1.8 * before.perTokenSigmaMs);
    expect(punctual.predict(input, 4)!.sigmaMs).toBeLessThan(0.5 * before.sigmaMs);
  });
});

const noWork = { decodeRows: 0, prefillTokens: 0, decodeRanks: 0, prefillRanks: 0, kvCells: 0 };
