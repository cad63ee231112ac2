// An Engine for HTTP tests: deterministic, no tensors, no process. The answer is a pure function of (tokens, adapter
// generation, rank), one made-up word a token, so that a test sees at once whether the right adapter and rank arrived.
// Time passes only by the clock it is given: with `stepMs` 0 (the default) every step runs in the next microtask turn.

import type { Generation } from '../../src/adapters/adapter.ts';
import type { Engine } from '../../src/engine/engine.ts';
import { EventStream } from '../../src/engine/event-stream.ts';
import { allParts } from '../../src/engine/loadable.ts';
import type {
  AdapterPart,
  BaseInfo,
  EngineEvent,
  EngineStats,
  GeneratedToken,
  GenerateRequest,
  StepReport,
  TokenLogprob,
} from '../../src/engine/messages.ts';
import { GatewayError } from '../../src/errors.ts';
import { createManualClock, type ManualClock } from './manual-clock.ts';

const fakeVocabSize = 512;
const fakeEndToken = 2;

const fakeBase: BaseInfo = {
  config: {
    family: 'llama',
    name: 'fake',
    blocks: 2,
    width: 64,
    heads: 4,
    kvHeads: 2,
    headSize: 16,
    ffnWidth: 128,
    vocabSize: fakeVocabSize,
    contextLength: 2048,
    ropeSize: 16,
    ropeBase: 10_000,
    ropeStyle: 'norm',
    normEps: 1e-5,
    tiedEmbeddings: true,
  },
  hash: 'f'.repeat(64),
  contextMax: 2048,
  endTokens: [fakeEndToken],
  backend: 'fake engine',
};

/** FNV-1a over 32-bit words. */
function mix(hash: number, word: number): number {
  let h = hash;
  for (let shift = 0; shift < 32; shift += 8) {
    h = Math.imul(h ^ ((word >>> shift) & 0xff), 0x01000193);
  }
  return h >>> 0;
}

function mixText(hash: number, text: string): number {
  return [...text].reduce((h, character) => mix(h, character.codePointAt(0)!), hash);
}

const onsets = ['b', 'd', 'f', 'g', 'k', 'l', 'm', 'n', 'p', 'r', 's', 't', 'v', 'z', 'ch', 'sh'];
const vowels = ['a', 'e', 'i', 'o', 'u', 'ai', 'ou', 'ei'];

/** Every token of the fake vocabulary is a word with a space before it. */
function fakeTokenText(token: number): string {
  const first = onsets[token % 16]! + vowels[(token >>> 4) % 8]!;
  return token >>> 7 === 0 ? ` ${first}` : ` ${first}${onsets[(token >>> 7) % 16]!}o`;
}

function partsOf({ adapter }: Pick<GenerateRequest, 'adapter'>): readonly AdapterPart[] {
  return adapter === null ? [] : allParts(adapter);
}

/** What the fake engine answers: `count` token ids, for any prompt, adapter and rank. Never the end token. */
function fakeAnswer(request: Pick<GenerateRequest, 'tokens' | 'adapter'>, count: number): number[] {
  let hash = 0x811c9dc5;
  for (const token of request.tokens) hash = mix(hash, token);
  // Rank 0 is the base model's answer, whatever the adapter.
  for (const { generation, rank, weight } of partsOf(request)) {
    if (rank > 0) hash = mix(mix(mixText(hash, generation), rank), weight * 1000);
  }
  return Array.from({ length: count }, (_, i) => 3 + (mix(hash, i) % (fakeVocabSize - 3)));
}

export function fakeAnswerText(
  request: Pick<GenerateRequest, 'tokens' | 'adapter'>,
  count: number,
): string {
  return fakeAnswer(request, count).map(fakeTokenText).join('');
}

export interface FakeFailure {
  readonly error: GatewayError;
  /** Tokens that are delivered first. */
  readonly afterTokens: number;
}

export interface FakeEngineOptions {
  readonly clock?: ManualClock;
  /** Clock time a step takes: one token for every running sequence. 0 = no clock at all. */
  readonly stepMs?: number;
  /** Clock time before a sequence's `start`. */
  readonly queueMs?: number;
  /** The sequence ends by itself (`stop`) after this many tokens, when tokensMax is not smaller. */
  readonly naturalLength?: number;
  readonly cachedTokens?: number;
  readonly waitingMax?: number;
  readonly bufferedEventsMax?: number;
  readonly base?: BaseInfo;
}

interface Flight {
  readonly request: GenerateRequest;
  readonly stream: EventStream;
  readonly answer: readonly number[];
  readonly submittedMs: number;
  isStarted: boolean;
  sent: number;
  text: string;
  shown: number;
  ttftMs: number;
}

export class FakeEngine implements Engine {
  readonly base: BaseInfo;
  readonly clock: ManualClock;
  /** Every request that was submitted, oldest first. */
  readonly requests: GenerateRequest[] = [];
  readonly cancelled: string[] = [];
  readonly unloads: Generation[] = [];
  pinned: readonly Generation[] = [];
  isUp = true;
  isClosed = false;
  readonly #options: FakeEngineOptions;
  readonly #flights: Map<string, Flight> = new Map();
  readonly #listeners: Set<(report: StepReport) => void> = new Set();
  readonly #residents: Set<Generation> = new Set();
  #failures: FakeFailure[] = [];
  #isHeld = false;
  #isScheduled = false;
  #steps = 0;
  #tokens = 0;
  #lastTokenMs: number | null = null;

  constructor(options: FakeEngineOptions = {}) {
    this.#options = options;
    this.base = options.base ?? fakeBase;
    this.clock = options.clock ?? createManualClock();
  }

  submit(request: GenerateRequest, signal: AbortSignal): AsyncIterable<EngineEvent> {
    this.requests.push(request);
    const stream = new EventStream(this.#options.bufferedEventsMax ?? 4096, () => {
      this.#flights.delete(request.id);
      this.cancelled.push(request.id);
    });
    const refusal = this.#refusal(request);
    if (refusal !== null) {
      stream.fail(refusal);
      return stream;
    }
    this.#flights.set(request.id, this.#takeOff(request, stream));
    const abort = (): void => stream.cancel();
    signal.addEventListener('abort', abort, { once: true });
    if (signal.aborted) abort();
    else this.#schedule(this.#options.queueMs ?? 0);
    return stream;
  }

  #refusal(request: GenerateRequest): GatewayError | null {
    if (this.isClosed) return new GatewayError('NO_CAPACITY', 'the engine is draining');
    if (this.#flights.has(request.id)) throw new Error(`request id ${request.id} is in use`);
    if (request.tokens.length + request.tokensMax > this.base.contextMax) {
      return new GatewayError('CONTEXT_LENGTH_EXCEEDED', 'prompt and answer do not fit');
    }
    if (this.#flights.size >= (this.#options.waitingMax ?? 1000)) {
      return new GatewayError('CONTENDED', 'the queue is full', { retryAfterS: 1 });
    }
    return null;
  }

  #takeOff(request: GenerateRequest, stream: EventStream): Flight {
    for (const { generation } of partsOf(request)) this.#residents.add(generation);
    const length = Math.min(request.tokensMax, this.#options.naturalLength ?? request.tokensMax);
    return {
      request,
      stream,
      answer: fakeAnswer(request, length),
      submittedMs: this.clock.nowMs(),
      isStarted: false,
      sent: 0,
      text: '',
      shown: 0,
      ttftMs: 0,
    };
  }

  /** The next sequence that gets that far fails so. */
  failNext(error: GatewayError, afterTokens = 0): void {
    this.#failures.push({ error, afterTokens });
  }

  /** No steps until release(). */
  hold(): void {
    this.#isHeld = true;
  }

  release(): void {
    this.#isHeld = false;
    this.#schedule(0);
  }

  /** Sequences that are queued or running now. */
  active(): number {
    return this.#flights.size;
  }

  #schedule(delayMs: number): void {
    if (this.#isScheduled) return;
    this.#isScheduled = true;
    const waitMs = Math.max(delayMs, this.#options.stepMs ?? 0);
    const step = (): void => {
      this.#isScheduled = false;
      this.#step();
    };
    if (waitMs === 0) setImmediate(step);
    else this.clock.after(waitMs, step);
  }

  #step(): void {
    if (this.#isHeld || this.#flights.size === 0) return;
    const rows = [...this.#flights.values()];
    for (const flight of rows) this.#advance(flight);
    this.#steps += 1;
    this.#report(rows);
    if (this.#flights.size > 0) this.#schedule(0);
  }

  #report(rows: readonly Flight[]): void {
    const rank = (flight: Flight): number =>
      partsOf(flight.request).reduce((sum, part) => sum + part.rank, 0);
    const report: StepReport = {
      ms: this.#options.stepMs ?? 1,
      decodeRows: rows.length,
      prefillTokens: 0,
      decodeRanks: rows.reduce((sum, flight) => sum + rank(flight), 0),
      prefillRanks: 0,
      kvCells: rows.reduce((sum, flight) => sum + flight.request.tokens.length + flight.sent, 0),
    };
    for (const listener of this.#listeners) listener(report);
  }

  #advance(flight: Flight): void {
    const { stream, request } = flight;
    const nowMs = this.clock.nowMs();
    const failure = this.#failures.find((one) => one.afterTokens <= flight.sent);
    if (failure !== undefined) {
      this.#failures = this.#failures.filter((one) => one !== failure);
      this.#flights.delete(request.id);
      stream.fail(failure.error);
      return;
    }
    if (!flight.isStarted) {
      flight.isStarted = true;
      const cachedTokens = this.#options.cachedTokens ?? 0;
      stream.push({ kind: 'start', queueMs: nowMs - flight.submittedMs, cachedTokens });
    }
    const token = flight.answer[flight.sent]!;
    flight.sent += 1;
    flight.text += fakeTokenText(token);
    if (flight.sent === 1) flight.ttftMs = nowMs - flight.submittedMs;
    this.#tokens += 1;
    this.#lastTokenMs = nowMs;
    this.#show(flight, token, nowMs);
  }

  /** Stop strings by the plainest means: hold back the longest suffix that could still become one. */
  #show(flight: Flight, token: number, nowMs: number): void {
    const { request, stream, text } = flight;
    const ends = request.stop
      .map((stop) => ({ stop, at: text.indexOf(stop) }))
      .filter((one) => one.at >= 0)
      .sort((a, b) => a.at + a.stop.length - (b.at + b.stop.length));
    const match = ends[0] ?? null;
    const isLast = flight.sent === flight.answer.length || match !== null;
    let safe = match?.at ?? text.length;
    if (!isLast) {
      for (const stop of request.stop) {
        for (let size = Math.min(stop.length - 1, text.length); size > 0; size--) {
          if (text.endsWith(stop.slice(0, size))) safe = Math.min(safe, text.length - size);
        }
      }
    }
    const piece = text.slice(flight.shown, Math.max(flight.shown, safe));
    flight.shown = Math.max(flight.shown, safe);
    stream.push({ kind: 'piece', text: piece, tokens: [fakeGenerated(token, request)] });
    if (!isLast || stream.isOver) return;
    this.#flights.delete(request.id);
    stream.push({
      kind: 'end',
      reason: match !== null || flight.sent < request.tokensMax ? 'stop' : 'length',
      stopString: match?.stop ?? null,
      completionTokens: flight.sent,
      ttftMs: flight.ttftMs,
      totalMs: nowMs - flight.submittedMs,
      rankMean: partsOf(request)[0]?.rank ?? 0,
    });
  }

  unload(generation: Generation): void {
    this.unloads.push(generation);
    this.#residents.delete(generation);
  }

  pin(generations: readonly Generation[]): void {
    this.pinned = generations;
  }

  prewarm(): void {}

  stats(): EngineStats {
    const flights = [...this.#flights.values()];
    const started = flights.filter((flight) => flight.isStarted);
    return {
      running: started.length,
      waiting: flights.length - started.length,
      kvCellsUsed: started.reduce((sum, one) => sum + one.request.tokens.length + one.sent, 0),
      kvCellsMax: 16_384,
      residents: [...this.#residents].map((generation) => ({
        generation,
        rank: 8,
        bytes: 1024,
        uses: flights.filter(({ request }) =>
          partsOf(request).some((part) => part.generation === generation),
        ).length,
      })),
      adapterSlotsMax: 8,
      preemptions: 0,
      prewarms: 0,
      prewarmsUsed: 0,
      threads: 2,
      steps: this.#steps,
      tokensGenerated: this.#tokens,
      draftTokens: 0,
      draftTokensAccepted: 0,
      prefixTokensQueried: 0,
      prefixTokensHit: 0,
    };
  }

  onStep(listener: (report: StepReport) => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  isReady(): boolean {
    return this.isUp && !this.isClosed;
  }

  lastTokenAtMs(): number | null {
    return this.#lastTokenMs;
  }

  close(): Promise<void> {
    this.isClosed = true;
    return Promise.resolve();
  }
}

const encoder = new TextEncoder();

function fakeGenerated(token: number, request: GenerateRequest): GeneratedToken {
  const one = (id: number, logprob: number): TokenLogprob => ({
    token: id,
    bytes: encoder.encode(fakeTokenText(id)),
    logprob,
  });
  if (request.topLogprobs === null) return { ...one(token, Number.NaN), top: [] };
  const top = Array.from({ length: request.topLogprobs }, (_, i) =>
    one((token + i) % fakeVocabSize, -0.25 * (i + 1)),
  );
  return { ...one(token, -0.25), top };
}
