// One request's life with the engine: plan, submit its sequences, keep the figures, end exactly once. Holds the adapters'
// leases from before the plan to the last sequence's end; `end` may be called at any time.

import { setMaxListeners } from 'node:events';
import type { InferenceReport } from '../channels.ts';
import type {
  AdapterUse,
  EngineEvent,
  GenerateRequest,
  Sampling,
  Urgency,
} from '../engine/messages.ts';
import { GatewayError } from '../errors.ts';
import type { CapturedPrompt } from '../jobs/refresh-data.ts';
import type { OnlyAdapter } from '../router/archive-scores.ts';
import { remaining, wasMet } from '../router/budget.ts';
import type { Budget, Plan, RouteInput } from '../router/policy.ts';
import { madeBy, shownPlan } from './archive.ts';
import {
  engineUse,
  namesOf,
  routedAs,
  type Target,
  type UsedAdapter,
  usedAdapters,
} from './blend.ts';
import type { ServerDeps } from './deps.ts';
import type { FlyingSequence } from './in-flight.ts';
import { merge, type Tagged } from './merge.ts';
import { within } from './sse.ts';

export interface AnswerRequest {
  /** Unique to this answer; the sequences' ids are made from it. */
  readonly id: string;
  readonly tenant: string;
  readonly receivedMs: number;
  readonly target: Target;
  /** Of the archive, where a score of the answer counts; null: nowhere. */
  readonly row: string | null;
  /** The target's instruction in tokens. */
  readonly prior: AdapterUse['prior'];
  readonly prompts: readonly Int32Array[];
  /** Sequences per prompt. */
  readonly n: number;
  readonly tokensMax: number;
  /** Sequence i of a prompt draws with seed + i. */
  readonly sampling: Sampling;
  readonly stop: readonly string[];
  readonly topLogprobs: number | null;
  readonly budget: Budget;
  /** What the answer may be learnt with; null: it is not captured. Then there is one sequence, of one adapter. */
  readonly captured: CapturedPrompt | null;
}

/** As the router counts it, and its figures so far. */
interface Sequence extends FlyingSequence {
  queueMs: number | null;
  cachedTokens: number;
  /** Null until it has ended. */
  end: (EngineEvent & { readonly kind: 'end' }) | null;
}

export class Answer {
  readonly request: AnswerRequest;
  readonly used: readonly UsedAdapter[];
  /** What it was planned from. */
  readonly #input: RouteInput;
  readonly #plan: Plan;
  readonly #promptTokens: number;
  readonly #deps: ServerDeps;
  readonly #sequences: readonly Sequence[];
  readonly #controller = new AbortController();
  readonly #outside: readonly AbortSignal[];
  #events: AsyncGenerator<Tagged<EngineEvent>, void, void> | null = null;
  #first: Promise<IteratorResult<Tagged<EngineEvent>>> | null = null;
  /** Of a captured answer. */
  #text = '';
  #rankFalls = 0;
  #rankRises = 0;
  #ttftMs: number | null = null;
  #endedMs: number | null = null;
  #isComplete = false;
  #isEnded = false;

  /** Plans and takes over `request.target`. Throws what the policy throws; then its leases are still the caller's. */
  constructor(deps: ServerDeps, request: AnswerRequest, signal: AbortSignal) {
    const { prompts, n, target, budget, tokensMax } = request;
    this.#deps = deps;
    this.request = request;
    this.#promptTokens = prompts.reduce((sum, prompt) => sum + prompt.length, 0);
    const spentMs = deps.clock.nowMs() - request.receivedMs;
    this.#input = {
      // Tokenising and waiting for it are the budget's loss.
      budget: remaining(budget, spentMs),
      promptTokens: Math.max(...prompts.map((prompt) => prompt.length)),
      tokensMax,
      ...routedAs(target),
      load: deps.inFlight.load({
        count: prompts.length * n - 1,
        promptTokens: this.#promptTokens * n - prompts[0]!.length,
      }),
    };
    this.#plan = deps.router.route(this.#input);
    this.used = usedAdapters(target, this.#plan);
    this.#sequences = prompts.flatMap((prompt) =>
      Array.from({ length: n }, () => ({
        tenant: request.tenant,
        promptTokens: prompt.length,
        ranks: this.#plan.ranks,
        generations: this.used.map((one) => one.generation),
        adapters: target.merge === 'linear' ? this.used : [],
        isStarted: false,
        queueMs: null,
        cachedTokens: 0,
        completionTokens: 0,
        end: null,
      })),
    );
    // Every sequence listens, and Node warns of a leak beyond ten; this signal goes with the request.
    setMaxListeners(0, this.#controller.signal);
    this.#outside = [signal, deps.lifecycle.cutOff];
    for (const one of this.#outside) {
      if (one.aborted) this.#abort();
      else one.addEventListener('abort', this.#abort, { once: true });
    }
  }

  /** Submits, and waits for the first event or for `waitMs`, so that a refusal can still have its own status. */
  async start(waitMs: number): Promise<void> {
    const { inFlight, engine, clock } = this.#deps;
    for (const sequence of this.#sequences) inFlight.add(sequence);
    const { signal } = this.#controller;
    this.#events = merge(
      this.#sequences.map((_, index) => engine.submit(this.#request(index), signal)),
    );
    this.#first = this.#events.next();
    try {
      const first = await within(this.#first, clock, waitMs);
      // Its queue time goes into the headers; `events` will note it again, to the same effect.
      if (first?.done === false && first.value.value.kind === 'start') this.#note(first.value);
    } catch (error) {
      throw this.#blame(error);
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
    if (this.#sequences.some(({ end }) => end === null)) {
      throw new GatewayError('ENGINE_FAILED', 'a sequence ended without an end event');
    }
    this.#isComplete = true;
  }

  /** Stops compute; the events then fail with CANCELLED. */
  readonly #abort = (): void =>
    this.#controller.abort(new GatewayError('CANCELLED', 'the request was cancelled'));

  /** Gives back everything. Idempotent. What was not complete is cancelled. */
  end(): void {
    if (this.#isEnded) return;
    this.#isEnded = true;
    this.#endedMs ??= this.#deps.clock.nowMs();
    for (const one of this.#outside) one.removeEventListener('abort', this.#abort);
    if (!this.#isComplete) {
      this.#abort();
      this.#events?.return().catch(() => {});
      this.#first?.catch(() => {});
    }
    for (const sequence of this.#sequences) this.#deps.inFlight.remove(sequence);
    this.request.target.release();
    this.#settle();
  }

  report(): InferenceReport {
    const { request } = this;
    const sum = (figure: (sequence: Sequence) => number, of = this.#sequences): number =>
      of.reduce((total, sequence) => total + figure(sequence), 0);
    return {
      adapter: namesOf(request.target.parts) || null,
      generation: request.target.parts.map(({ lease }) => lease.generation).join() || null,
      ...shownPlan(this.#plan, request.target),
      rankMean: this.#rankMean,
      predictedMs: this.#plan.prediction?.totalMs ?? null,
      plannedToEndMs: this.#isComplete ? (this.#longest.end?.totalMs ?? null) : null,
      budgetMet: this.#budgetMet(),
      promptTokens: this.#promptTokens,
      completionTokens: sum((sequence) => sequence.completionTokens),
      // Sequences of one prompt share it: the first one's hit is the prompt's.
      cachedTokens: sum(
        (sequence) => sequence.cachedTokens,
        this.#sequences.filter((_, index) => index % request.n === 0),
      ),
      queueMs: this.#sequences.find(({ queueMs }) => queueMs !== null)?.queueMs ?? null,
      ttftMs: this.#ttftMs,
      totalMs: this.#totalMs,
      rankFalls: this.#rankFalls,
      rankRises: this.#rankRises,
      finishReasons: this.#sequences.flatMap(({ end }) => end?.reason ?? []),
    };
  }

  /** Per choice that has ended, how it weighted a queryable adapter's atoms. */
  get atoms(): ReadonlyArray<readonly (readonly number[])[]> {
    return this.#sequences.flatMap(({ end }) => (end?.atoms === undefined ? [] : [end.atoms]));
  }

  /** From the request's arrival. */
  get #totalMs(): number | null {
    return this.#endedMs === null ? null : this.#endedMs - this.request.receivedMs;
  }

  /** Cut by the drain, not by the client: whoever still reads shall know that another replica may answer. A full queue is
   *  said by the engine, which does not know how long it will be so. */
  #blame(error: unknown): unknown {
    if (!(error instanceof GatewayError)) return error;
    const { inFlight, lifecycle, router } = this.#deps;
    const { code, message, retryAfterS } = error;
    if (code === 'CANCELLED' && lifecycle.cutOff.aborted) {
      return new GatewayError('NO_CAPACITY', 'the server is shutting down', { retryAfterS: 5 });
    }
    if (code !== 'CONTENDED' || retryAfterS !== undefined) return error;
    const load = inFlight.load();
    return new GatewayError(code, message, { retryAfterS: router.retryAfterS(load) });
  }

  #request(index: number): GenerateRequest {
    const { request } = this;
    const { sampling } = request;
    return {
      id: `${request.id}-${index}`,
      tokens: request.prompts[Math.floor(index / request.n)]!,
      tokensMax: request.tokensMax,
      sampling: { ...sampling, seed: (sampling.seed + (index % request.n)) >>> 0 },
      stop: request.stop,
      topLogprobs: request.topLogprobs,
      adapter: engineUse(request.target, this.#plan, request.prior),
      tenant: request.tenant,
      urgency: this.#urgency(),
      tokensLikely: this.#deps.router.tokensLikely(this.#input),
    };
  }

  /** What is left of the budget: the engine counts from now on. A rank that the caller, the operator or the archive's cell
   *  says is not changed on the way. */
  #urgency(): Urgency {
    const { budget, receivedMs, target } = this.request;
    const left = remaining(budget, this.#deps.clock.nowMs() - receivedMs);
    const { totalMs: deadlineMs, ttftMs, perTokenMs, priority, rankMin, strict } = left;
    const isSaid = budget.rank !== null || target.rankLimit !== null;
    const rankIsFixed = isSaid || this.#plan.reason === 'configured';
    return { deadlineMs, ttftMs, perTokenMs, priority, rankMin, rankIsFixed, strict };
  }

  #note({ index, value: event }: Tagged<EngineEvent>): void {
    const sequence = this.#sequences[index]!;
    sequence.isStarted = true;
    switch (event.kind) {
      case 'start':
        sequence.queueMs = event.queueMs;
        sequence.cachedTokens = event.cachedTokens;
        break;
      case 'rank':
        if (event.reason === 'late') this.#rankFalls += 1;
        else this.#rankRises += 1;
        break;
      case 'piece':
        this.#ttftMs ??= this.#deps.clock.nowMs() - this.request.receivedMs;
        sequence.completionTokens += event.tokens.length;
        if (this.request.captured !== null) this.#text += event.text;
        break;
      case 'end':
        sequence.end = event;
        sequence.completionTokens = event.completionTokens;
        this.#deps.inFlight.remove(sequence);
        this.#endedMs = this.#deps.clock.nowMs();
        this.#ttftMs ??= this.#endedMs - this.request.receivedMs;
        break;
    }
  }

  /** Of the sequences that have ended; the engine may have changed ranks on the way. */
  get #rankMean(): number | null {
    const means = this.#sequences.flatMap(({ end }) => end?.rankMean ?? []);
    return means.length === 0 ? null : means.reduce((sum, mean) => sum + mean, 0) / means.length;
  }

  #budgetMet(): boolean | null {
    if (!this.#isComplete) return this.#wasGivenUpLate() ? false : null;
    // Sequences run side by side: the longest one sets the pace that was seen.
    const tokens = this.#longest.completionTokens;
    const times = { totalMs: this.#totalMs ?? 0, ttftMs: this.#ttftMs ?? 0, tokens };
    return wasMet(this.request.budget, times);
  }

  /** Its time was over: late, whoever gave it up. Before that nothing is known. */
  #wasGivenUpLate(): boolean {
    const { budget, receivedMs } = this.request;
    const agoMs = this.#deps.clock.nowMs() - receivedMs;
    return budget.totalMs !== null && agoMs > budget.totalMs;
  }

  get #longest(): Sequence {
    return this.#sequences.reduce((a, b) => (b.completionTokens > a.completionTokens ? b : a));
  }

  /** The engine's own times: ours stand still while the client does not read, and that says nothing of the machine. */
  #settle(): void {
    const { router } = this.#deps;
    const { budget } = this.#input;
    const judge = (met: boolean): void =>
      router.judge({ input: this.#input, plan: this.#plan, met, score: null });
    if (!this.#isComplete) {
      if (this.#wasGivenUpLate()) judge(false);
      return;
    }
    const { completionTokens, end } = this.#longest;
    if (end === null) return;
    const { ttftMs, totalMs } = end;
    router.settle({
      adapter: namesOf(this.request.target.parts) || null,
      prediction: this.#plan.prediction,
      tokensMax: this.request.tokensMax,
      completionTokens,
      load: this.#input.load,
      ttftMs,
      totalMs,
    });
    const met = wasMet(budget, { totalMs, ttftMs, tokens: completionTokens });
    if (met !== null) judge(met);
    if (this.#sequences.length === 1) this.#remember(totalMs);
  }

  /** For a score of it, which may come. */
  #remember(latencyMs: number): void {
    const { id, tenant, target } = this.request;
    const planned = { input: this.#input, plan: this.#plan };
    const [part] = target.parts;
    const rank = part === undefined ? 0 : this.used[0]!.rank;
    // Changed on the way, it is of no one rank: the policy hears of it, the archive does not.
    const row = part === undefined || this.#rankMean === rank ? this.request.row : null;
    const made = madeBy(target, rank);
    const { name, generation } = part?.lease ?? {};
    const isOnly = target.parts.length === 1 && rank > 0;
    const only = isOnly ? { name: name!, generation: generation! } : null;
    const answer = { ...made, tenant, row, latencyMs, planned, only };
    this.#deps.archive.scores.remember(id, answer);
    if (only !== null) this.#capture(only, rank);
  }

  /** What was cut off is learnt only as somebody corrects it. */
  #capture({ name: adapter, generation }: OnlyAdapter, rank: number): void {
    const { id, tenant, captured: prompt } = this.request;
    const { end } = this.#longest;
    if (prompt === null || end === null) return;
    const said = { prompt, answer: this.#text, isWhole: end.reason === 'stop' };
    const made = { id, tenant, adapter, generation, rank, ...said };
    this.#deps.training?.refresher.capture.offer(made);
  }
}
