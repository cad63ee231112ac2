// The gateway's part of a simulation: the product's router plans each request from the load of its moment, as
// server/answer.ts has it do, and learns from steps and answers. Notes what became of each request; one that would end twice
// or not at all is an error.

import type {
  EngineEvent,
  FromEngine,
  GenerateRequest,
  StepCosts,
  Urgency,
} from '../../../src/engine/messages.ts';
import { asGatewayError } from '../../../src/errors.ts';
import { wasMet } from '../../../src/router/budget.ts';
import type { Budget, Plan, RouteInput } from '../../../src/router/policy.ts';
import type { Router } from '../../../src/router/router.ts';
import { useOf } from '../adapter-use.ts';
import { makeRequest } from '../loop-harness.ts';
import type { Contestant, Ended, Scenario } from './scenario.ts';
import { fidelityAt, type SimulatedAdapter } from './simulated-adapter.ts';
import type { SimulatedClock } from './simulated-clock.ts';
import { numberedPrompt } from './simulated-stepper.ts';

export interface SimulatedGatewayOptions {
  readonly scenario: Scenario;
  readonly contestant: Contestant;
  readonly clock: SimulatedClock;
  readonly adapterOf: (name: string) => SimulatedAdapter;
  /** To the engine. */
  readonly send: (request: GenerateRequest) => void;
  readonly sendCosts: (costs: StepCosts) => void;
}

/** Between two messages to the engine of what steps cost. */
const costsMs = 1000;

interface Flying {
  readonly index: number;
  readonly input: RouteInput;
  readonly plan: Plan;
  readonly adapter: SimulatedAdapter | null;
  isStarted: boolean;
  /** Of its next token. */
  rank: number;
  ttftMs: number | null;
  tokens: number;
  rankSum: number;
  fidelitySum: number;
}

export class SimulatedGateway {
  /** Messages heard. */
  messages = 0;
  readonly #options: SimulatedGatewayOptions;
  readonly #router: Router;
  readonly #flying: Map<string, Flying> = new Map();
  readonly #ended: Array<Ended | undefined>;
  #costsSentMs: number = Number.NEGATIVE_INFINITY;
  readonly #load = {
    decodeRows: 0,
    decodeRanks: 0,
    waiting: 0,
    waitingPromptTokens: 0,
    kvCells: 0,
  };

  constructor(options: SimulatedGatewayOptions) {
    this.#options = options;
    const { scenario, contestant } = options;
    this.#router = contestant.createRouter(scenario);
    this.#ended = new Array<undefined>(scenario.arrivals.length);
  }

  /** Throws unless every request has ended. */
  get ended(): readonly Ended[] {
    return this.#ended.map((one, index) => {
      if (one === undefined) throw new Error(`request ${index} has no end`);
      return one;
    });
  }

  /** The next request comes, now. */
  arrive(index: number): void {
    const { scenario, contestant, adapterOf, send } = this.#options;
    const arrival = scenario.arrivals[index]!;
    const { promptTokens, tokensMax, tenant } = arrival;
    const adapter = arrival.adapter === null ? null : adapterOf(arrival.adapter);
    const rank = adapter === null ? null : contestant.rankOf(index, adapter);
    const input: RouteInput = {
      budget: { ...arrival.budget, rank },
      ...{ promptTokens, tokensMax, adapter: adapter?.routed ?? null, system: null },
      load: { ...this.#load },
    };
    let plan: Plan;
    try {
      plan = this.#router.route(input);
    } catch (error) {
      this.#end(index, { ...refused, outcome: asGatewayError(error).code });
      return;
    }
    const id = String(index);
    this.#flying.set(id, {
      ...{ index, input, plan, adapter, isStarted: false, ttftMs: null },
      ...{ rank: plan.rank, tokens: 0, rankSum: 0, fidelitySum: 0 },
    });
    this.#load.waiting += 1;
    this.#load.waitingPromptTokens += promptTokens;
    send(
      makeRequest({
        ...{ id, tokensMax, tenant, tokens: numberedPrompt(index, promptTokens) },
        adapter: adapter === null ? null : useOf(adapter.generation, plan.rank),
        urgency: urgencyOf(input.budget),
        tokensLikely: this.#router.tokensLikely(input),
      }),
    );
  }

  hear(message: FromEngine): void {
    this.messages += 1;
    switch (message.kind) {
      case 'events':
        for (const { id, event } of message.batch) this.#note(id, event);
        break;
      case 'failed': {
        const { index, plan, ttftMs, totalMs, tokens } = this.#leave(message.id);
        this.#end(index, { ...refused, plan, ttftMs, totalMs, tokens, outcome: message.code });
        break;
      }
      case 'step':
        this.#router.observe(message.report);
        this.#sendCosts();
        break;
      case 'stats':
        break;
      default:
        throw new Error(`the loop said ${message.kind}`);
    }
  }

  /** As main.ts does. */
  #sendCosts(): void {
    const nowMs = this.#options.clock.nowMs();
    if (nowMs - this.#costsSentMs < costsMs) return;
    const { costs } = this.#router;
    if (costs === null) return;
    this.#costsSentMs = nowMs;
    this.#options.sendCosts(costs);
  }

  #note(id: string, event: EngineEvent): void {
    const flying = this.#flying.get(id);
    if (flying === undefined) throw new Error(`request ${id} has ended, and now ${event.kind}`);
    if (!flying.isStarted && event.kind === 'piece') this.#start(flying); // as server/in-flight.ts counts
    if (event.kind === 'rank') flying.rank = event.rank;
    if (event.kind === 'piece') {
      const { rank, adapter } = flying;
      const tokens = event.tokens.length;
      flying.ttftMs ??= this.#sinceArrival(flying);
      flying.tokens += tokens;
      this.#load.kvCells += tokens;
      flying.rankSum += tokens * rank;
      flying.fidelitySum += tokens * (adapter === null ? 1 : fidelityAt(adapter, rank));
    } else if (event.kind === 'end') this.#answer(id, event);
  }

  #answer(id: string, event: EngineEvent & { readonly kind: 'end' }): void {
    const { arrivals } = this.#options.scenario;
    const { index, input, plan, tokens, ttftMs, totalMs, rankSum, fidelitySum } = this.#leave(id);
    if (tokens !== arrivals[index]!.answerTokens)
      throw new Error(`request ${id}: ${tokens} tokens`);
    const [rankMean, fidelity] = [rankSum / tokens, fidelitySum / tokens];
    this.#end(index, { plan, outcome: 'answered', tokens, ttftMs, totalMs, rankMean, fidelity });
    this.#learn(input, plan, event);
  }

  /** As server/answer.ts does: from the engine's own times. */
  #learn(input: RouteInput, plan: Plan, end: EngineEvent & { readonly kind: 'end' }): void {
    const { adapter, budget, tokensMax, load } = input;
    const { completionTokens, ttftMs, totalMs } = end;
    const { prediction } = plan;
    this.#router.settle({
      ...{ adapter: adapter?.name ?? null, prediction, tokensMax },
      ...{ completionTokens, load, ttftMs, totalMs },
    });
    const met = wasMet(budget, { totalMs, ttftMs, tokens: completionTokens });
    if (met !== null) this.#router.judge({ input, plan, met, score: null });
  }

  #start(flying: Flying): void {
    flying.isStarted = true;
    this.#load.waiting -= 1;
    this.#load.waitingPromptTokens -= flying.input.promptTokens;
    this.#load.decodeRows += 1;
    this.#load.decodeRanks += flying.plan.ranks;
    this.#load.kvCells += flying.input.promptTokens;
  }

  #leave(id: string): Flying & { readonly ttftMs: number; readonly totalMs: number } {
    const flying = this.#flying.get(id);
    if (flying === undefined) throw new Error(`request ${id} ends twice`);
    this.#flying.delete(id);
    if (!flying.isStarted) this.#start(flying);
    this.#load.decodeRows -= 1;
    this.#load.decodeRanks -= flying.plan.ranks;
    this.#load.kvCells -= flying.input.promptTokens + flying.tokens;
    const totalMs = this.#sinceArrival(flying);
    return { ...flying, totalMs, ttftMs: flying.ttftMs ?? totalMs };
  }

  #end(index: number, ended: Ended): void {
    if (this.#ended[index] !== undefined) throw new Error(`request ${index} ends twice`);
    this.#ended[index] = ended;
  }

  #sinceArrival({ index }: Flying): number {
    return this.#options.clock.nowMs() - this.#options.scenario.arrivals[index]!.atMs;
  }
}

/** As server/answer.ts does. */
function urgencyOf(budget: Budget): Urgency {
  const { totalMs, ttftMs, perTokenMs, priority, rankMin, strict, rank } = budget;
  const rankIsFixed = rank !== null;
  return { deadlineMs: totalMs, ttftMs, perTokenMs, priority, rankMin, rankIsFixed, strict };
}

const refused: Omit<Ended, 'outcome'> = {
  ...{ plan: null, tokens: 0, ttftMs: 0, totalMs: 0, rankMean: 0, fidelity: 0 },
};
