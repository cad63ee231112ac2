// Binds the latency model and the rank policy into what the server calls: a plan for a request, and back to the model what
// became of it. No clock and no I/O.

import type { StepReport } from '../engine/messages.ts';
import { admit } from './admission.ts';
import { type FinishedAnswer, LatencyModel, type LatencyModelOptions } from './latency-model.ts';
import type { Plan, Prediction, RankPolicy, RouteInput } from './policy.ts';
import { chooseRank } from './rank-policy.ts';

export interface Outcome extends FinishedAnswer {
  /** The very object that route() returned. */
  readonly plan: Plan;
}

export interface Router {
  /** Throws DEADLINE_TOO_SHORT for a strict budget, INVALID_BUDGET for a fixed rank that the adapter has not. */
  route(input: RouteInput): Plan;
  observe(report: StepReport): void;
  settle(outcome: Outcome): void;
  /** The learned state as JSON; restore() answers false when it is not of this base, backend and thread count. */
  save(): string;
  restore(text: string): boolean;
}

export function createRouter(
  options: LatencyModelOptions,
  policy: RankPolicy = chooseRank,
): Router {
  const model = new LatencyModel(options);
  // Keyed by the plan itself: an entry goes when its request does, so there is nothing to bound or to clean up.
  const predictions = new WeakMap<Plan, Prediction>();
  const predict = (input: RouteInput, rank: number): Prediction | null =>
    model.predict(input, rank);
  return {
    route(input) {
      const plan = policy(input, predict);
      admit(input, plan, predict);
      const prediction = predict(input, plan.rank);
      if (prediction !== null) predictions.set(plan, prediction);
      return plan;
    },
    observe: (report) => model.observe(report),
    settle: (outcome) => model.settle(outcome, predictions.get(outcome.plan) ?? null),
    save: () => model.save(),
    restore: (text) => model.restore(text),
  };
}
