// The loop: the one place that touches the stepper, the cells and the adapter pages. A tick admits (roster.ts), plans,
// computes one step and tells what came of it; between ticks the event loop runs, so a cancel takes effect within one step.
// Never sleeps while there is work, never polls while there is none.

import type { Generation } from '../adapters/adapter.ts';
import type { Residency, ResidentKey } from '../adapters/residency.ts';
import { GatewayError } from '../errors.ts';
import type { RowMath } from '../kernels/row-math.ts';
import type { Stepper, StepResult } from '../model/stepper.ts';
import { type Chosen, chooseSegment, describeToken, workOf } from './batch.ts';
import type { EngineClock } from './clock.ts';
import { planRanks } from './governor.ts';
import type {
  BaseInfo,
  EngineStats,
  FromEngine,
  GenerateRequest,
  HotAdapter,
  RankChange,
  StepCosts,
} from './messages.ts';
import { Outbox } from './outbox.ts';
import type { PrefixCache } from './prefix-cache.ts';
import { type QueueLimits, Roster } from './roster.ts';
import { Sampler } from './sampler.ts';
import { type Moment, planStep, type StepLimits } from './scheduler.ts';
import type { Sequence, SequenceEnd } from './sequence.ts';
import { draftAll, RowCost, type SpeculationWish } from './speculation.ts';
import { TenantCredit } from './tenant-credit.ts';
import type { StepWatch } from './thread-governor.ts';

export interface LoopLimits extends QueueLimits {
  /** Prompt tokens per step (scheduler.ts). */
  readonly prefillTokensMax: number;
}

export interface LoopOptions {
  readonly base: BaseInfo;
  readonly stepper: Stepper;
  readonly residency: Residency;
  readonly cache: PrefixCache;
  readonly limits: LoopLimits;
  /** A token's bytes as the reader sees them: empty for control tokens. */
  readonly bytesOf: (token: number) => Uint8Array;
  readonly clock: EngineClock;
  readonly watch: StepWatch;
  /** `auto` when absent. */
  readonly speculation?: SpeculationWish;
  /** Plain JavaScript's when there is none. */
  readonly rowMath?: RowMath;
  /** HostTier.changed; there is none when absent. */
  readonly hosted?: () => readonly ResidentKey[] | null;
  /** Must not throw; called within a tick, in order. */
  readonly emit: (message: FromEngine) => void;
}

export class EngineLoop {
  readonly base: BaseInfo;
  readonly #options: LoopOptions;
  readonly #stepLimits: StepLimits;
  readonly #endTokens: ReadonlySet<number>;
  readonly #sampler: Sampler;
  readonly #outbox: Outbox;
  readonly #roster: Roster;
  readonly #rowCost: RowCost = new RowCost();
  readonly #credit: TenantCredit = new TenantCredit();
  #costs: StepCosts | null = null;
  #steps = 0;
  #tokens = 0;
  #drafts = 0;
  #draftsAccepted = 0;
  #isScheduled = false;
  #isStopped = false;

  constructor(options: LoopOptions) {
    const { stepper, limits, base } = options;
    this.base = base;
    this.#options = options;
    const { tokensMax, segmentsMax } = stepper;
    this.#stepLimits = { tokensMax, segmentsMax, prefillTokensMax: limits.prefillTokensMax };
    this.#endTokens = new Set(base.endTokens);
    this.#outbox = new Outbox(options.emit);
    this.#sampler = new Sampler(base.config.vocabSize, options.rowMath);
    const wake = (): void => this.#wake();
    this.#roster = new Roster({ ...options, outbox: this.#outbox, wake });
  }

  /** Queues a request; with what its reader has of the answer when an engine before this one began it. */
  submit(
    request: GenerateRequest,
    generated: Int32Array = new Int32Array(0),
    rankChanges: readonly RankChange[] = [],
  ): void {
    this.#roster.add(request, generated, rankChanges);
  }

  /** No effect on an id that has ended. What it held is free when this returns. */
  cancel(id: string): void {
    this.#roster.cancel(id);
    this.#wake();
  }

  unload(generation: Generation): void {
    this.#options.residency.unload(generation);
    this.#wake();
  }

  pin(generations: readonly Generation[]): void {
    this.#options.residency.pin(generations);
    this.#wake();
  }

  prewarm(hot: readonly HotAdapter[]): void {
    this.#roster.prewarm(hot);
    this.#wake();
  }

  /** What steps are sized and ranks are governed by from now on; before, neither is. */
  setCosts(costs: StepCosts): void {
    this.#costs = costs;
  }

  /** Ends all ticking. The stepper may be disposed of afterwards. */
  stop(): void {
    this.#isStopped = true;
  }

  stats(): EngineStats {
    const { cache, stepper, residency, watch } = this.#options;
    const { tokensQueried, tokensHit } = cache.counters();
    const { running, waiting, preemptions, prewarms } = this.#roster;
    return {
      running: running.size,
      waiting,
      kvCellsUsed: cache.cellsUsed(),
      kvCellsMax: stepper.cells,
      residents: residency.list(),
      adapterSlotsMax: residency.pagesMax,
      preemptions,
      prewarms: prewarms.made,
      prewarmsUsed: prewarms.used,
      threads: watch.threads,
      steps: this.#steps,
      tokensGenerated: this.#tokens,
      draftTokens: this.#drafts,
      draftTokensAccepted: this.#draftsAccepted,
      prefixTokensQueried: tokensQueried,
      prefixTokensHit: tokensHit,
    };
  }

  #statsToTell(): EngineStats {
    const hosted = this.#options.hosted?.() ?? null;
    return hosted === null ? this.stats() : { ...this.stats(), hosted };
  }

  #wake(): void {
    if (this.#isScheduled || this.#isStopped) return;
    this.#isScheduled = true;
    // setImmediate, not a microtask: messages that arrived during the step are handled before the next one.
    setImmediate(() => {
      this.#isScheduled = false;
      if (!this.#isStopped) this.#tick();
    });
  }

  #tick(): void {
    const { waiting } = this.#roster;
    this.#roster.advance(this.#steps);
    this.#outbox.flush(); // a start is out before the step that may kill the process: supervisor.ts counts on it
    const isRunning = this.#roster.running.size > 0;
    if (isRunning) this.#step();
    else this.#outbox.stats(this.#statsToTell());
    const { prospects } = this.#roster;
    const isMoving = isRunning || this.#roster.waiting !== waiting;
    if (!isMoving && prospects === 'stuck') this.#roster.giveUp();
    if (isMoving || prospects !== 'later') this.#wake();
  }

  #step(): void {
    this.#steps += 1;
    const { clock, stepper, watch } = this.#options;
    const nowMs = clock.nowMs();
    const moment: Moment = {
      ...{ step: this.#steps, nowMs, costs: this.#costs },
      creditMs: (tenant) => this.#credit.of(tenant, nowMs),
    };
    this.#govern(moment);
    const batch = this.#choose(moment);
    if (batch.length === 0) return; // the governor failed the last of them
    const startMs = clock.nowMs();
    try {
      watch.begin();
      const result = stepper.step(batch.map((one) => one.segment));
      const work = workOf(batch);
      watch.end(work);
      if (work.prefillTokens === 0) {
        this.#rowCost.observe(work.decodeRows, clock.nowMs() - startMs);
      }
      for (const [i, chosen] of batch.entries()) this.#settle(chosen, result, i);
    } catch (error) {
      this.#stepAlone(batch, error);
    }
    this.#outbox.step({ ms: clock.nowMs() - startMs, ...workOf(batch) }, this.#statsToTell());
  }

  /** A step that throws has computed nothing. One bad sequence must not fail the rest, so each is tried by itself. */
  #stepAlone(batch: readonly Chosen[], cause: unknown): void {
    for (const chosen of batch) {
      try {
        if (batch.length === 1) throw cause;
        this.#settle(chosen, this.#options.stepper.step([chosen.segment]), 0);
      } catch (error) {
        this.#fail(chosen.sequence, error);
      }
    }
  }

  #govern(moment: Moment): void {
    for (const { row, rank, reason } of planRanks([...this.#roster.running.values()], moment)) {
      try {
        this.#roster.changeRank(row, rank);
        row.rankStep = this.#steps;
        this.#outbox.event(row.id, { kind: 'rank', rank, reason });
      } catch (error) {
        this.#fail(row, error);
      }
    }
  }

  #choose(moment: Moment): Chosen[] {
    const { segments, spentMs } = planStep(
      [...this.#roster.running.values()],
      this.#stepLimits,
      moment,
    );
    if (moment.costs !== null) this.#credit.charge(spentMs, moment.nowMs);
    const plan = segments.map(({ id, count }) => ({
      sequence: this.#roster.running.get(id)!,
      count,
    }));
    const drafts = this.#draft(plan.map((one) => one.sequence));
    return plan.map(({ sequence, count }) => {
      sequence.lastStep = this.#steps;
      return chooseSegment(sequence, count, drafts.get(sequence) ?? 0);
    });
  }

  /** Beside a prompt nobody guesses: its tokens use the step's compute already. */
  #draft(sequences: readonly Sequence[]): ReadonlyMap<Sequence, number> {
    const { speculation = 'auto', stepper } = this.#options;
    if (speculation === 'off' || sequences.some((one) => one.promptTokensLeft > 0)) {
      return new Map();
    }
    const room = Math.min(stepper.tokensMax, stepper.segmentsMax) - sequences.length;
    return draftAll(sequences, room, this.#rowCost.share(sequences.length));
  }

  /** Takes the tokens that the step decided: one, and one more behind every guess that it turned out to be. */
  #settle({ sequence, segment }: Chosen, result: StepResult, index: number): void {
    try {
      const { wantsLogits, drafts = 0 } = segment;
      this.#advance(sequence, segment.tokens.length - drafts);
      if (!wantsLogits) return;
      sequence.noteAtoms(result.atomWeights(index));
      let accepted = 0;
      let isRight = this.#take(sequence, result.logits(index));
      while (isRight && accepted < drafts) {
        accepted += 1;
        this.#advance(sequence, 1);
        isRight = this.#take(sequence, result.logits(index, accepted));
      }
      sequence.drafter.learn(accepted, accepted < drafts);
      this.#drafts += drafts;
      this.#draftsAccepted += accepted;
    } catch (error) {
      this.#fail(sequence, error);
    }
  }

  /** `count` more tokens lie in cells, and are no guesses. */
  #advance(sequence: Sequence, count: number): void {
    sequence.position += count;
    const shared = Math.min(sequence.position, sequence.sharedCells);
    this.#options.cache.fill(sequence.holdings!.cells.hold, sequence.tokens, shared);
  }

  /** Draws the next token and tells of it; whether the guess in its place is the same, and the answer goes on. */
  #take(sequence: Sequence, logits: Float32Array): boolean {
    const { id, request, history, generatedCount } = sequence;
    const guess = sequence.tokens[sequence.count];
    const token = this.#sampler.sample(logits, request.sampling, history, generatedCount);
    if (this.#endTokens.has(token)) {
      const { text, end } = sequence.finish('stop');
      if (text !== '') this.#outbox.event(id, { kind: 'piece', text, tokens: [] });
      this.#end(sequence, end);
      return false;
    }
    this.#tokens += 1;
    sequence.noteFirstToken(this.#options.clock.nowMs());
    const { topLogprobs } = request;
    const logprobs =
      topLogprobs === null ? null : this.#sampler.logprobs(logits, token, topLogprobs);
    const generated = describeToken(token, logprobs, this.#options.bytesOf);
    const { text, end } = sequence.accept(token);
    this.#outbox.event(id, { kind: 'piece', text, tokens: [generated] });
    if (end !== null) this.#end(sequence, end);
    return end === null && token === guess;
  }

  #end(sequence: Sequence, end: SequenceEnd): void {
    const nowMs = this.#options.clock.nowMs();
    const { atoms, rankMean } = sequence;
    this.#outbox.event(sequence.id, {
      kind: 'end',
      ...end,
      rankMean,
      ...(atoms === null ? {} : { atoms }),
      completionTokens: sequence.generatedCount,
      ttftMs: (sequence.firstTokenMs ?? nowMs) - sequence.submittedMs,
      totalMs: nowMs - sequence.submittedMs,
    });
    this.#roster.leave(sequence, 'cells-valid');
  }

  #fail(sequence: Sequence, error: unknown): void {
    const known = error instanceof GatewayError && error.code === 'ENGINE_FAILED';
    this.#roster.leave(sequence, 'cells-suspect');
    this.#outbox.failed(
      sequence.id,
      known ? error : new GatewayError('ENGINE_FAILED', 'a step failed', { cause: error }),
    );
  }
}
