// The loop: the one place that touches the stepper, the cells and the adapter pages. A tick admits, plans, computes one
// step and tells what came of it; between ticks the event loop runs, so a cancel takes effect within one step. Never
// sleeps while there is work, never polls while there is none. A sequence keeps the cells, the pages and the generation
// it was admitted with until it ends (invariants I1 to I3 of faults.md section 2).

import type { Generation } from '../adapters/adapter.ts';
import type { Residency } from '../adapters/residency.ts';
import { asGatewayError, GatewayError } from '../errors.ts';
import type { RowMath } from '../kernels/row-math.ts';
import type { Stepper, StepResult } from '../model/stepper.ts';
import { AdapterLoader, isSame, isWithin, type Want } from './adapter-loading.ts';
import { Admission } from './admission.ts';
import { type Chosen, chooseSegment, describeToken, workOf } from './batch.ts';
import type { EngineClock } from './clock.ts';
import type { BaseInfo, EngineStats, FromEngine, GenerateRequest, HotAdapter } from './messages.ts';
import { Outbox } from './outbox.ts';
import type { PrefixCache } from './prefix-cache.ts';
import { Sampler } from './sampler.ts';
import { planStep, type StepLimits } from './scheduler.ts';
import { Sequence, type SequenceEnd } from './sequence.ts';
import { draftAll, RowCost, type SpeculationWish } from './speculation.ts';
import type { StepWatch } from './thread-governor.ts';

export interface LoopLimits {
  /** Sequences that wait, and the prompt tokens they may bring together. */
  readonly waitingMax: number;
  readonly waitingTokensMax: number;
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
  /** Must not throw; called within a tick, in order. */
  readonly emit: (message: FromEngine) => void;
}

export class EngineLoop {
  readonly base: BaseInfo;
  readonly #options: LoopOptions;
  readonly #stepLimits: StepLimits;
  readonly #endTokens: ReadonlySet<number>;
  readonly #sampler: Sampler;
  readonly #loader: AdapterLoader;
  readonly #admission: Admission;
  readonly #waiting: Map<string, Sequence> = new Map();
  readonly #running: Map<string, Sequence> = new Map();
  readonly #outbox: Outbox;
  readonly #rowCost: RowCost = new RowCost();
  #arrivals = 0;
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
    this.#loader = new AdapterLoader(options.residency, {
      wake: () => this.#wake(),
      isAwaited: (set) => [...this.#waiting.values()].some(({ wants }) => isSame(wants, set)),
      onFailed: (set, error) => this.#failWaiting(set, error),
    });
    this.#admission = new Admission({ ...options, loader: this.#loader });
  }

  /** Queues a request. `generated` are tokens of its answer that the reader has already (sequence.ts): such a request
   *  was accepted before, so it is not refused for a full queue. */
  submit(request: GenerateRequest, generated: Int32Array = new Int32Array(0)): void {
    try {
      if (this.#waiting.has(request.id) || this.#running.has(request.id)) {
        throw new GatewayError('INTERNAL', `request id ${request.id} is in use`);
      }
      this.#admission.check(request);
      if (generated.length === 0) this.#checkQueue(request);
      this.#arrivals += 1;
      const sequence = new Sequence({
        request,
        generated,
        arrival: this.#arrivals,
        submittedMs: this.#options.clock.nowMs(),
        bytesOf: this.#options.bytesOf,
      });
      this.#waiting.set(request.id, sequence);
      this.#wake();
    } catch (error) {
      this.#outbox.failed(request.id, asGatewayError(error));
    }
  }

  /** No effect on an id that has ended. What it held is free when this returns. */
  cancel(id: string): void {
    this.#waiting.delete(id);
    const sequence = this.#running.get(id);
    if (sequence !== undefined) this.#leave(sequence, 'cells-valid');
    this.#loader.letGo();
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
    this.#loader.prewarm(hot);
    this.#wake();
  }

  /** Ends all ticking. The stepper may be disposed of afterwards. */
  stop(): void {
    this.#isStopped = true;
  }

  stats(): EngineStats {
    const { cache, stepper, residency, watch } = this.#options;
    const { tokensQueried, tokensHit } = cache.counters();
    return {
      running: this.#running.size,
      waiting: this.#waiting.size,
      kvCellsUsed: cache.cellsUsed(),
      kvCellsMax: stepper.cells,
      residents: residency.list(),
      adapterSlotsMax: residency.pagesMax,
      threads: watch.threads,
      steps: this.#steps,
      tokensGenerated: this.#tokens,
      draftTokens: this.#drafts,
      draftTokensAccepted: this.#draftsAccepted,
      prefixTokensQueried: tokensQueried,
      prefixTokensHit: tokensHit,
    };
  }

  #checkQueue(request: GenerateRequest): void {
    const { waitingMax, waitingTokensMax } = this.#options.limits;
    let tokens = request.tokens.length;
    for (const one of this.#waiting.values()) tokens += one.request.tokens.length;
    if (this.#waiting.size < waitingMax && (tokens <= waitingTokensMax || this.#waiting.size === 0))
      return;
    throw new GatewayError(
      'CONTENDED',
      `${this.#waiting.size} requests wait with ${tokens - request.tokens.length} prompt tokens`,
    );
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
    const waiting = this.#waiting.size;
    this.#loader.advance();
    this.#admit();
    // Once more for the load that the next in line needs: its file is read during this step, not the one after.
    if (this.#loader.letGo() && this.#waiting.size > 0) this.#admit();
    this.#loader.warm();
    this.#outbox.flush(); // a start is out before the step that may kill the process: supervisor.ts counts on it
    const isRunning = this.#running.size > 0;
    if (isRunning) this.#step();
    else this.#outbox.stats(this.stats());
    const { progress } = this.#loader;
    if (isRunning || progress === 'more' || this.#waiting.size !== waiting) this.#wake();
    else if (waiting > 0 && progress !== 'reading') this.#giveUp();
  }

  #admit(): void {
    for (const decision of this.#admission.run(this.#waiting.values(), this.#running.values())) {
      const { sequence, error } = decision;
      this.#waiting.delete(sequence.id);
      if (error !== null) {
        this.#outbox.failed(sequence.id, error);
        continue;
      }
      this.#running.set(sequence.id, sequence);
      const queueMs = this.#options.clock.nowMs() - sequence.submittedMs;
      const cachedTokens = sequence.position;
      this.#outbox.event(sequence.id, { kind: 'start', queueMs, cachedTokens });
    }
  }

  /** Adapters that fit one by one and not together; anything else is a bug, for an idle engine has room for whatever
   *  Admission.check let in: better one failed request with a name to look for than a queue that nobody serves. */
  #giveUp(): void {
    if (this.#loader.progress === 'no-room') {
      this.#loader.refuse();
      this.#wake();
      return;
    }
    const [first] = this.#waiting.values();
    if (first === undefined) return;
    this.#waiting.delete(first.id);
    this.#outbox.failed(first.id, new GatewayError('INTERNAL', 'no room in an idle engine'));
    this.#wake();
  }

  #step(): void {
    this.#steps += 1;
    const batch = this.#choose();
    const { clock, stepper, watch } = this.#options;
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
    this.#outbox.step({ ms: clock.nowMs() - startMs, ...workOf(batch) }, this.stats());
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

  #choose(): Chosen[] {
    const plan = planStep([...this.#running.values()], this.#stepLimits).map(({ id, count }) => ({
      sequence: this.#running.get(id)!,
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
    this.#options.cache.fill(sequence.holdings!.cells.hold, sequence.tokens, sequence.position);
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
    sequence.firstTokenMs ??= this.#options.clock.nowMs();
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
    const { atoms } = sequence;
    this.#outbox.event(sequence.id, {
      kind: 'end',
      ...end,
      ...(atoms === null ? {} : { atoms }),
      completionTokens: sequence.generatedCount,
      ttftMs: (sequence.firstTokenMs ?? nowMs) - sequence.submittedMs,
      totalMs: nowMs - sequence.submittedMs,
    });
    this.#leave(sequence, 'cells-valid');
  }

  #fail(sequence: Sequence, error: unknown): void {
    const known = error instanceof GatewayError && error.code === 'ENGINE_FAILED';
    this.#leave(sequence, 'cells-suspect');
    this.#outbox.failed(
      sequence.id,
      known ? error : new GatewayError('ENGINE_FAILED', 'a step failed', { cause: error }),
    );
  }

  #leave(sequence: Sequence, cells: 'cells-valid' | 'cells-suspect'): void {
    this.#running.delete(sequence.id);
    const { holdings } = sequence;
    sequence.holdings = null;
    if (holdings === null) return;
    for (const one of holdings.adapters) one.release();
    if (cells === 'cells-valid') this.#options.cache.retire(holdings.cells.hold);
    else this.#options.cache.drop(holdings.cells.hold);
  }

  #failWaiting(set: readonly Want[], error: GatewayError): void {
    for (const sequence of [...this.#waiting.values()]) {
      if (!isWithin(set, sequence.wants)) continue;
      this.#waiting.delete(sequence.id);
      this.#outbox.failed(sequence.id, error);
    }
  }
}
