// An EngineLoop over the fake stepper, with everything that a test may want to look at or to break.

import { isBlendKey } from '../../src/adapters/blend-key.ts';
import { createResidency, type Residency, type ResidentKey } from '../../src/adapters/residency.ts';
import { EngineLoop, type LoopLimits } from '../../src/engine/engine-loop.ts';
import { KvPool } from '../../src/engine/kv-pool.ts';
import {
  type BaseInfo,
  type EngineEvent,
  type FromEngine,
  type GeneratedToken,
  type GenerateRequest,
  noUrgency,
  type RankChange,
  type Sampling,
  type StepCosts,
  type StepReport,
} from '../../src/engine/messages.ts';
import { PrefixCache } from '../../src/engine/prefix-cache.ts';
import type { SpeculationWish } from '../../src/engine/speculation.ts';
import { GatewayError } from '../../src/errors.ts';
import type { Stepper } from '../../src/model/stepper.ts';
import {
  FakeStepper,
  fakeBaseHash,
  fakeBaseInfo,
  fakeBytesOf,
  fakePacked,
} from './fake-stepper.ts';
import { createManualClock, type ManualClock } from './manual-clock.ts';
import { stepMs } from './simulator/machine.ts';

export const greedy: Sampling = {
  temperature: 0,
  topP: 1,
  topK: 0,
  minP: 0,
  seed: 1,
  presencePenalty: 0,
  frequencyPenalty: 0,
  repetitionPenalty: 1,
  logitBias: [],
};

export function makeRequest(over: Partial<GenerateRequest> & { id: string }): GenerateRequest {
  return {
    tokens: Int32Array.of(1, 2, 3),
    tokensMax: 8,
    sampling: greedy,
    stop: [],
    topLogprobs: null,
    adapter: null,
    tenant: 'tenant',
    urgency: noUrgency,
    ...over,
  };
}

/** Generation n of the fakes has this rank: 1 to 40, so 1 to 5 pages. */
export function fakeRankOf(key: ResidentKey): number {
  const n = isBlendKey(key) ? key.length : Number.parseInt(key.slice(-6), 16);
  return 1 + ((n * 7) % 40);
}

/** What one request was told. */
export interface Heard {
  readonly events: EngineEvent[];
  failure: { readonly code: string; readonly message: string } | null;
}

export interface HarnessOptions {
  readonly cells?: number;
  readonly pages?: number;
  readonly limits?: Partial<LoopLimits>;
  readonly base?: Partial<BaseInfo>;
  readonly tenantShareMax?: number;
  readonly stepper?: FakeStepper;
  readonly speculation?: SpeculationWish;
  readonly open?: (key: ResidentKey) => Promise<ReturnType<typeof fakePacked>>;
  /** Put something faulty between the loop and what it stands on. */
  readonly wrapStepper?: (stepper: FakeStepper) => Stepper;
  readonly wrapResidency?: (residency: Residency) => Residency;
  readonly createCache?: (options: ConstructorParameters<typeof PrefixCache>[0]) => PrefixCache;
}

export class LoopHarness {
  readonly clock: ManualClock = createManualClock();
  readonly stepper: FakeStepper;
  readonly residency: Residency;
  readonly cache: PrefixCache;
  readonly loop: EngineLoop;
  readonly heard: Map<string, Heard> = new Map();
  readonly reports: StepReport[] = [];
  readonly messages: FromEngine[] = [];
  /** Called at every message, within the tick. */
  onMessage: ((message: FromEngine) => void) | null = null;

  constructor(options: HarnessOptions = {}) {
    const { cells = 1024, pages = 12 } = options;
    this.stepper = options.stepper ?? new FakeStepper({ cells, pages });
    const residency = createResidency({
      stepper: this.stepper,
      baseHash: fakeBaseHash,
      open:
        options.open ??
        ((generation) => Promise.resolve(fakePacked(generation, fakeRankOf(generation)))),
    });
    this.residency = options.wrapResidency?.(residency) ?? residency;
    const cacheOptions = {
      pool: new KvPool(this.stepper.cells),
      tenantShareMax: options.tenantShareMax ?? 0.5,
    };
    this.cache = options.createCache?.(cacheOptions) ?? new PrefixCache(cacheOptions);
    this.loop = new EngineLoop({
      base: fakeBaseInfo(options.base),
      stepper: options.wrapStepper?.(this.stepper) ?? this.stepper,
      residency: this.residency,
      cache: this.cache,
      watch: { threads: 1, begin() {}, end() {} },
      speculation: options.speculation ?? 'auto',
      limits: {
        ...{ waitingMax: 1000, waitingTokensMax: 1e6, waitingMsMax: 1e9, prefillTokensMax: 32 },
        ...options.limits,
      },
      bytesOf: fakeBytesOf,
      clock: this.clock,
      emit: (message) => this.#hear(message),
    });
  }

  submit(
    request: GenerateRequest,
    generated?: Int32Array,
    rankChanges?: readonly RankChange[],
  ): Heard {
    const heard: Heard = { events: [], failure: null };
    this.heard.set(request.id, heard);
    this.loop.submit(request, generated, rankChanges);
    return heard;
  }

  /** The clock moves by what steps cost from now on. */
  advanceBy(costs: StepCosts): void {
    this.onMessage = (message) => {
      if (message.kind === 'step') this.clock.advance(stepMs(costs, message.report));
    };
  }

  #hear(message: FromEngine): void {
    this.messages.push(message);
    if (message.kind === 'events') {
      for (const { id, event } of message.batch) this.heard.get(id)?.events.push(event);
    } else if (message.kind === 'failed') {
      const { code, message: text } = message;
      const heard = this.heard.get(message.id);
      if (heard !== undefined) heard.failure = { code, message: text };
    } else if (message.kind === 'step') this.reports.push(message.report);
    this.onMessage?.(message);
  }

  /** Lets the loop run until nothing runs or waits; throws when that never comes. */
  async drain(ticksMax = 20_000): Promise<void> {
    for (let tick = 0; tick < ticksMax; tick++) {
      const { running, waiting } = this.loop.stats();
      if (running === 0 && waiting === 0) return;
      await nextTick();
    }
    throw new GatewayError('INTERNAL', `still busy after ${ticksMax} ticks`);
  }

  async ticks(count: number): Promise<void> {
    for (let tick = 0; tick < count; tick++) await nextTick();
  }
}

export function nextTick(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve));
}

export function textOf({ events }: Heard): string {
  return events.map((event) => (event.kind === 'piece' ? event.text : '')).join('');
}

export function tokensOf({ events }: Heard): readonly GeneratedToken[] {
  return events.flatMap((event) => (event.kind === 'piece' ? event.tokens : []));
}

export function idsOf(heard: Heard): number[] {
  return tokensOf(heard).map((one) => one.token);
}

/** Of the rank on the way, as its reader was told. */
export function changesOf({ events }: Heard): RankChange[] {
  const changes: RankChange[] = [];
  let afterTokens = 0;
  for (const event of events) {
    if (event.kind === 'piece') afterTokens += event.tokens.length;
    if (event.kind === 'rank') changes.push({ afterTokens, rank: event.rank });
  }
  return changes;
}
