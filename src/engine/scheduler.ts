// What the next step computes: continuous batching with chunked prefill. Pure functions from plain data to a plan; the
// loop executes it. Every decoding sequence gets its row and prompts fill what is left, by two limits once it is known what
// a step costs. No prompt makes a step longer than the decoding rows can bear by what their requests state. And in a step
// that several tenants share each may add what the others want on average, or have credit for (tenant-credit.ts), or a
// share of what the others have in it. Nobody starves: whoever had nothing for `starvedSteps` goes first, and the first
// prompt in line, or else a row of its tenant, gets a token.

import type { StepCosts } from './messages.ts';

export interface StepLimits {
  readonly tokensMax: number;
  readonly segmentsMax: number;
  /** Prompt tokens per step: bounds how long a decoding stream waits for someone else's prompt. */
  readonly prefillTokensMax: number;
}

/** One admitted sequence as the scheduler sees it. */
export interface Runnable {
  readonly id: string;
  readonly tenant: string;
  /** Order of arrival. */
  readonly arrival: number;
  /** Larger first. */
  readonly priority: number;
  /** When its first token is due; Infinity: whenever. */
  readonly dueMs: number;
  /** Prompt tokens not yet in its cells; 0 = it decodes one token a step. */
  readonly promptTokensLeft: number;
  /** Tokens in its cells. */
  readonly position: number;
  /** Active ranks of a row. */
  readonly rowRanks: number;
  /** The step that last computed it; that of its admission before the first. */
  readonly lastStep: number;
  /** How long the step may take for it; Infinity: as long as it likes. */
  paceMs(nowMs: number, isAlone: boolean): number;
}

/** The step's number and time, and what is known of its cost; null: nothing yet. */
export interface Moment {
  readonly step: number;
  readonly nowMs: number;
  readonly costs: StepCosts | null;
  readonly creditMs: (tenant: string) => number;
}

export interface PlannedSegment {
  readonly id: string;
  readonly count: number;
}

export interface StepPlan {
  readonly segments: readonly PlannedSegment[];
  /** What each tenant adds to the step. */
  readonly spentMs: ReadonlyMap<string, number>;
}

/** Steps after which whoever waits goes before whoever is urgent. Guess. */
const starvedSteps = 64;
/** How long prompts may make a step although nobody minds: whoever comes meanwhile waits for its end. Guess. */
const prefillMsMax = 100;
/** How much longer one tenant may make a step than the others' part of it takes. Guess: beside what else its sequences cost
 *  the others it keeps them below 1.5 times (the bar of faults.md S9). */
const delayShareMax = 0.3;
const noCosts: StepCosts = {
  ...{ step: 0, decodeRow: 0, prefillToken: 0, decodeRank: 0, prefillRank: 0, kvCell: 0 },
};

/** What a decoding row adds to a step. */
export function rowMs(costs: StepCosts, { rowRanks, position }: Runnable): number {
  return costs.decodeRow + costs.decodeRank * rowRanks + costs.kvCell * (position + 1);
}

/** What one of the next `count` tokens of a prompt adds. */
export function promptTokenMs(
  costs: StepCosts,
  { rowRanks, position }: Pick<Runnable, 'rowRanks' | 'position'>,
  count: number,
): number {
  const cells = position + (count + 1) / 2;
  return costs.prefillToken + costs.prefillRank * rowRanks + costs.kvCell * cells;
}

/** What the step takes so far, who adds what to it, and who would. */
class Ledger {
  readonly costs: StepCosts;
  readonly spentMs: Map<string, number> = new Map();
  ms: number;
  readonly #creditMs: Moment['creditMs'];
  readonly #wantedMs: Map<string, number> = new Map();
  #allWantedMs = 0;
  /** Tenants that are within their credit. */
  readonly #calm: Set<string> = new Set();

  constructor({ costs, creditMs }: Moment, runnables: readonly Runnable[]) {
    this.costs = costs ?? noCosts;
    this.ms = this.costs.step;
    this.#creditMs = creditMs;
    for (const one of costs === null ? [] : runnables) {
      const left = one.promptTokensLeft;
      const promptMs = Math.min(prefillMsMax, left * promptTokenMs(this.costs, one, left));
      const ms = left === 0 ? rowMs(this.costs, one) : promptMs;
      this.#wantedMs.set(one.tenant, (this.#wantedMs.get(one.tenant) ?? 0) + ms);
      this.#allWantedMs += ms;
    }
    for (const tenant of this.#wantedMs.keys()) {
      if (creditMs(tenant) >= prefillMsMax) this.#calm.add(tenant);
    }
  }

  /** Whether it has used up what it may have in one step by its credit, and others have not. */
  isBeyond(tenant: string): boolean {
    return this.#calm.size > 0 && !this.#calm.has(tenant);
  }

  has(tenant: string): boolean {
    return this.spentMs.has(tenant);
  }

  wantedMs(tenant: string): number {
    return this.#wantedMs.get(tenant) ?? 0;
  }

  add(tenant: string, ms: number): void {
    this.ms += ms;
    this.spentMs.set(tenant, (this.spentMs.get(tenant) ?? 0) + ms);
  }

  /** What a tenant may add by its credit, or because others want as much: not if these are within theirs. */
  ownLeftMs(tenant: string): number {
    const others = this.#wantedMs.size - 1;
    if (others < 1) return Number.POSITIVE_INFINITY;
    const meanMs = this.isBeyond(tenant) ? 0 : (this.#allWantedMs - this.wantedMs(tenant)) / others;
    return Math.max(this.#creditMs(tenant), meanMs) - (this.spentMs.get(tenant) ?? 0);
  }

  /** Or by what the others have in the step. */
  leftMs(tenant: string): number {
    const spent = this.spentMs.get(tenant) ?? 0;
    return Math.max(this.ownLeftMs(tenant), delayShareMax * (this.ms - spent) - spent);
  }
}

export function planStep<T extends Runnable>(
  runnables: readonly T[],
  limits: StepLimits,
  moment: Moment,
): StepPlan {
  const ledger = new Ledger(moment, runnables);
  const decoding = runnables.filter((one) => one.promptTokensLeft === 0);
  const prompts = runnables.filter((one) => one.promptTokensLeft > 0);
  // One place stays for a prompt: neither kind starves.
  const spare = prompts.length > 0 ? 1 : 0;
  const rowsMax = Math.max(1, Math.min(limits.segmentsMax, limits.tokensMax) - spare);
  const rows = chooseRows(decoding, rowsMax, moment, ledger);
  const segments = rows.map(({ id }): PlannedSegment => ({ id, count: 1 }));
  const msMax = Math.min(bearableMs(rows, ledger.ms, moment.nowMs), ledger.ms + prefillMsMax);

  let tokens = Math.min(limits.tokensMax - segments.length, limits.prefillTokensMax);
  for (const prompt of prompts.sort((a, b) => comparePrompts(a, b, moment.step, ledger))) {
    if (tokens < 1 || segments.length >= limits.segmentsMax) break;
    const most = Math.min(tokens, prompt.promptTokensLeft);
    const tokenMs = promptTokenMs(ledger.costs, prompt, most);
    const ownMs = ledger.leftMs(prompt.tenant);
    // A tenant beyond its share has a row or a token in the step, not both.
    const isHeld = ledger.has(prompt.tenant) && ownMs < tokenMs && !isStarved(prompt, moment.step);
    const isFirst = segments.length === rows.length && !isHeld;
    // Nothing over nothing: without costs there is no limit.
    const affordable =
      tokenMs === 0 ? most : Math.floor(Math.min(ownMs, msMax - ledger.ms) / tokenMs);
    const count = Math.min(most, Math.max(isFirst ? 1 : 0, affordable));
    if (count < 1) continue;
    segments.push({ id: prompt.id, count });
    ledger.add(prompt.tenant, count * tokenMs);
    tokens -= count;
  }
  return { segments, spentMs: ledger.spentMs };
}

/** With more rows than fit, or than their tenant may have, the longest-waiting go first. */
function chooseRows<T extends Runnable>(
  decoding: T[],
  rowsMax: number,
  { step }: Moment,
  ledger: Ledger,
): T[] {
  const rows: T[] = [];
  const beyondOwn: T[] = [];
  const take = (row: T, ms: number): void => {
    rows.push(row);
    ledger.add(row.tenant, ms);
  };
  for (const row of decoding.sort((a, b) => a.lastStep - b.lastStep || a.arrival - b.arrival)) {
    if (rows.length === rowsMax) return rows;
    const ms = rowMs(ledger.costs, row);
    if (ms <= ledger.ownLeftMs(row.tenant) || isStarved(row, step)) take(row, ms);
    else beyondOwn.push(row);
  }
  for (const row of beyondOwn) {
    if (rows.length === rowsMax) break;
    const ms = rowMs(ledger.costs, row);
    if (!ledger.has(row.tenant) || ms <= ledger.leftMs(row.tenant)) take(row, ms);
  }
  return rows;
}

/** The longest that prompts may make the step for every row that a step of `ms` would not be too long for already. */
function bearableMs(rows: readonly Runnable[], ms: number, nowMs: number): number {
  let most = Number.POSITIVE_INFINITY;
  for (const row of rows) {
    const pace = row.paceMs(nowMs, false); // there is a prompt
    if (pace >= ms) most = Math.min(most, pace);
  }
  return most;
}

function isStarved({ lastStep }: Runnable, step: number): boolean {
  return step - lastStep > starvedSteps;
}

/** Whoever is urgent, whosever it is; behind all of them tenants that are beyond their credit, who wants least first. */
function comparePrompts(a: Runnable, b: Runnable, step: number, ledger: Ledger): number {
  const [aStarved, bStarved] = [a, b].map((one) => isStarved(one, step));
  if (aStarved !== bStarved) return aStarved ? -1 : 1;
  if (aStarved) return a.lastStep - b.lastStep || a.arrival - b.arrival;
  const [aBeyond, bBeyond] = [a, b].map(({ tenant }) => ledger.isBeyond(tenant));
  if (aBeyond !== bBeyond) return aBeyond ? 1 : -1;
  const more = ledger.wantedMs(a.tenant) - ledger.wantedMs(b.tenant);
  if (aBeyond && a.tenant !== b.tenant && more !== 0) return more;
  if (a.priority !== b.priority) return b.priority - a.priority;
  if (a.dueMs !== b.dueMs) return a.dueMs - b.dueMs;
  return a.arrival - b.arrival;
}
