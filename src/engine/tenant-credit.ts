// What tenants may ask of steps that they share with others beyond what those ask, in ms: a leaky bucket each. What a
// tenant's sequences add to steps is taken from it, and its share of the time that passes is given to it: as much as each of
// those has that used anything of late. So tenants that use as much as each other never hold each other back, whoever uses
// little can have a long prompt at once, and whoever floods has no credit. Used alone it is spent as well: a flood
// that had the machine to itself is known as one when somebody comes.

import { LRUCache } from 'lru-cache';

interface Account {
  readonly creditMs: number;
  readonly atMs: number;
}

/** A prompt of 200 tokens on the machine of docs/benchmarks.md. Guess. */
const creditMsMax = 500;
/** How long a tenant counts as one of those that share the machine, and between two counts. Guesses. */
const recentMs = 10_000;
const countEveryMs = 1000;
const tenantsMax = 4096;

export class TenantCredit {
  readonly #accounts: LRUCache<string, Account> = new LRUCache({ max: tenantsMax });
  #freeShare = 1;
  #countedMs: number = Number.NEGATIVE_INFINITY;

  /** Whoever is not known has all of it. */
  of(tenant: string, nowMs: number): number {
    const account = this.#accounts.get(tenant);
    if (account === undefined) return creditMsMax;
    return Math.min(creditMsMax, account.creditMs + this.#freeShare * (nowMs - account.atMs));
  }

  /** `spentMs`: what each tenant added to a step. */
  charge(spentMs: ReadonlyMap<string, number>, nowMs: number): void {
    for (const [tenant, ms] of spentMs) {
      const creditMs = Math.max(0, this.of(tenant, nowMs) - ms);
      this.#accounts.set(tenant, { creditMs, atMs: nowMs });
    }
    if (nowMs - this.#countedMs < countEveryMs) return;
    this.#countedMs = nowMs;
    let count = 0;
    for (const { atMs } of this.#accounts.values()) if (nowMs - atMs <= recentMs) count += 1;
    this.#freeShare = 1 / Math.max(1, count);
  }
}
