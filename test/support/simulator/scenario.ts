// What a simulation is given and what it gives.

import type { Plan } from '../../../src/router/policy.ts';
import type { Router } from '../../../src/router/router.ts';
import type { Machine } from './machine.ts';
import type { SimulatedAdapter } from './simulated-adapter.ts';
import type { Arrival } from './traffic.ts';

export interface Scenario {
  /** Of the machine's noise and of the policy's draws. */
  readonly seed: number;
  readonly machine: Machine;
  /** In order of time. */
  readonly arrivals: readonly Arrival[];
  /** Adapters that are as said here, not made from their name. */
  readonly adapters?: readonly SimulatedAdapter[];
}

/** Who decides about ranks. */
export interface Contestant {
  readonly name: string;
  readonly createRouter: (scenario: Scenario) => Router;
  /** The rank that request `index` is given, as if its caller had fixed it; null: the router chooses. */
  readonly rankOf: (index: number, adapter: SimulatedAdapter) => number | null;
}

/** What became of one request. Times are from its arrival. */
export interface Ended {
  readonly plan: Plan | null;
  /** `answered`, or the code of the error. */
  readonly outcome: string;
  readonly tokens: number;
  readonly ttftMs: number;
  readonly totalMs: number;
  /** Means over the answer's tokens: the engine may change a rank on the way. */
  readonly rankMean: number;
  readonly fidelity: number;
}

export interface Result {
  readonly contestant: string;
  /** One for each arrival, in their order. */
  readonly ended: readonly Ended[];
  readonly endMs: number;
  readonly steps: number;
}
