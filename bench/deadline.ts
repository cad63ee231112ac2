// `bench deadline`: budgets on the whole gateway over HTTP. Capacity first, by callers that always ask again, without budgets
// and at full ranks; then requests that come when they come (Poisson) at shares of it, of three tiers, four adapters by
// Zipf's law, answers of drawn lengths. One of these loads also with everybody at rank R and at rank 1. Budgets are the
// simulator's, scaled to this machine. The same requests in the simulator, with the step costs that the gateway has learned,
// say which were feasible and what the best in hindsight would have been.

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { openGguf } from '../src/model/gguf.ts';
import { endTokensOf, readVocabulary } from '../src/model/tokenizer.ts';
import { StepTime, savedStepTime } from '../src/router/step-time.ts';
import { type GatewayProcess, startGatewayProcess } from '../test/support/gateway-process.ts';
import { writePeftAdapter } from '../test/support/make-peft-adapter.ts';
import { type Machine, smallMachine, timesAlone } from '../test/support/simulator/machine.ts';
import {
  adapterOfCurve,
  type SimulatedAdapter,
} from '../test/support/simulator/simulated-adapter.ts';
import {
  type Arrival,
  createTraffic,
  smallTiers,
  type Traffic,
  type TrafficTier,
} from '../test/support/simulator/traffic.ts';
import { type Caller, type Heard, sendClosed, sendOpen, type Wish } from './deadline-client.ts';
import { type DeadlineRuns, type Run, summariseDeadline } from './deadline-summary.ts';
import type { WeightMode } from './job.ts';
import { median, type Report } from './measure.ts';
import { readConfig } from './rankgate-side.ts';

export interface DeadlineSizes {
  /** Ranks of the adapters, the most asked for first. */
  readonly ranks: readonly number[];
  readonly loads: readonly number[];
  readonly seconds: number;
  /** Which of the loads has fixed ranks too, and for how long. */
  readonly fixedLoad: number;
  readonly fixedSeconds: number;
  readonly capacitySeconds: number;
  readonly callers: number;
  readonly probes: number;
  readonly neighbourSeconds: number;
  readonly hindsightRounds: number;
}

const fullDeadline: DeadlineSizes = {
  ranks: [64, 16, 64, 16],
  loads: [0.5, 0.8, 0.95, 1.2],
  seconds: 32,
  fixedLoad: 0.95,
  fixedSeconds: 20,
  capacitySeconds: 12,
  callers: 16,
  probes: 5,
  neighbourSeconds: 20,
  hindsightRounds: 20,
};

export interface DeadlineSettings {
  readonly modelPath: string;
  readonly threads: number;
  readonly weights: WeightMode;
}

const tenants = 4;
const [noisyTenant, noisyTimes, neighbourShare] = [`t${tenants - 1}`, 50, 0.15] as const;
const adminKey = 'bench-operator-key';

export async function benchDeadline(
  { modelPath, threads, weights }: DeadlineSettings,
  sizes: DeadlineSizes = fullDeadline,
): Promise<Report> {
  const keys = Array.from({ length: tenants }, (_, i) => `bench-tenant-key-${i}`);
  await using gateway = await startGatewayProcess({
    modelPath,
    // Early answers end by a token that is said again and again, which would be guessed ahead.
    flags: [
      ...['--threads', String(threads), '--weights', weights, '--log', 'none'],
      ...['--speculation', 'off'],
    ],
    environment: { RANKGATE_API_KEYS: keys.join(), RANKGATE_ADMIN_KEYS: adminKey },
  });
  const adapters = await addAdapters(gateway, modelPath, sizes.ranks);
  const caller = callerOf(gateway, modelPath, keys);
  const measured = await new Bench(caller, adapters, sizes).run();
  await gateway.stop('SIGTERM'); // it writes what it has learned
  const machine = learnedMachine(join(gateway.dataDir, 'latency.json'));
  const report = await summariseDeadline({ ...measured, adapters, machine }, sizes.hindsightRounds);
  return { ...report, sides: { gateway: `${weights}, ${threads} threads` } };
}

class Bench {
  readonly #caller: Caller;
  readonly #sizes: DeadlineSizes;
  readonly #rankMaxes: ReadonlyMap<string, number>;

  constructor(caller: Caller, adapters: readonly SimulatedAdapter[], sizes: DeadlineSizes) {
    this.#caller = caller;
    this.#sizes = sizes;
    this.#rankMaxes = new Map(adapters.map(({ name, rankMax }) => [name, rankMax]));
  }

  async run(): Promise<Omit<DeadlineRuns, 'adapters' | 'machine'>> {
    const { loads, seconds, fixedLoad, fixedSeconds, capacitySeconds } = this.#sizes;
    await this.#capacity(0.5 * capacitySeconds, 64); // loads adapters and teaches the router: not counted
    const capacity = await this.#capacity(capacitySeconds, 64);
    const capacityRank1 = await this.#capacity(0.5 * capacitySeconds, 1);
    const scale = await this.#scale();
    const tiers = smallTiers.map((tier) => scaled(tier, scale));
    const traffic = (load: number, span: number): Arrival[] =>
      this.#traffic({
        seed: Math.round(100 * load),
        seconds: span,
        tiers,
        perSecond: load * capacity,
      });
    const neighbours = await this.#neighbours(capacity, tiers);
    const runs: Run[] = [];
    for (const load of loads) {
      const arrivals = traffic(load, seconds);
      const heard = await sendOpen(this.#caller, arrivals, this.#wish());
      runs.push({ name: 'guarded', load, arrivals, heard });
    }
    for (const [name, rank] of [
      ['rank R', 64],
      ['rank 1', 1],
    ] as const) {
      const arrivals = traffic(fixedLoad, fixedSeconds);
      const heard = await sendOpen(this.#caller, arrivals, this.#wish(rank));
      runs.push({ name, load: fixedLoad, arrivals, heard });
    }
    return { capacity, capacityRank1, scale, endsEarly, runs, neighbours };
  }

  #traffic(part: Pick<Traffic, 'seed' | 'seconds' | 'perSecond' | 'tiers'>): Arrival[] {
    return createTraffic({
      ...{ shape: 'steady', adapters: this.#rankMaxes.size, zipf: 1.1, tenants, ...part },
      ...{ promptTokens: [8, 128], tokensMax: [8, 16, 24, 32, 48, 64], endsEarly },
    });
  }

  #wish(rank: number | null = null, hasBudget = true): Wish {
    const own = (adapter: string): number => Math.min(rank!, this.#rankMaxes.get(adapter)!);
    const signal = AbortSignal.timeout(waitMsMax);
    return { rankOf: rank === null ? null : own, hasBudget, signal };
  }

  /** Requests a second with callers enough, at this rank: tokens of the second part of the time, over those of a request. */
  async #capacity(seconds: number, rank: number): Promise<number> {
    const { callers } = this.#sizes;
    const arrivals = this.#traffic({ seed: rank, seconds, perSecond: 100, tiers: smallTiers });
    const [startMs, endMs] = [0.25, 1].map((share) => performance.now() + 1000 * seconds * share);
    const wish = this.#wish(rank, false);
    const span = { callers, untilMs: endMs! };
    const heard = await sendClosed(this.#caller, arrivals, wish, span);
    const answered = heard.filter(({ outcome }) => outcome === 'answered');
    const tokens = answered.reduce((sum, one) => sum + tokensWithin(one, startMs!, endMs!), 0);
    // Of those drawn, not of those answered: the long ones are less likely to be.
    const mean = arrivals.reduce((sum, one) => sum + one.answerTokens, 0) / arrivals.length;
    return (1000 * tokens) / (endMs! - startMs!) / mean;
  }

  /** Time of a token alone at rank 1, as a multiple of what the simulator's machine takes. */
  async #scale(): Promise<number> {
    const heard = await this.#alone(this.#sizes.probes);
    const paces = heard.map(({ totalMs, ttftMs, tokens }) => (totalMs - ttftMs) / (tokens - 1));
    return median(paces) / timesAlone(smallMachine, probeSize, 1).perTokenMs;
  }

  /** So many answers at rank 1, one after another. */
  async #alone(count: number): Promise<Heard[]> {
    const [first] = this.#traffic({ seed: 1, seconds: 60, perSecond: 10, tiers: smallTiers });
    const arrivals = new Array<Arrival>(count).fill({ ...first!, ...probeSize });
    const span = { callers: 1, untilMs: Number.POSITIVE_INFINITY };
    return await sendClosed(this.#caller, arrivals, this.#wish(1, false), span);
  }

  /** The same requests of three tenants, beside a fourth that asks as often as one of them, and 50 times as often. */
  async #neighbours(
    capacity: number,
    tiers: readonly TrafficTier[],
  ): Promise<DeadlineRuns['neighbours']> {
    const part = { seconds: this.#sizes.neighbourSeconds, tiers };
    const share = neighbourShare * capacity;
    const quiet = this.#traffic({ ...part, seed: 1, perSecond: tenants * share }).filter(
      ({ tenant }) => tenant !== noisyTenant,
    );
    const run = async (times: number): Promise<Heard[]> => {
      const noise = this.#traffic({ ...part, seed: 2, perSecond: times * share });
      const stop = new AbortController();
      const wish = this.#wish();
      const noisy = sendOpen(
        this.#caller,
        noise.map((one) => ({ ...one, tenant: noisyTenant })),
        { ...wish, signal: AbortSignal.any([wish.signal, stop.signal]) },
      );
      const heard = await sendOpen(this.#caller, quiet, wish);
      stop.abort();
      await noisy;
      await this.#alone(1); // nothing of the flood is left
      return heard;
    };
    return { arrivals: quiet, alone: await run(1), beside: await run(noisyTimes) };
  }
}

/** Of answers. The router cannot know it, and a time that hangs on it is not its error: with many of them the errors would say
 *  more about the lengths than about the predictions. */
const endsEarly = 0.05;
const waitMsMax = 180_000;
const probeSize = { promptTokens: 16, tokensMax: 32, answerTokens: 32 };

function scaled(tier: TrafficTier, by: number): TrafficTier {
  const times = (span: readonly [number, number]): readonly [number, number] => [
    by * span[0],
    by * span[1],
  ];
  const { firstMs, perTokenMs } = tier;
  return { ...tier, firstMs: firstMs && times(firstMs), perTokenMs: times(perTokenMs) };
}

/** As if its tokens had come evenly from the first to the last. */
function tokensWithin(heard: Heard, startMs: number, endMs: number): number {
  const { tokens, totalMs, ttftMs, endedMs } = heard;
  const firstMs = endedMs - (totalMs - ttftMs);
  const inside = Math.min(endMs, endedMs) - Math.max(startMs, firstMs);
  return inside <= 0 ? 0 : (tokens * inside) / (endedMs - firstMs);
}

function callerOf(gateway: GatewayProcess, modelPath: string, keys: readonly string[]): Caller {
  using file = openGguf(modelPath);
  const vocabulary = readVocabulary(file.metadata);
  return {
    post: (path, body, headers, signal) =>
      gateway.fetch(path, {
        ...{ method: 'POST', signal, body: JSON.stringify(body) },
        headers: { 'content-type': 'application/json', ...headers },
      }),
    keyOf: (tenant) => keys[Number(tenant.slice(1))]!,
    endToken: endTokensOf(vocabulary)[0]!,
    vocabSize: vocabulary.tokens.length,
  };
}

async function addAdapters(
  gateway: GatewayProcess,
  modelPath: string,
  ranks: readonly number[],
): Promise<SimulatedAdapter[]> {
  const shape = readConfig(modelPath);
  const added: SimulatedAdapter[] = [];
  for (const [index, rank] of ranks.entries()) {
    const name = `a${index}`;
    writePeftAdapter(join(gateway.adaptersRoot, name), {
      ...{ shape, seed: 1 + index, rank, alpha: rank, gain: 0.1, fall: 'root' },
    });
    const answer = await gateway.post(
      '/v1/adapters',
      { source: name, name, accept_base_name: 'HuggingFaceTB/SmolLM2-135M-Instruct' },
      { authorization: `Bearer ${adminKey}` },
    );
    if (!answer.ok) throw new Error(await answer.text());
    const { rank_curve } = (await answer.json()) as { rank_curve: number[] };
    added.push(adapterOfCurve(name, rank_curve));
  }
  return added;
}

/** The gateway's limits are the simulator's: both have the configuration's defaults. */
function learnedMachine(path: string): Machine {
  const router = JSON.parse(readFileSync(path, 'utf8')) as { latency: string };
  const { stepTime } = JSON.parse(router.latency) as { stepTime: unknown };
  const learned = new StepTime();
  learned.restore(savedStepTime.parse(stepTime));
  return { ...smallMachine, cost: learned.costs, noise: learned.relativeSigma };
}
