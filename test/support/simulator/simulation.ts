// The product's router and the engine's loop as they are, on a machine that is not there: router/router.ts plans each
// request at its arrival, engine/engine-loop.ts admits, schedules, loads and evicts over a stepper that only takes time. No
// real clock and no real randomness: same scenario and contestant, same result. As in the product the engine hears of a
// request after the step that is under way, and the router of a step once it has ended.
// Not covered: HTTP, text work, prefix sharing (no two prompts begin alike), speculation, an engine that dies.

import type { PackedAdapter } from '../../../src/adapters/pack.ts';
import { createResidency, type ResidentKey } from '../../../src/adapters/residency.ts';
import { EngineLoop } from '../../../src/engine/engine-loop.ts';
import { KvPool } from '../../../src/engine/kv-pool.ts';
import type { GenerateRequest } from '../../../src/engine/messages.ts';
import { PrefixCache } from '../../../src/engine/prefix-cache.ts';
import { fakeBaseHash, fakeBaseInfo, fakePacked } from '../fake-stepper.ts';
import { nextTick } from '../loop-harness.ts';
import type { Contestant, Result, Scenario } from './scenario.ts';
import { createAdapters, type SimulatedAdapter } from './simulated-adapter.ts';
import { SimulatedClock } from './simulated-clock.ts';
import { SimulatedGateway } from './simulated-gateway.ts';
import { endToken, SimulatedStepper } from './simulated-stepper.ts';

export async function simulate(scenario: Scenario, contestant: Contestant): Promise<Result> {
  const simulation = new Simulation(scenario, contestant);
  return await simulation.run();
}

const word = Uint8Array.of(0x61);

class Simulation {
  readonly #scenario: Scenario;
  readonly #contestant: Contestant;
  readonly #clock: SimulatedClock = new SimulatedClock();
  readonly #stepper: SimulatedStepper;
  readonly #loop: EngineLoop;
  readonly #gateway: SimulatedGateway;
  readonly #adapterOf: (name: string) => SimulatedAdapter;
  readonly #adapters: Map<ResidentKey, SimulatedAdapter> = new Map();
  /** Sent during a step. */
  #inbox: GenerateRequest[] = [];

  constructor(scenario: Scenario, contestant: Contestant) {
    this.#scenario = scenario;
    this.#contestant = contestant;
    const { machine, seed, arrivals } = scenario;
    this.#adapterOf = createAdapters(scenario.adapters);
    const clock = this.#clock;
    this.#gateway = new SimulatedGateway({
      ...{ scenario, contestant, clock },
      adapterOf: (name) => this.#meet(name),
      send: (request) => this.#inbox.push(request),
      sendCosts: (costs) => this.#loop.setCosts(costs),
    });
    this.#stepper = new SimulatedStepper({
      ...{ machine, seed, clock },
      sizeOf: (number) => arrivals[number]!,
    });
    const { prefillTokensMax, waitingMax, waitingTokensMax } = machine;
    this.#loop = new EngineLoop({
      base: fakeBaseInfo({ endTokens: [endToken] }),
      stepper: this.#stepper,
      residency: createResidency({
        stepper: this.#stepper,
        baseHash: fakeBaseHash,
        open: (key) => this.#open(key),
      }),
      cache: new PrefixCache({ pool: new KvPool(machine.cells), tenantShareMax: 0 }),
      // Nobody is refused for waiting long: the queue's length is what bounds it here.
      limits: { waitingMax, waitingTokensMax, waitingMsMax: 1e12, prefillTokensMax },
      bytesOf: () => word,
      clock,
      watch: { threads: 1, begin() {}, end() {} },
      speculation: 'off',
      emit: (message) => this.#gateway.hear(message),
    });
  }

  async run(): Promise<Result> {
    this.#expect(0);
    for (;;) {
      const inbox = this.#inbox;
      this.#inbox = [];
      for (const request of inbox) this.#loop.submit(request);
      const { messages } = this.#gateway;
      await nextTick();
      if (this.#gateway.messages !== messages) continue;
      // A file that was read in this turn wakes the loop for the next.
      await nextTick();
      if (this.#gateway.messages === messages && !this.#clock.advanceToNext()) break;
    }
    this.#loop.stop();
    this.#checkEmpty();
    return {
      contestant: this.#contestant.name,
      ended: this.#gateway.ended,
      endMs: this.#clock.nowMs(),
      steps: this.#stepper.steps,
    };
  }

  /** Nothing is left to happen: everything must be back. */
  #checkEmpty(): void {
    const { running, waiting, kvCellsUsed, residents } = this.#loop.stats();
    const uses = residents.reduce((sum, one) => sum + one.uses, 0);
    if (running + waiting + kvCellsUsed + uses === 0) return;
    const left = `${running} run, ${waiting} wait, ${kvCellsUsed} cells, ${uses} uses`;
    throw new Error(`the engine stands still: ${left}`);
  }

  #expect(index: number): void {
    const arrival = this.#scenario.arrivals[index];
    if (arrival === undefined) return;
    this.#clock.at(arrival.atMs, () => {
      this.#expect(index + 1);
      this.#gateway.arrive(index);
    });
  }

  #meet(name: string): SimulatedAdapter {
    const adapter = this.#adapterOf(name);
    this.#adapters.set(adapter.generation, adapter);
    return adapter;
  }

  #open(key: ResidentKey): Promise<PackedAdapter<ResidentKey>> {
    const { rankMax, routed } = this.#adapters.get(key)!;
    const blank = fakePacked(key, rankMax);
    const manifest = { ...blank.manifest, rankCurve: routed.rankCurve };
    const packed = { ...blank, manifest, page: () => null };
    return new Promise((resolve) => {
      this.#clock.after(this.#scenario.machine.adapterReadMs, () => resolve(packed));
    });
  }
}
