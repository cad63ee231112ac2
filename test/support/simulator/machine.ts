// The machine that is simulated: what a step costs, how far steps scatter, how much fits.

import type { StepCosts, StepWork } from '../../../src/engine/messages.ts';
import { createRng } from '../random.ts';

export interface Machine {
  readonly cost: StepCosts;
  /** Relative deviation of a step's time. */
  readonly noise: number;
  readonly cells: number;
  readonly pages: number;
  readonly tokensMax: number;
  readonly segmentsMax: number;
  readonly prefillTokensMax: number;
  readonly waitingMax: number;
  readonly waitingTokensMax: number;
  /** Until an adapter's file is in memory, and to write one of its pages. */
  readonly adapterReadMs: number;
  readonly pageWriteMs: number;
}

/** Two threads of the machine of docs/benchmarks.md, SmolLM2-135M faithful with native kernels: eight rows 16.1 ms without
 *  adapters, 17.0 at rank 4 and 23.5 at rank 64. One row and the prefill are to that as they are on one thread (docs/log.md);
 *  attention and a page from there too. The read of a file and the noise are guesses. Limits are the configuration's
 *  defaults. */
export const smallMachine: Machine = {
  cost: {
    step: 4,
    decodeRow: 1.5,
    prefillToken: 1.4,
    decodeRank: 0.0145,
    prefillRank: 0.0035,
    kvCell: 0.000_75,
  },
  noise: 0.05,
  cells: 16_384,
  pages: 64,
  tokensMax: 256,
  segmentsMax: 32,
  prefillTokensMax: 224,
  waitingMax: 256,
  waitingTokensMax: 262_144,
  adapterReadMs: 5,
  pageWriteMs: 1.2,
};

/** The same without native kernels, at commit f3cde16, where ranks are dear: 1 stream 95 tokens/s; eight rows 28 ms without
 *  adapters and 95 ms at rank 64; prefill 406 tokens/s; the prefill of a rank is a guess. */
export const dearMachine: Machine = {
  ...smallMachine,
  cost: {
    step: 8,
    decodeRow: 2.5,
    prefillToken: 2.5,
    decodeRank: 0.13,
    prefillRank: 0.01,
    kvCell: 0.000_75,
  },
};

/** Nobody's: sizes and costs with which so many requests a second are a load. All of it is made up. */
export function largeMachine(perSecond: number): Machine {
  const scale = perSecond / 1000;
  return {
    cost: {
      step: 4,
      decodeRow: 0.005 / scale,
      prefillToken: 0.001 / scale,
      decodeRank: 0.0002 / scale,
      prefillRank: 0.000_01 / scale,
      kvCell: 0.000_000_2 / scale,
    },
    noise: 0.05,
    cells: 65_536 * scale,
    pages: 8192,
    tokensMax: 4096 * scale,
    segmentsMax: 512 * scale,
    prefillTokensMax: 2048 * scale,
    waitingMax: 10_000,
    waitingTokensMax: 2 ** 24,
    adapterReadMs: 1,
    pageWriteMs: 0.02,
  };
}

export function stepMs(cost: StepCosts, work: StepWork): number {
  return (
    cost.step +
    cost.decodeRow * work.decodeRows +
    cost.prefillToken * work.prefillTokens +
    cost.decodeRank * work.decodeRanks +
    cost.prefillRank * work.prefillRanks +
    cost.kvCell * work.kvCells
  );
}

const noiseSlotMs = 5;

/** What a step's time is multiplied with when it begins at `nowMs`; its mean is 1. A function of the time and not of the
 *  step's number: whatever policy runs meets the same machine, and two runs that differed once agree again once idle. */
export function noiseAt({ noise }: Machine, seed: number, nowMs: number): number {
  if (noise === 0) return 1;
  const slot = Math.floor(nowMs / noiseSlotMs);
  const rng = createRng(Math.imul(seed ^ slot, 0x9e37_79b1) ^ (slot >>> 16));
  return Math.exp(noise * rng.normal() - (noise * noise) / 2);
}

/** Of a request. */
export interface RequestSize {
  readonly promptTokens: number;
  readonly tokensMax: number;
  /** At most tokensMax; the end token not counted. */
  readonly answerTokens: number;
}

export interface Times {
  readonly ttftMs: number;
  readonly perTokenMs: number;
  readonly totalMs: number;
}

/** What a request would take at so many ranks, were it alone and its adapter in memory, without noise. */
export function timesAlone(machine: Machine, size: RequestSize, ranks: number): Times {
  const { cost, prefillTokensMax } = machine;
  const { promptTokens, tokensMax, answerTokens } = size;
  const ttftMs =
    Math.ceil(promptTokens / prefillTokensMax) * cost.step +
    promptTokens * (cost.prefillToken + ranks * cost.prefillRank) +
    cost.kvCell * triangle(promptTokens);
  // The token that ends an answer takes a step as well; an answer that reaches its limit has none.
  const steps = Math.min(answerTokens, tokensMax - 1);
  const decodeMs =
    steps * (cost.step + cost.decodeRow + ranks * cost.decodeRank) +
    cost.kvCell * (steps * promptTokens + triangle(steps));
  return {
    ttftMs,
    perTokenMs: decodeMs / Math.max(1, answerTokens - 1),
    totalMs: ttftMs + decodeMs,
  };
}

function triangle(count: number): number {
  return (count * (count + 1)) / 2;
}
