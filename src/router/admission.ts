// Refuses what its caller would rather not have late: a strict budget that not even the smallest allowed rank meets. Says
// when to come back only when waiting would help, which is when the same request would fit an idle machine.

import { GatewayError } from '../errors.ts';
import type { Plan, Predict, RouteInput } from './policy.ts';
import { fits } from './rank-policy.ts';

const idle: RouteInput['load'] = {
  decodeRows: 0,
  decodeRanks: 0,
  waiting: 0,
  waitingPromptTokens: 0,
  kvCells: 0,
};
const retryAfterSMax = 60;

/** Throws DEADLINE_TOO_SHORT. Pure. */
export function admit(input: RouteInput, plan: Plan, predict: Predict): void {
  if (plan.reason !== 'infeasible' || !input.budget.strict) return;
  const predicted = Math.ceil(plan.predictedMs ?? 0);
  const alone = predict({ ...input, load: idle }, plan.rank);
  const busy = predict(input, plan.rank);
  const name = input.adapter === null ? 'the base model' : `rank ${plan.rank}`;
  if (alone === null || busy === null || !fits(input.budget, alone)) {
    throw new GatewayError(
      'DEADLINE_TOO_SHORT',
      `the budget is strict and ${name} is predicted to take ${predicted} ms, also without other load`,
      { param: 'latency' },
    );
  }
  const backlogS = Math.ceil((busy.totalMs - alone.totalMs) / 1000);
  throw new GatewayError(
    'DEADLINE_TOO_SHORT',
    `the budget is strict and ${name} is predicted to take ${predicted} ms under the load of now`,
    { param: 'latency', retryAfterS: Math.min(retryAfterSMax, Math.max(1, backlogS)) },
  );
}
