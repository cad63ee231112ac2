// Sequences that wait for room, in the order in which it is offered. A tenant's k-th waiting sequence ranks as if k were
// running besides those that are: whoever holds least goes first, so a tenant that floods the queue only waits behind
// itself. Among those that hold as little, and within a tenant: who may still be in time before who is late, the higher
// priority, the earlier deadline, who came first. (The earliest deadline alone would go to who is latest: under overload
// everybody is late then.)
// Whatever comes after it, a sequence waits for a bounded number of others: every `turnEvery`-th admission is offered to the
// oldest of all, so one that finds n in the queue sees at most turnEvery · (n + 1) admissions before its own turn.
// All of it is kept in order as it changes: a tick looks at as many sequences as it asks for, not at all that wait.

import { SortedList } from './sorted-list.ts';

/** None of it changes while it waits. */
export interface Waiting {
  readonly id: string;
  readonly tenant: string;
  /** Order of arrival, no two alike. */
  readonly arrival: number;
  readonly priority: number;
  /** When its answer should have begun; Infinity: whenever. */
  readonly dueMs: number;
  /** From when on it is not worth an admission; Infinity: never. */
  readonly expiresMs: number;
  readonly promptTokens: number;
  /** Who has the same waits for the same adapters at the same ranks; the one thing that may change (`regroup`). */
  readonly wantsKey: string;
}

/** Guess. */
const turnEvery = 8;

interface Line<T> {
  readonly tenant: string;
  readonly waiting: SortedList<T>;
  /** Sequences that run. */
  held: number;
}

/** A line's k-th. */
interface Offer<T> {
  readonly line: Line<T>;
  readonly index: number;
  readonly share: number;
  readonly one: T;
}

type Compare = (a: Waiting, b: Waiting) => number;

function byUrgency(late: ReadonlySet<Waiting>): Compare {
  return (a, b) => {
    if (late.size > 0 && late.has(a) !== late.has(b)) return late.has(a) ? 1 : -1;
    if (a.priority !== b.priority) return b.priority - a.priority;
    if (a.dueMs !== b.dueMs) return a.dueMs - b.dueMs; // not their difference: of two Infinities it is NaN
    return a.arrival - b.arrival;
  };
}

export class WaitingQueue<T extends Waiting> {
  readonly #byId: Map<string, T> = new Map();
  readonly #byWants: Map<string, Set<T>> = new Map();
  readonly #late: Set<T> = new Set();
  readonly #compare: Compare = byUrgency(this.#late);
  /** Who has a time to be late for, and is not. */
  readonly #byDue: SortedList<T> = new SortedList(
    (a, b) => a.dueMs - b.dueMs || a.arrival - b.arrival,
  );
  readonly #byArrival: SortedList<T> = new SortedList((a, b) => a.arrival - b.arrival);
  /** Of tenants that wait or run. */
  readonly #lines: Map<string, Line<T>> = new Map();
  /** Of tenants that wait. */
  readonly #inOrder: SortedList<Line<T>> = new SortedList(
    (a, b) => a.held - b.held || this.#compare(a.waiting.at(0)!, b.waiting.at(0)!),
  );
  #promptTokens = 0;
  #admissionsSinceTurn = 0;
  /** Nobody expires before it. */
  #expiryMs: number = Number.POSITIVE_INFINITY;

  get size(): number {
    return this.#byId.size;
  }

  /** Of all that wait. */
  get promptTokens(): number {
    return this.#promptTokens;
  }

  has(id: string): boolean {
    return this.#byId.has(id);
  }

  values(): Iterable<T> {
    return this.#byId.values();
  }

  /** The first that came of those with this key. */
  wanting(key: string): T | undefined {
    const [one] = this.#byWants.get(key) ?? [];
    return one;
  }

  /** `change` changes the key of one that waits. */
  regroup(one: T, change: () => void): void {
    this.#leaveGroup(one);
    change();
    this.#joinGroup(one);
  }

  #joinGroup(one: T): void {
    const group = this.#byWants.get(one.wantsKey);
    if (group === undefined) this.#byWants.set(one.wantsKey, new Set([one]));
    else group.add(one);
  }

  #leaveGroup(one: T): void {
    const group = this.#byWants.get(one.wantsKey);
    group?.delete(one);
    if (group?.size === 0) this.#byWants.delete(one.wantsKey);
  }

  /** Sequences of a tenant that run. */
  held(tenant: string): number {
    return this.#lines.get(tenant)?.held ?? 0;
  }

  add(one: T): void {
    this.#byId.set(one.id, one);
    this.#joinGroup(one);
    this.#byArrival.add(one);
    if (one.dueMs < Number.POSITIVE_INFINITY) this.#byDue.add(one);
    this.#promptTokens += one.promptTokens;
    this.#expiryMs = Math.min(this.#expiryMs, one.expiresMs);
    this.#change(one.tenant, ({ waiting }) => waiting.add(one));
  }

  /** Undefined for an id that does not wait. */
  delete(id: string): T | undefined {
    const one = this.#byId.get(id);
    if (one === undefined) return undefined;
    this.#byId.delete(id);
    this.#leaveGroup(one);
    this.#byArrival.delete(one);
    this.#byDue.delete(one);
    this.#promptTokens -= one.promptTokens;
    this.#change(one.tenant, ({ waiting }) => waiting.delete(one));
    this.#late.delete(one); // after it has left where it was late
    return one;
  }

  /** It waits no more and runs. */
  admit(one: T): void {
    this.#admissionsSinceTurn = this.#byArrival.at(0) === one ? 0 : this.#admissionsSinceTurn + 1;
    this.delete(one.id);
    this.#change(one.tenant, (line) => {
      line.held += 1;
    });
  }

  /** One that ran has ended, or waits again (`add`). */
  release(tenant: string): void {
    this.#change(tenant, (line) => {
      line.held -= 1;
    });
  }

  /** Whose turn it is, whatever else waits. */
  get turn(): T | undefined {
    return this.#admissionsSinceTurn >= turnEvery - 1 ? this.#byArrival.at(0) : undefined;
  }

  /** The first in line, `countMax` at most. */
  first(countMax: number): T[] {
    const { turn } = this;
    const order: T[] = turn === undefined ? [] : [turn];
    const offers = new SortedList<Offer<T>>(
      (a, b) => a.share - b.share || this.#compare(a.one, b.one),
    );
    // A line enters when its first is due: what is before it in `#inOrder` has been looked at.
    let lines = 0;
    const enter = (): void => {
      const line = this.#inOrder.at(lines);
      if (line === undefined) return;
      lines += 1;
      offers.add({ line, index: 0, share: line.held, one: line.waiting.at(0)! });
    };
    enter();
    while (order.length < countMax) {
      const offer = offers.shift();
      if (offer === undefined) break;
      const { line, one } = offer;
      if (offer.index === 0) enter();
      if (one !== turn) order.push(one);
      const index = offer.index + 1;
      const next = line.waiting.at(index);
      if (next !== undefined) offers.add({ line, index, share: line.held + index, one: next });
    }
    return order;
  }

  /** For one more of `tenant`, when the queue is full: the last in line of whoever has most in it, if that is more than
   *  `tenant` would have, and if its reader has had nothing yet. */
  displaceable(tenant: string): T | undefined {
    let most = this.#lines.get(tenant)?.waiting;
    for (const { waiting } of this.#lines.values()) {
      if (most === undefined || waiting.length > most.length) most = waiting;
    }
    const own = this.#lines.get(tenant)?.waiting.length ?? 0;
    if (most === undefined || most.length <= own + 1) return undefined;
    // Those at the end may have been preempted, for they are late: few, as only who ran can be.
    for (let index = most.length - 1; index >= 0; index--) {
      const one = most.at(index)!;
      if (one.expiresMs < Number.POSITIVE_INFINITY) return one;
    }
    return undefined;
  }

  /** Whose time has passed goes behind all that may be in time. */
  passTime(nowMs: number): void {
    for (let one = this.#byDue.at(0); one !== undefined; one = this.#byDue.at(0)) {
      if (one.dueMs > nowMs) return;
      const late = one;
      this.#byDue.delete(late);
      this.#change(late.tenant, ({ waiting }) => {
        waiting.delete(late);
        this.#late.add(late);
        waiting.add(late);
      });
    }
  }

  /** Those that are not worth an admission any more; they still wait. */
  expired(nowMs: number): T[] {
    if (nowMs < this.#expiryMs) return [];
    const expired: T[] = [];
    this.#expiryMs = Number.POSITIVE_INFINITY;
    for (const one of this.#byId.values()) {
      if (one.expiresMs <= nowMs) expired.push(one);
      else this.#expiryMs = Math.min(this.#expiryMs, one.expiresMs);
    }
    return expired;
  }

  #change(tenant: string, change: (line: Line<T>) => void): void {
    const line = this.#lines.get(tenant) ?? {
      ...{ tenant, held: 0 },
      waiting: new SortedList<T>(this.#compare),
    };
    if (line.waiting.length > 0) this.#inOrder.delete(line); // while it is where its old place is
    change(line);
    if (line.waiting.length > 0) this.#inOrder.add(line);
    if (line.waiting.length > 0 || line.held > 0) this.#lines.set(tenant, line);
    else this.#lines.delete(tenant);
  }
}
