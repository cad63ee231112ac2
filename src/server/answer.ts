// One request's life with the engine: plan, submit its sequences, keep the figures, end exactly once. Holds the adapter's
// lease from before the plan to the last sequence's end; `end` and `abort` may be called at any time, in any order.

import { setMaxListeners } from 'node:events';
import type { InferenceReport } from '../channels.ts';
import type { EngineEvent, FinishReason, GenerateRequest, Sampling } from '../engine/messages.ts';
import { GatewayError } from '../errors.ts';
import { meets, statesTime } from '../router/budget.ts';
import type { Budget, Plan } from '../router/policy.ts';
import type { ServerDeps } from './deps.ts';
import type { FlyingSequence } from './in-flight.ts';
import { merge, type Tagged } from './merge.ts';
import type { Target } from './model-reference.ts';

export interface AnswerRequest {
  /** Unique to this answer; the sequences' ids are made from it. */
  readonly id: string;
  readonly tenant: string;
  readonly receivedMs: number;
  readonly target: Target;
  readonly prompts: readonly Int32Array[];
  /** Sequences per prompt. */
  readonly n: number;
  readonly tokensMax: number;
  /** Sequence i of a prompt draws with seed + i. */
  readonly sampling: Sampling;
  readonly stop: readonly string[];
  readonly topLogprobs: number | null;
  readonly budget: Budget;
}

interface SequenceFigures {
  queueMs: number | null;
  cachedTokens: number;
  completionTokens: number;
  reason: FinishReason | null;
}

export class Answer {
  readonly plan: Plan;
  readonly request: AnswerRequest;
  readonly promptTokens: number;
  readonly #deps: ServerDeps;
  readonly #flying: readonly FlyingSequence[];
  readonly #figures: readonly SequenceFigures[];
  readonly #controller = new AbortController();
  readonly #unlink: () => void;
  readonly #plannedMs: number;
  #events: AsyncGenerator<Tagged<EngineEvent>, void, void> | null = null;
  #first: Promise<IteratorResult<Tagged<EngineEvent>>> | null = null;
  #ttftMs: number | null = null;
  #endedMs: number | null = null;
  #isComplete = false;
  #isEnded = false;

  /** Plans and takes over `request.target.lease`. Throws what the policy throws; then the lease is still the caller's. */
  constructor(deps: ServerDeps, request: AnswerRequest, signal: AbortSignal) {
    this.#deps = deps;
    this.request = request;
    this.promptTokens = request.prompts.reduce((sum, prompt) => sum + prompt.length, 0);
    this.plan = deps.route({
      budget: request.budget,
      promptTokens: Math.max(...request.prompts.map((prompt) => prompt.length)),
      tokensMax: request.tokensMax,
      adapter: adapterOf(request.target),
      load: deps.inFlight.load(deps.engine.stats().kvCellsUsed, {
        count: request.prompts.length * request.n - 1,
        promptTokens: this.promptTokens * request.n - request.prompts[0]!.length,
      }),
    });
    this.#plannedMs = deps.clock.nowMs();
    const generation = request.target.lease?.generation ?? null;
    this.#flying = request.prompts.flatMap((prompt) =>
      Array.from({ length: request.n }, () => ({
        promptTokens: prompt.length,
        rank: this.plan.rank,
        generation,
        isStarted: false,
      })),
    );
    this.#figures = this.#flying.map(() => ({
      queueMs: null,
      cachedTokens: 0,
      completionTokens: 0,
      reason: null,
    }));
    // Every sequence listens, and Node warns of a leak beyond ten; this signal goes with the request.
    setMaxListeners(0, this.#controller.signal);
    this.#unlink = linkSignals([signal, deps.lifecycle.cutOff], () => this.abort());
  }

  /** Submits, and waits for the first event or for `waitMs`, so that a refusal can still have its own status. */
  async start(waitMs: number): Promise<void> {
    for (const sequence of this.#flying) this.#deps.inFlight.add(sequence);
    const signal = this.#controller.signal;
    this.#events = merge(
      this.#flying.map((_, index) => this.#deps.engine.submit(this.#sequence(index), signal)),
    );
    this.#first = this.#events.next();
    const { promise, resolve } = timer();
    const cancel = this.#deps.clock.after(waitMs, resolve);
    try {
      const first = await Promise.race([this.#first, promise]);
      // Its queue time goes into the headers; `events` will note it again, to the same effect.
      if (first?.done === false && first.value.value.kind === 'start') this.#note(first.value);
    } catch (error) {
      throw this.#blame(error);
    } finally {
      cancel();
    }
  }

  /** Every event, each sequence's in order. To be called once, after `start`. */
  async *events(): AsyncGenerator<Tagged<EngineEvent>, void, void> {
    if (this.#events === null || this.#first === null) throw new Error('the answer is not started');
    try {
      let next = await this.#first;
      while (next.done !== true) {
        this.#note(next.value);
        yield next.value;
        next = await this.#events.next();
      }
    } catch (error) {
      throw this.#blame(error);
    }
    if (this.#figures.some((figures) => figures.reason === null)) {
      throw new GatewayError('ENGINE_FAILED', 'a sequence ended without an end event');
    }
    this.#isComplete = true;
  }

  /** Stops compute; the events then fail with CANCELLED. */
  abort(): void {
    this.#controller.abort(new GatewayError('CANCELLED', 'the request was cancelled'));
  }

  /** Gives back everything. Idempotent. What was not complete is cancelled. */
  end(): void {
    if (this.#isEnded) return;
    this.#isEnded = true;
    this.#endedMs ??= this.#deps.clock.nowMs();
    this.#unlink();
    if (!this.#isComplete) {
      this.abort();
      this.#events?.return().catch(() => {});
      this.#first?.catch(() => {});
    }
    for (const sequence of this.#flying) this.#deps.inFlight.remove(sequence);
    this.request.target.lease?.release();
    if (this.#isComplete) this.#settle(this.#endedMs);
  }

  /** Queue time of the first sequence that got its cells; null before. */
  get queueMs(): number | null {
    return this.#figures.find((figures) => figures.queueMs !== null)?.queueMs ?? null;
  }

  get cachedTokens(): number {
    // Sequences of one prompt share it: the first one's hit is the prompt's.
    return this.#figures
      .filter((_, index) => index % this.request.n === 0)
      .reduce((sum, figures) => sum + figures.cachedTokens, 0);
  }

  get completionTokens(): number {
    return this.#figures.reduce((sum, figures) => sum + figures.completionTokens, 0);
  }

  /** From the request's arrival; null before. */
  get ttftMs(): number | null {
    return this.#ttftMs;
  }

  get totalMs(): number | null {
    return this.#endedMs === null ? null : this.#endedMs - this.request.receivedMs;
  }

  report(): InferenceReport {
    const { plan, request } = this;
    return {
      adapter: request.target.lease?.name ?? null,
      generation: request.target.lease?.generation ?? null,
      rank: plan.rank,
      rankMax: plan.rankMax,
      reason: plan.reason,
      predictedMs: plan.prediction?.totalMs ?? null,
      plannedToEndMs:
        this.#isComplete && this.#endedMs !== null ? this.#endedMs - this.#plannedMs : null,
      budgetMet: this.#isComplete ? this.#budgetMet() : null,
      promptTokens: this.promptTokens,
      completionTokens: this.completionTokens,
      cachedTokens: this.cachedTokens,
      queueMs: this.queueMs,
      ttftMs: this.#ttftMs,
      totalMs: this.totalMs,
      finishReasons: this.#figures.flatMap((figures) => figures.reason ?? []),
    };
  }

  /** Cut by the drain, not by the client: whoever still reads shall know that another replica may answer. */
  #blame(error: unknown): unknown {
    const isCancelled = error instanceof GatewayError && error.code === 'CANCELLED';
    if (!isCancelled || !this.#deps.lifecycle.cutOff.aborted) return error;
    return new GatewayError('NO_CAPACITY', 'the server is shutting down', { retryAfterS: 5 });
  }

  #sequence(index: number): GenerateRequest {
    const { request, plan } = this;
    const { lease } = request.target;
    const { sampling } = request;
    return {
      id: `${request.id}-${index}`,
      tokens: request.prompts[Math.floor(index / request.n)]!,
      tokensMax: request.tokensMax,
      sampling: { ...sampling, seed: (sampling.seed + (index % request.n)) >>> 0 },
      stop: request.stop,
      topLogprobs: request.topLogprobs,
      adapter: lease === null ? null : { generation: lease.generation, rank: plan.rank },
      tenant: request.tenant,
    };
  }

  #note({ index, value: event }: Tagged<EngineEvent>): void {
    const figures = this.#figures[index]!;
    const sequence = this.#flying[index]!;
    sequence.isStarted = true;
    switch (event.kind) {
      case 'start':
        figures.queueMs = event.queueMs;
        figures.cachedTokens = event.cachedTokens;
        break;
      case 'piece':
        this.#ttftMs ??= this.#deps.clock.nowMs() - this.request.receivedMs;
        figures.completionTokens += event.tokens.length;
        break;
      case 'end':
        figures.reason = event.reason;
        figures.completionTokens = event.completionTokens;
        this.#deps.inFlight.remove(sequence);
        this.#endedMs = this.#deps.clock.nowMs();
        this.#ttftMs ??= this.#endedMs - this.request.receivedMs;
        break;
    }
  }

  #budgetMet(): boolean | null {
    const { budget } = this.request;
    if (!statesTime(budget)) return null;
    const [totalMs, ttftMs] = [this.totalMs ?? 0, this.#ttftMs ?? 0];
    // Sequences run side by side: the longest one sets the pace that was seen.
    const later = Math.max(...this.#figures.map((figures) => figures.completionTokens)) - 1;
    return meets(budget, { totalMs, ttftMs, perTokenMs: (totalMs - ttftMs) / Math.max(1, later) });
  }

  #settle(endedMs: number): void {
    const { request, plan } = this;
    this.#deps.settle({
      adapter: request.target.lease?.name ?? null,
      prediction: plan.prediction,
      tokensMax: request.tokensMax,
      completionTokens: Math.max(...this.#figures.map((figures) => figures.completionTokens)),
      ttftMs: request.receivedMs + (this.#ttftMs ?? 0) - this.#plannedMs,
      totalMs: endedMs - this.#plannedMs,
    });
  }
}

function adapterOf({ lease }: Target): Parameters<ServerDeps['route']>[0]['adapter'] {
  if (lease === null) return null;
  const { rankMax, rankCurve } = lease.manifest;
  return { name: lease.name, generation: lease.generation, rankMax, rankCurve };
}

function timer(): { promise: Promise<null>; resolve: () => void } {
  let resolve: () => void = () => {};
  const promise = new Promise<null>((settle) => {
    resolve = () => settle(null);
  });
  return { promise, resolve };
}

/** Calls `onAbort` at the first abort of any, also when it lies in the past. Returns the function that unlinks. */
function linkSignals(signals: readonly AbortSignal[], onAbort: () => void): () => void {
  for (const signal of signals) {
    if (signal.aborted) onAbort();
    else signal.addEventListener('abort', onAbort, { once: true });
  }
  return () => {
    for (const signal of signals) signal.removeEventListener('abort', onAbort);
  };
}

export function cancelledIfAborted(signal: AbortSignal): void {
  if (signal.aborted) throw new GatewayError('CANCELLED', 'the client went away');
}
