// What tenants may ask of steps that they share with others beyond what those ask, in ms: a leaky bucket each. What a
// tenant's sequences add to steps is taken from it, and a small share of the time that passes is given to it. So whoever
// uses little can have a long prompt at once, and whoever floods has no credit. Used alone it is spent as well: a flood
// that had the machine to itself is known as one when somebody comes.

import { LRUCache } from 'lru-cache';

interface Account {
  readonly creditMs: number;
  readonly atMs: number;
}

/** A prompt of 200 tokens on the machine of docs/benchmarks.md, and what anybody may use for ever. Guesses. */
const creditMsMax = 500;
const freeShare = 0.1;
const tenantsMax = 4096;

export class TenantCredit {
  readonly #accounts: LRUCache<string, Account> = new LRUCache({ max: tenantsMax });

  /** Whoever is not known has all of it. */
  of(tenant: string, nowMs: number): number {
    const account = this.#accounts.get(tenant);
    if (account === undefined) return creditMsMax;
    return Math.min(creditMsMax, account.creditMs + freeShare * (nowMs - account.atMs));
  }

  /** `spentMs`: what each tenant added to a step. */
  charge(spentMs: ReadonlyMap<string, number>, nowMs: number): void {
    for (const [tenant, ms] of spentMs) {
      const creditMs = Math.max(0, this.of(tenant, nowMs) - ms);
      this.#accounts.set(tenant, { creditMs, atMs: nowMs });
    }
  }
}
