// What tenants may still ask of steps that they share with others, in ms: a leaky bucket each. What a tenant's sequences
// add to a step is taken from it; what the other tenants of the step had on average, and a small share of the time that
// passes, is given to it. So whoever uses what others use, or little, always has credit; whoever uses many times as much
// has none, and scheduler.ts then bounds what it may add. Used alone it is spent as well: a flood that had the machine to
// itself is known as one when somebody comes.

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
    let all = 0;
    for (const ms of spentMs.values()) all += ms;
    for (const [tenant, ms] of spentMs) {
      const others = (all - ms) / Math.max(1, spentMs.size - 1);
      const creditMs = this.of(tenant, nowMs) - ms + others;
      this.#accounts.set(tenant, {
        creditMs: Math.min(creditMsMax, Math.max(0, creditMs)),
        atMs: nowMs,
      });
    }
  }
}
