// Which replicas hold which adapters (algorithms.md section 31): the problem, what a placement costs, and why there can be
// none. Every adapter wants a number of copies on different replicas, and its load is shared by them; adapters over one
// basis or bank need its pages once a replica. What is to be small is the busiest replica's utilisation plus `moveCost` for
// every page that a replica has to load. placement-search.ts finds a good one. Pure.

import { GatewayError } from '../errors.ts';

export interface Replica {
  readonly name: string;
  readonly pages: number;
  /** Load at which it is fully used, in the adapters' unit. */
  readonly capacity: number;
}

export interface Placeable {
  readonly name: string;
  readonly pages: number;
  readonly load: number;
  readonly copies: number;
  /** What it needs beside its own pages, by name; null: nothing. */
  readonly shares: string | null;
  /** Replicas that have it now; those that are gone do not count. */
  readonly on: readonly string[];
}

export interface PlacementProblem {
  readonly replicas: readonly Replica[];
  readonly adapters: readonly Placeable[];
  readonly shared: ReadonlyArray<{ readonly name: string; readonly pages: number }>;
  /** Utilisation of the busiest replica that one page less to load is worth. */
  readonly moveCost: number;
}

export interface Placement {
  readonly cost: number;
  readonly peak: number;
  readonly pagesToLoad: number;
  /** Names of replicas, an entry an adapter. */
  readonly hosts: ReadonlyArray<readonly string[]>;
  /** Adapters that found room for fewer copies than they want. */
  readonly missing: readonly string[];
}

/** More than any peak and any move: whatever places one more copy is better. */
const missingCost = 1e6;

/** A placement as it changes, with its sums. Adapters, replicas and shared pages by their index. */
export class Assignment {
  readonly problem: PlacementProblem;
  readonly adapterCount: number;
  readonly replicaCount: number;
  readonly #hosts: Uint8Array; // [adapters, replicas]
  readonly #isThere: Uint8Array; // [adapters, replicas], now
  readonly #needs: Int32Array; // [adapters], index into shared; -1: nothing
  readonly #users: Int32Array; // [shared, replicas]
  readonly #usersNow: Int32Array; // [shared, replicas]
  readonly #pages: Float64Array; // [replicas]
  readonly #load: Float64Array; // [replicas]
  readonly #copies: Int32Array; // [adapters]
  #missing = 0;
  #pagesToLoad = 0;

  /** Throws INVALID_REQUEST for a name that is given twice or that names nothing. */
  constructor(problem: PlacementProblem) {
    const { adapters, replicas, shared } = problem;
    const replicaAt = indexOf('replica', replicas);
    const sharedAt = indexOf('shared', shared);
    indexOf('adapter', adapters);
    this.problem = problem;
    this.adapterCount = adapters.length;
    this.replicaCount = replicas.length;
    this.#hosts = new Uint8Array(adapters.length * replicas.length);
    this.#isThere = new Uint8Array(this.#hosts.length);
    this.#users = new Int32Array(shared.length * replicas.length);
    this.#usersNow = new Int32Array(this.#users.length);
    this.#pages = new Float64Array(replicas.length);
    this.#load = new Float64Array(replicas.length);
    this.#copies = new Int32Array(adapters.length);
    this.#needs = Int32Array.from(adapters, ({ name, shares }) => {
      const index = shares === null ? -1 : sharedAt.get(shares);
      if (index !== undefined) return index;
      throw new GatewayError(
        'INVALID_REQUEST',
        `adapter ${name} shares '${shares}', which is not there`,
      );
    });
    for (const [a, { on, copies }] of adapters.entries()) {
      this.#missing += copies;
      for (const name of new Set(on)) {
        const r = replicaAt.get(name);
        if (r === undefined) continue;
        this.#isThere[this.#at(a, r)] = 1;
        if (this.#needs[a]! >= 0) this.#usersNow[this.#needs[a]! * this.replicaCount + r]! += 1;
      }
    }
  }

  #at(a: number, r: number): number {
    return a * this.replicaCount + r;
  }

  hosts(a: number, r: number): boolean {
    return this.#hosts[this.#at(a, r)] === 1;
  }

  isThere(a: number, r: number): boolean {
    return this.#isThere[this.#at(a, r)] === 1;
  }

  /** Index of what it shares; -1: nothing. */
  needs(a: number): number {
    return this.#needs[a]!;
  }

  missing(a: number): number {
    return this.problem.adapters[a]!.copies - this.#copies[a]!;
  }

  /** Load of one copy. */
  share(a: number): number {
    const { load, copies } = this.problem.adapters[a]!;
    return load / copies;
  }

  /** Its own, and the shared ones unless others there have brought them. */
  #pagesFor(a: number, users: number): number {
    const { adapters, shared } = this.problem;
    const need = this.#needs[a]!;
    return adapters[a]!.pages + (need >= 0 && users === 0 ? shared[need]!.pages : 0);
  }

  #usersAt(counts: Int32Array, a: number, r: number): number {
    const need = this.#needs[a]!;
    return need < 0 ? 0 : counts[need * this.replicaCount + r]!;
  }

  fits(a: number, r: number): boolean {
    if (this.hosts(a, r)) return false;
    const pages = this.#pagesFor(a, this.#usersAt(this.#users, a, r));
    return this.#pages[r]! + pages <= this.problem.replicas[r]!.pages;
  }

  /** Pages that the replica would have to load for it. */
  pagesToLoad(a: number, r: number): number {
    if (this.isThere(a, r)) return 0; // with what it shares
    const users = this.#usersAt(this.#users, a, r) + this.#usersAt(this.#usersNow, a, r);
    return this.#pagesFor(a, users);
  }

  place(a: number, r: number): void {
    this.#pagesToLoad += this.pagesToLoad(a, r);
    this.#change(a, r, 1);
  }

  remove(a: number, r: number): void {
    this.#change(a, r, -1);
    this.#pagesToLoad -= this.pagesToLoad(a, r);
  }

  #change(a: number, r: number, by: 1 | -1): void {
    const need = this.#needs[a]!;
    const users = this.#usersAt(this.#users, a, r) - (by < 0 ? 1 : 0); // besides this one
    this.#hosts[this.#at(a, r)] = by > 0 ? 1 : 0;
    this.#pages[r]! += by * this.#pagesFor(a, Math.max(0, users));
    this.#load[r]! += by * this.share(a);
    if (need >= 0) this.#users[need * this.replicaCount + r]! += by;
    this.#copies[a]! += by;
    this.#missing -= by;
  }

  /** With one more copy of `a`, when it is given. */
  utilisation(r: number, a: number | null = null): number {
    const load = this.#load[r]! + (a === null ? 0 : this.share(a));
    return load / this.problem.replicas[r]!.capacity;
  }

  get peak(): number {
    let peak = 0;
    for (let r = 0; r < this.replicaCount; r++) peak = Math.max(peak, this.utilisation(r));
    return peak;
  }

  get cost(): number {
    return this.#missing * missingCost + this.peak + this.problem.moveCost * this.#pagesToLoad;
  }

  view(): Placement {
    const { adapters, replicas } = this.problem;
    return {
      cost: this.cost,
      peak: this.peak,
      pagesToLoad: this.#pagesToLoad,
      hosts: adapters.map((_, a) =>
        replicas.filter((_, r) => this.hosts(a, r)).map(({ name }) => name),
      ),
      missing: adapters.filter((_, a) => this.missing(a) > 0).map(({ name }) => name),
    };
  }
}

function indexOf(
  what: string,
  named: ReadonlyArray<{ readonly name: string }>,
): ReadonlyMap<string, number> {
  const index = new Map<string, number>();
  for (const [i, { name }] of named.entries()) {
    if (index.has(name))
      throw new GatewayError('INVALID_REQUEST', `${what} ${name} is there twice`);
    index.set(name, i);
  }
  return index;
}

/** What makes a placement of all copies impossible, as far as counting shows it: too many copies, too large an adapter, too
 *  little room in all. Empty does not mean that there is one: pages may fit in all and not replica by replica. */
export function impossibilities({ adapters, replicas, shared }: PlacementProblem): string[] {
  const reasons: string[] = [];
  const room = replicas.reduce((sum, { pages }) => sum + pages, 0);
  const needed = new Map<string, number>(); // copies of what is shared
  let total = 0;
  for (const { name, pages, copies, shares } of adapters) {
    const beside = shared.find((one) => one.name === shares)?.pages ?? 0;
    const large = replicas.filter((one) => one.pages >= pages + beside).length;
    const size = beside === 0 ? `${pages} pages` : `${pages} pages beside ${beside} of ${shares}`;
    if (copies > large) {
      reasons.push(
        `${name} wants ${copies} copies of ${size}: ${large} of ${replicas.length} replicas could hold one`,
      );
    }
    if (shares !== null) needed.set(shares, Math.max(copies, needed.get(shares) ?? 0));
    total += pages * copies;
  }
  for (const { name, pages } of shared) total += pages * (needed.get(name) ?? 0);
  if (total > room) {
    reasons.push(`all copies together need at least ${total} pages, the replicas have ${room}`);
  }
  return reasons;
}
