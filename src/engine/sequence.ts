// One request inside the loop: its tokens, what it holds, when it is due, and what its reader may be shown. Knows its own
// arithmetic and nothing of other sequences. A sequence resumed after an engine death starts with the tokens that its
// reader already has: they are replayed through the detokeniser and the stop matcher without being shown again, so text
// goes on exactly. So do its ranks: each cell is computed again at the rank that it was computed at.

import type { ResidentKey, ResidentUse } from '../adapters/residency.ts';
import type { AdapterRows } from '../model/stepper.ts';
import { keyOf, type Want } from './adapter-loading.ts';
import type { RankOption } from './batch-ranks.ts';
import { createDetokenizer, type Detokenizer } from './detokenizer.ts';
import { activeUse, type Loadable, loadables } from './loadable.ts';
import type { AdapterUse, FinishReason, GenerateRequest, RankChange } from './messages.ts';
import { type SampleHistory, usesHistory } from './penalties.ts';
import type { CellAdmission } from './prefix-cache.ts';
import { Drafter } from './speculation.ts';
import { createStopMatcher, type StopMatcher } from './stop-matcher.ts';

export interface SequenceEnd {
  readonly reason: FinishReason;
  readonly stopString: string | null;
}

export interface Accepted {
  readonly text: string;
  readonly end: SequenceEnd | null;
}

/** What the tokens from a cell on are computed with. */
export interface RowsSpan {
  readonly from: number;
  readonly rows: AdapterRows | null;
}

/** What a sequence holds while it runs. */
export interface Holdings {
  readonly cells: CellAdmission;
  readonly adapters: readonly ResidentUse[];
  /** Ascending, the first from 0. The same objects at every step: the decoder compares by identity. */
  readonly spans: readonly RowsSpan[];
  /** Ranks that the governor may give it, ascending; empty: none but its own. */
  readonly ladder: readonly RankOption[];
}

export interface SequenceOptions {
  readonly request: GenerateRequest;
  /** Tokens of the answer that the reader has, and the ranks that they were computed at. */
  readonly generated: Int32Array;
  readonly rankChanges: readonly RankChange[];
  readonly arrival: number;
  readonly submittedMs: number;
  /** How long it may wait for room before anybody has read of it. */
  readonly waitMsMax: number;
  readonly bytesOf: (token: number) => Uint8Array;
}

/** An answer that is longer than it was likely to be goes on for this share of its length. Guess. */
const overrun = 0.25;
/** Of its rank, on the way. */
const changesMax = 64;
/** Share of a stated time that is kept back: ranks take all the time that there is, and steps scatter. Beside others more:
 *  whoever comes makes steps longer. Of 0 to 0.2, in the simulator (docs/log.md). */
const [reserveAlone, reserveBeside] = [0.02, 0.06] as const;

export class Sequence {
  readonly request: GenerateRequest;
  readonly arrival: number;
  readonly submittedMs: number;
  /** When its first token is due; Infinity: whenever. */
  readonly dueMs: number;
  /** When its last one is due. */
  readonly endDueMs: number;
  /** Prompt, then answer; room for all of it. */
  readonly tokens: Int32Array;
  readonly history: SampleHistory;
  readonly drafter: Drafter;
  /** Tokens known, of which the first `position` are in cells. */
  count: number;
  position = 0;
  lastStep: number = Number.NEGATIVE_INFINITY;
  firstTokenMs: number | null = null;
  holdings: Holdings | null = null;
  /** null for the base model and for rank 0 of everything, which is the same. */
  readonly use: AdapterUse | null;
  /** Its parts as residents. */
  readonly loadable: readonly Loadable[];
  /** Each resident once, in an order that does not depend on the request's. */
  wants: readonly Want[];
  wantsKey: string;
  /** Computed from its prior when it is first tried. */
  atomBias: readonly number[] | null = null;
  /** Sequences behind it that were admitted while it found no cells. */
  passes = 0;
  /** How often it gave its cells to another. */
  preemptions = 0;
  /** The step before which its rank last changed. */
  rankStep: number = Number.NEGATIVE_INFINITY;
  /** What its adapters were to have: the largest of its parts. */
  readonly planRank: number;
  /** Leading cells that are what the plan says: what others may use, and what it may use of others. */
  sharedCells: number = Number.POSITIVE_INFINITY;
  readonly #expiresMs: number;
  /** Ranks and the cells from which on they hold, ascending, the first from 0. */
  readonly #ranks: Array<{ readonly from: number; readonly rank: number }> = [];
  #rankSum = 0;
  readonly #counts: Map<number, number> = new Map();
  #atomSums: Float64Array | null = null; // [blocks of layers, K]
  #atomSteps = 0;
  #prefillEnd: number;
  /** Tokens of the answer when `firstTokenMs` was. */
  #firstCount = 1;
  readonly #detokenizer: Detokenizer;
  readonly #matcher: StopMatcher;

  constructor(options: SequenceOptions) {
    const { request, generated, submittedMs } = options;
    const { deadlineMs, ttftMs, strict } = request.urgency;
    this.request = request;
    this.arrival = options.arrival;
    this.submittedMs = submittedMs;
    this.endDueMs = submittedMs + (deadlineMs ?? Number.POSITIVE_INFINITY);
    this.dueMs = Math.min(this.endDueMs, submittedMs + (ttftMs ?? Number.POSITIVE_INFINITY));
    this.#expiresMs = Math.min(
      submittedMs + options.waitMsMax,
      strict ? this.dueMs : Number.POSITIVE_INFINITY,
    );
    this.use = activeUse(request.adapter);
    this.loadable = this.use === null ? [] : loadables(this.use);
    this.planRank = Math.max(0, ...(this.use?.parts ?? []).map(({ rank }) => rank));
    this.#ranks.push({ from: 0, rank: this.planRank });
    for (const { afterTokens, rank } of options.rankChanges) {
      this.#changeRank(afterTokens === 0 ? 0 : request.tokens.length + afterTokens - 1, rank);
    }
    this.wants = this.#wantsNow();
    this.wantsKey = keyOf(this.wants);
    this.tokens = new Int32Array(request.tokens.length + request.tokensMax);
    this.tokens.set(request.tokens);
    this.drafter = new Drafter(this.tokens);
    this.count = request.tokens.length;
    this.history = {
      prompt: new Set(usesHistory(request.sampling) ? request.tokens : []),
      counts: this.#counts,
    };
    this.#detokenizer = createDetokenizer(options.bytesOf);
    this.#matcher = createStopMatcher(request.stop);
    for (const token of generated) this.accept(token);
    this.#prefillEnd = this.count;
  }

  get id(): string {
    return this.request.id;
  }

  get tenant(): string {
    return this.request.tenant;
  }

  get priority(): number {
    return this.request.urgency.priority;
  }

  get promptTokens(): number {
    return this.request.tokens.length;
  }

  /** Some of it, or it had. */
  get hasAnswer(): boolean {
    return this.generatedCount > 0 || this.preemptions > 0;
  }

  get hasBegun(): boolean {
    return this.position > 0 || this.hasAnswer;
  }

  /** Never for one whose reader has had something of it. */
  get expiresMs(): number {
    return this.hasAnswer ? Number.POSITIVE_INFINITY : this.#expiresMs;
  }

  get generatedCount(): number {
    return this.count - this.request.tokens.length;
  }

  /** Cells it can ever fill: the last token of the answer is never fed back. */
  get cellsMax(): number {
    return this.tokens.length - 1;
  }

  /** Tokens to compute before it decodes. */
  get promptTokensLeft(): number {
    return Math.max(0, this.#prefillEnd - this.position);
  }

  /** Whether the token at `position` was known at the start, prompt or resumed answer. */
  isPrompt(position: number): boolean {
    return position < this.#prefillEnd;
  }

  /** How long the next step may take for the answer to come as its request states; Infinity: as long as it likes; not above
   *  0: it is too late. One that is behind by the token has its pace and not what would catch up. */
  paceMs(nowMs: number, isAlone: boolean): number {
    const reserveShare = isAlone ? reserveAlone : reserveBeside;
    const { tokensMax, tokensLikely = tokensMax, urgency } = this.request;
    let pace = Number.POSITIVE_INFINITY;
    if (urgency.perTokenMs !== null && this.firstTokenMs !== null) {
      const own = (1 - reserveShare) * urgency.perTokenMs;
      const tokens = this.generatedCount - this.#firstCount + 1;
      const ahead = this.firstTokenMs + tokens * own - nowMs;
      pace = Math.max(own, ahead);
    }
    const had = this.generatedCount;
    const left = Math.max(1, tokensLikely - had, Math.ceil(had * overrun));
    const reserveMs = reserveShare * (urgency.deadlineMs ?? 0);
    const leftMs = this.endDueMs - nowMs;
    return Math.min(
      pace,
      (leftMs > reserveMs ? leftMs - reserveMs : leftMs) / Math.min(left, tokensMax - had),
    );
  }

  /** Of its adapters, now. */
  get rank(): number {
    return this.#ranks.at(-1)!.rank;
  }

  get ranks(): ReadonlyArray<{ readonly from: number; readonly rank: number }> {
    return this.#ranks;
  }

  /** Over the answer; that of now as long as there is none. */
  get rankMean(): number {
    return this.generatedCount === 0 ? this.rank : this.#rankSum / this.generatedCount;
  }

  /** What a row of it computes. */
  get rowRanks(): number {
    return this.holdings?.spans.at(-1)?.rows?.rank ?? 0;
  }

  get ladder(): readonly RankOption[] {
    return this.#ranks.length > changesMax ? [] : (this.holdings?.ladder ?? []);
  }

  /** Whether its rank may be changed: what it states tells whether it should, and its parts are what they are at any rank. */
  get isGovernable(): boolean {
    const { use } = this;
    const { deadlineMs, ttftMs, perTokenMs, rankIsFixed } = this.request.urgency;
    if (use === null || use.parts.length === 0 || rankIsFixed) return false;
    if (use.merge !== 'linear' || use.prior !== null) return false;
    return deadlineMs !== null || ttftMs !== null || perTokenMs !== null;
  }

  /** The governor goes no lower. */
  get rankLeast(): number {
    return Math.min(this.planRank, this.request.urgency.rankMin);
  }

  /** Its time has passed before anything was computed, and it may have fewer ranks. */
  isOverdue(nowMs: number): boolean {
    return (
      !this.hasAnswer && this.endDueMs <= nowMs && this.isGovernable && this.rank > this.rankLeast
    );
  }

  /** The cells that are computed from now on are computed at it. */
  changeRank(rank: number): void {
    this.#changeRank(this.position, rank);
    this.wants = this.#wantsNow();
    this.wantsKey = keyOf(this.wants);
  }

  #changeRank(from: number, rank: number): void {
    if (this.#ranks.at(-1)!.from === from) this.#ranks.pop();
    this.#ranks.push({ from, rank });
    this.sharedCells = Math.min(this.sharedCells, from);
  }

  /** What a part has when the adapters of the sequence have `rank`; more than the resident has means all of it. */
  partRank({ rank: own, isGoverned }: Loadable, rank: number): number {
    return isGoverned && rank !== this.planRank ? rank : own;
  }

  /** It has given its cells away: all that is known is computed again. */
  rewind(): void {
    this.position = 0;
    this.#prefillEnd = this.count;
    this.passes = 0;
    this.preemptions += 1;
  }

  /** How a token weighted the atoms, [blocks of layers, K]; null: it has none. */
  noteAtoms(weights: Float32Array | null): void {
    if (weights === null) return;
    this.#atomSums ??= new Float64Array(weights.length);
    for (const [i, weight] of weights.entries()) this.#atomSums[i]! += weight;
    this.#atomSteps += 1;
  }

  /** Mean weights, a list a block of layers. */
  get atoms(): number[][] | null {
    const atoms = this.holdings?.spans[0]?.rows?.atoms?.bias.length;
    if (atoms === undefined || this.#atomSums === null) return null;
    const means = Array.from(this.#atomSums, (sum) => sum / this.#atomSteps);
    return Array.from({ length: means.length / atoms }, (_, block) =>
      means.slice(block * atoms, (block + 1) * atoms),
    );
  }

  noteFirstToken(nowMs: number): void {
    if (this.firstTokenMs !== null) return;
    this.firstTokenMs = nowMs;
    this.#firstCount = this.generatedCount + 1;
  }

  /** Takes the next token of the answer; the end, when it is one, comes with the text that was still held back. */
  accept(token: number): Accepted {
    this.#rankSum += this.#ranks.findLast(({ from }) => from < this.count)!.rank; // of the cell before it
    this.tokens[this.count] = token;
    this.count += 1;
    this.#counts.set(token, (this.#counts.get(token) ?? 0) + 1);
    const { text, stop } = this.#matcher.push(this.#detokenizer.push(token));
    if (stop !== null) return { text, end: { reason: 'stop', stopString: stop } };
    if (this.generatedCount < this.request.tokensMax) return { text, end: null };
    const rest = this.finish('length');
    return { text: text + rest.text, end: rest.end };
  }

  /** The end without another token: gives back what was held as half a character or half a stop string. */
  finish(reason: FinishReason): Accepted & { readonly end: SequenceEnd } {
    const { text, stop } = this.#matcher.push(this.#detokenizer.flush());
    if (stop !== null) return { text, end: { reason: 'stop', stopString: stop } };
    return { text: text + this.#matcher.flush(), end: { reason, stopString: null } };
  }

  /** The most that any cell is computed at: each has to be computed again when the cells are lost. */
  #wantsNow(): readonly Want[] {
    const most = Math.max(...this.#ranks.map(({ rank }) => rank));
    const wants = new Map<ResidentKey, number>();
    for (const part of this.loadable) {
      const rank = Math.max(this.partRank(part, most), wants.get(part.key) ?? 0);
      if (rank > 0) wants.set(part.key, rank);
    }
    return [...wants]
      .map(([key, rank]) => ({ key, rank }))
      .sort((a, b) => (a.key < b.key ? -1 : 1));
  }
}
