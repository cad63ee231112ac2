// What the server calls: a latency model that also decides. Refuses what its caller would rather not have late. No clock
// and no I/O.

import { GatewayError } from '../errors.ts';
import { LatencyModel } from './latency-model.ts';
import type { Plan, Predict, RouteInput } from './policy.ts';
import { chooseRank, fits } from './rank-policy.ts';

export class Router extends LatencyModel {
  /** Throws DEADLINE_TOO_SHORT for a strict budget, INVALID_BUDGET for a fixed rank that the adapter has not. */
  route(input: RouteInput): Plan {
    const predict: Predict = (what, ranks) => this.predict(what, ranks);
    const plan = chooseRank(input, predict);
    if (plan.reason === 'infeasible' && input.budget.strict) throw tooShort(input, plan, predict);
    return plan;
  }
}

const idle: RouteInput['load'] = {
  decodeRows: 0,
  decodeRanks: 0,
  waiting: 0,
  waitingPromptTokens: 0,
  kvCells: 0,
};
const retryAfterSMax = 60;

/** Says when to come back only when waiting would help, which is when the same request would fit an idle machine. */
function tooShort(input: RouteInput, plan: Plan, predict: Predict): GatewayError {
  const busyMs = plan.prediction?.totalMs ?? 0;
  const alone = predict({ ...input, load: idle }, plan.ranks);
  const helps = alone !== null && fits(input.budget, alone);
  const name = input.adapter === null ? 'the base model' : `rank ${plan.rank}`;
  const when = helps ? 'under the load of now' : 'also without other load';
  const backlogS = helps ? Math.ceil((busyMs - alone.totalMs) / 1000) : 0;
  return new GatewayError(
    'DEADLINE_TOO_SHORT',
    `the budget is strict and ${name} is predicted to take ${Math.ceil(busyMs)} ms, ${when}`,
    {
      param: 'latency',
      ...(helps ? { retryAfterS: Math.min(retryAfterSMax, Math.max(1, backlogS)) } : {}),
    },
  );
}
