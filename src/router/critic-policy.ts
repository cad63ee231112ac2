// Chooses inside the safe set what a critic holds to be worth most in the long run: where requests wait for each other, a
// rank that is cheap now is time for those that come after. A decision's consequences are its own outcome (in time: its score,
// or else what the rank curve keeps) and then whatever the next decision leads to.

import { z } from 'zod';
import { Critic, type CriticOptions, savedCritic } from './critic.ts';
import type { Outcome, Plan, Predict, RankPolicy, RouteInput } from './policy.ts';
import { energy, safePlans, slackOf } from './rank-policy.ts';
import { parseSaved } from './saved-state.ts';

const exploredShare = 0.05; // guess
const inputs = 6;
const slackMax = 8; // in σ: more is all the same

interface Decision {
  readonly x: Float64Array; // [inputs]
  next: Float64Array | null; // [inputs]
  reward: number | null;
}

const savedPolicy = z.strictObject({
  format: z.literal('rankgate-critic/1'),
  critic: savedCritic,
});

export class CriticPolicy implements RankPolicy {
  readonly name = 'critic';
  readonly #critic: Critic;
  /** Goes with the plans: an answer that never ends takes its decision along. */
  readonly #decisions: WeakMap<Plan, Decision> = new WeakMap();
  #last: Decision | null = null;

  constructor(options: CriticOptions) {
    this.#critic = new Critic(inputs, options);
  }

  choose(input: RouteInput, predict: Predict, draw: () => number): Plan {
    const plans = safePlans(input, predict);
    if (plans.length === 1) return plans[0];
    const features = plans.map((plan) => featuresOf(input, plan));
    const values = features.map((x) => this.#critic.value(x));
    const best = values.indexOf(Math.max(...values));
    const index = draw() < exploredShare ? Math.floor(draw() * plans.length) : best;
    const x = features[index]!;
    if (this.#last !== null) {
      this.#last.next = x;
      this.#learn(this.#last);
    }
    this.#last = { x, next: null, reward: null };
    const plan = plans[index]!;
    this.#decisions.set(plan, this.#last);
    return plan;
  }

  settle({ input, plan, met, score }: Outcome): void {
    const decision = this.#decisions.get(plan);
    if (decision === undefined || met === null || decision.reward !== null) return;
    decision.reward = met ? (score ?? energy(input.adapter?.rankCurve ?? [], plan.rank)) : 0;
    this.#learn(decision);
  }

  #learn({ x, reward, next }: Decision): void {
    if (reward !== null && next !== null) this.#critic.learn(x, reward, next);
  }

  save(): string {
    return JSON.stringify({ format: 'rankgate-critic/1', critic: this.#critic.save() });
  }

  restore(text: string): boolean {
    const saved = parseSaved(text, savedPolicy);
    return saved !== null && this.#critic.restore(saved.critic);
  }
}

/** What is seen at a decision, each 0…1, and what it would be. */
function featuresOf(input: RouteInput, plan: Plan): Float64Array {
  const { adapter, load } = input;
  const few = (count: number): number => Math.min(1, Math.log2(1 + count) / 8);
  return Float64Array.of(
    1,
    energy(adapter?.rankCurve ?? [], plan.rank),
    few(plan.ranks),
    few(load.decodeRows),
    few(load.waiting),
    Math.min(slackMax, slackOf(input, plan)) / slackMax,
  );
}
