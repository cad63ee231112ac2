// What the server calls: a latency model, and a policy that chooses by it. Refuses what its caller would rather not have
// late. No clock and no I/O.

import { z } from 'zod';
import { GatewayError } from '../errors.ts';
import { meets, noTime } from './budget.ts';
import { LatencyModel, type LatencyModelOptions } from './latency-model.ts';
import type { Outcome, Plan, Predict, RankPolicy, RouteInput } from './policy.ts';
import { fits } from './rank-policy.ts';
import { parseSaved } from './saved-state.ts';

export interface RouterOptions extends LatencyModelOptions {
  readonly policy: RankPolicy;
  /** Uniform in [0, 1). */
  readonly draw: () => number;
}

const savedRouter = z.strictObject({
  format: z.literal('rankgate-router/1'),
  latency: z.string(),
  policy: z.strictObject({ name: z.string(), state: z.string() }),
});

export class Router extends LatencyModel {
  readonly #policy: RankPolicy;
  readonly #draw: () => number;

  constructor(options: RouterOptions) {
    super(options);
    this.#policy = options.policy;
    this.#draw = options.draw;
  }

  /** Throws DEADLINE_TOO_SHORT for a strict budget, INVALID_BUDGET for a fixed rank that the adapter has not. */
  route(input: RouteInput): Plan {
    const { budget } = input;
    if (budget.strict && !meets(budget, noTime)) {
      const message = 'the budget is strict and was spent before the work could begin';
      throw new GatewayError('DEADLINE_TOO_SHORT', message, { param: 'latency' });
    }
    const predict: Predict = (what, ranks) => this.predict(what, ranks);
    const plan = this.#policy.choose(input, predict, this.#draw);
    if (plan.reason === 'infeasible' && budget.strict) throw tooShort(input, plan, predict);
    return plan;
  }

  /** Tells the policy what became of a plan, or how good its answer was. */
  judge(outcome: Outcome): void {
    this.#policy.settle(outcome);
  }

  /** For Retry-After: when what waits now should have found room. */
  retryAfterS(load: RouteInput['load']): number {
    return wholeSeconds(this.drainMs(load));
  }

  override save(): string {
    const { name } = this.#policy;
    const state: z.infer<typeof savedRouter> = {
      format: 'rankgate-router/1',
      latency: super.save(),
      policy: { name, state: this.#policy.save() },
    };
    return JSON.stringify(state);
  }

  /** True when the latencies are known again; another policy starts anew, as does one whose own state is damaged. */
  override restore(text: string): boolean {
    const saved = parseSaved(text, savedRouter);
    if (saved === null || !super.restore(saved.latency)) return false;
    if (saved.policy.name === this.#policy.name) this.#policy.restore(saved.policy.state);
    return true;
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

function wholeSeconds(ms: number): number {
  return Math.min(retryAfterSMax, Math.max(1, Math.ceil(ms / 1000)));
}

/** Says when to come back only when waiting would help, which is when the same request would fit an idle machine. */
function tooShort(input: RouteInput, plan: Plan, predict: Predict): GatewayError {
  const busyMs = plan.prediction?.totalMs ?? 0;
  const alone = predict({ ...input, load: idle }, plan.ranks);
  const helps = alone !== null && fits(input.budget, alone);
  const name = input.adapter === null ? 'the base model' : `rank ${plan.rank}`;
  const when = helps ? 'under the load of now' : 'also without other load';
  return new GatewayError(
    'DEADLINE_TOO_SHORT',
    `the budget is strict and ${name} is predicted to take ${Math.ceil(busyMs)} ms, ${when}`,
    { param: 'latency', ...(helps ? { retryAfterS: wholeSeconds(busyMs - alone.totalMs) } : {}) },
  );
}
