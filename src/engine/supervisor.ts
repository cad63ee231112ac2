// The Engine that the gateway sees: an engine process behind it that may die at any time (design.md section 1). A death
// is a pause: a new process is started and every request goes on as prompt + tokens already sent. A request under which
// the engine dies twice without a token between is refused. To tell it from those that only ran beside it, requests that
// were computing when the engine died come back one at a time, each alone until its next token.

import type { Generation } from '../adapters/adapter.ts';
import { type ErrorCode, GatewayError } from '../errors.ts';
import type { Engine } from './engine.ts';
import { type ChildOptions, EngineChild } from './engine-child.ts';
import { EventStream } from './event-stream.ts';
import { Flight, FlightTable } from './flight-table.ts';
import type {
  BaseInfo,
  EngineEvent,
  EngineStats,
  FromEngine,
  GenerateRequest,
  HotAdapter,
  StepCosts,
  StepReport,
} from './messages.ts';
import { RestartPolicy } from './restart-policy.ts';

export interface SupervisorOptions extends ChildOptions {
  /** First pause before a restart; doubles with every death until something is produced. */
  readonly backoffMsMin: number;
  readonly backoffMsMax: number;
  /** Requests that may be in flight at once. */
  readonly flightsMax: number;
  /** Events that one reader may be behind. */
  readonly eventsMax: number;
  /** How long close() lets running requests go on. */
  readonly drainMsMax: number;
  /** One line a life's end: for logs and metrics. */
  readonly onDeath?: (why: string) => void;
}

type Life =
  | { readonly kind: 'down'; readonly cancelRestart: () => void }
  | { readonly kind: 'starting' | 'ready'; readonly child: EngineChild };

export class Supervisor implements Engine {
  readonly #options: SupervisorOptions;
  readonly #flights: FlightTable = new FlightTable();
  readonly #policy: RestartPolicy;
  readonly #stepListeners: Set<(report: StepReport) => void> = new Set();
  #life: Life = { kind: 'down', cancelRestart: () => {} };
  #base: BaseInfo | null = null;
  #pinned: readonly Generation[] = [];
  #costs: StepCosts | null = null;
  #stats: EngineStats = noStats;
  #lastTokenMs: number | null = null;
  #isCrashLooping = false;
  #isClosing = false;
  #submitted = 0;
  #restarts = 0;
  #settleStart: { resolve: () => void; reject: (error: GatewayError) => void } | null = null;

  constructor(options: SupervisorOptions) {
    this.#options = options;
    this.#policy = new RestartPolicy(options);
  }

  /** Starts the first process. Rejects when the engine refuses its configuration or only crashes. */
  start(): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#settleStart = { resolve, reject };
      this.#spawn();
    });
  }

  get base(): BaseInfo {
    if (this.#base === null) throw new GatewayError('NO_CAPACITY', 'the engine is starting');
    return this.#base;
  }

  /** Engine deaths that were followed by a new start. */
  get restarts(): number {
    return this.#restarts;
  }

  /** Of the running process; for tests and doctor. */
  get pid(): number | undefined {
    return this.#life.kind === 'down' ? undefined : this.#life.child.pid;
  }

  submit(request: GenerateRequest, signal: AbortSignal): AsyncIterable<EngineEvent> {
    const leave = (): void => this.#leave(flight);
    const stream = new EventStream(this.#options.eventsMax, leave);
    const abort = (): void => stream.cancel();
    this.#submitted += 1;
    const flight = new Flight({
      request,
      wireId: String(this.#submitted),
      stream,
      submittedMs: this.#options.clock.nowMs(),
      onLand: () => {
        signal.removeEventListener('abort', abort);
        this.#flights.remove(flight);
      },
    });
    const refusal = this.#refusal();
    if (refusal !== null) {
      stream.fail(refusal);
      return stream;
    }
    this.#flights.add(flight);
    signal.addEventListener('abort', abort, { once: true });
    if (signal.aborted) abort();
    else this.#dispatch();
    return stream;
  }

  unload(generation: Generation): void {
    if (this.#life.kind === 'ready') this.#life.child.send({ kind: 'unload', generation });
  }

  pin(generations: readonly Generation[]): void {
    this.#pinned = generations;
    this.#sendPins();
  }

  prewarm(hot: readonly HotAdapter[]): void {
    if (this.#life.kind === 'ready') this.#life.child.send({ kind: 'prewarm', hot });
  }

  /** Every life is told: it knows nothing of what the one before it was told. */
  #sendPins(): void {
    if (this.#life.kind !== 'ready') return;
    this.#life.child.send({ kind: 'pin', generations: this.#pinned });
  }

  /** What the engine sizes steps and governs ranks by. Every life is told. */
  setCosts(costs: StepCosts): void {
    this.#costs = costs;
    this.#sendCosts();
  }

  #sendCosts(): void {
    if (this.#life.kind !== 'ready' || this.#costs === null) return;
    this.#life.child.send({ kind: 'coefficients', costs: this.#costs });
  }

  stats(): EngineStats {
    const { running, size } = this.#flights;
    return { ...this.#stats, running, waiting: size - running };
  }

  onStep(listener: (report: StepReport) => void): () => void {
    this.#stepListeners.add(listener);
    return () => this.#stepListeners.delete(listener);
  }

  isReady(): boolean {
    return this.#life.kind === 'ready' && !this.#isCrashLooping && !this.#isClosing;
  }

  lastTokenAtMs(): number | null {
    return this.#lastTokenMs;
  }

  /** Takes nothing new, lets what runs go on for a while, then ends the process. */
  async close(): Promise<void> {
    this.#isClosing = true;
    if (this.#life.kind !== 'down') await this.#drained();
    this.#flights.failAll(new GatewayError('NO_CAPACITY', 'the engine is shutting down'));
    this.#settleStart?.reject(downError());
    this.#settleStart = null;
    const life = this.#life;
    if (life.kind === 'down') life.cancelRestart();
    else await life.child.end();
  }

  #drained(): Promise<void> {
    return new Promise((resolve) => {
      const cancel = this.#options.clock.after(this.#options.drainMsMax, resolve);
      this.#flights.whenEmpty(() => {
        cancel();
        resolve();
      });
    });
  }

  #refusal(): GatewayError | null {
    if (this.#isClosing) return new GatewayError('NO_CAPACITY', 'the engine is draining');
    if (this.#isCrashLooping) return downError();
    if (this.#flights.size < this.#options.flightsMax) return null;
    return new GatewayError('CONTENDED', `${this.#flights.size} requests are in flight`);
  }

  /** Sends what may be sent now. */
  #dispatch(): void {
    const life = this.#life;
    if (life.kind !== 'ready') return;
    for (const flight of this.#flights.due()) {
      flight.state = 'sent';
      life.child.send(flight.message(this.#options.clock.nowMs()));
    }
    life.child.expectSigns(this.#flights.isBusy);
  }

  #leave(flight: Flight): void {
    const life = this.#life;
    const isWithEngine = flight.state !== 'held' && life.kind === 'ready';
    flight.fail(new GatewayError('CANCELLED', 'cancelled')); // the stream is over already: this only lands it
    if (isWithEngine) life.child.send({ kind: 'cancel', id: flight.wireId });
    this.#dispatch();
  }

  #spawn(): void {
    const child = new EngineChild(this.#options, {
      onMessage: (message) => this.#hear(message),
      onDeath: (why) => this.#die(why),
    });
    this.#life = { kind: 'starting', child };
  }

  #hear(message: FromEngine): void {
    switch (message.kind) {
      case 'ready':
        this.#becomeReady(message.base);
        break;
      case 'refused':
        this.#settleStart?.reject(errorOf(message));
        this.#settleStart = null;
        break;
      case 'events':
        for (const { id, event } of message.batch) this.#deliver(id, event);
        this.#dispatch(); // a suspect may have been cleared, an engine may have become idle
        break;
      case 'failed':
        this.#flights.find(message.id)?.fail(errorOf(message));
        this.#dispatch();
        break;
      case 'step':
        this.#takeStats(message.stats);
        for (const listener of this.#stepListeners) listener(message.report);
        break;
      case 'stats':
        this.#takeStats(message.stats);
        break;
    }
  }

  #takeStats(stats: EngineStats): void {
    const { hosted = [] } = this.#stats;
    this.#stats = { hosted, ...stats };
  }

  #becomeReady(base: BaseInfo): void {
    if (this.#life.kind !== 'starting') return;
    const { child } = this.#life;
    if (this.#base !== null && this.#base.hash !== base.hash) {
      child.kill('it came back with another base model');
      return;
    }
    this.#life = { kind: 'ready', child };
    this.#base = base;
    this.#isCrashLooping = false;
    this.#settleStart?.resolve();
    this.#settleStart = null;
    this.#sendPins();
    this.#sendCosts();
    this.#dispatch();
  }

  #deliver(wireId: string, event: EngineEvent): void {
    const flight = this.#flights.find(wireId);
    if (flight === undefined) return; // cancelled while this was under way
    const nowMs = this.#options.clock.nowMs();
    if (!flight.deliver(event, nowMs)) return;
    this.#lastTokenMs = nowMs;
    this.#policy.produced();
    this.#flights.clear(flight);
  }

  #die(why: string): void {
    const { clock, onDeath } = this.#options;
    if (!this.#isClosing) onDeath?.(why);
    this.#stats = { ...noStats, kvCellsMax: this.#stats.kvCellsMax };
    const { isLoop, delayMs } = this.#policy.died(clock.nowMs());
    this.#flights.strike();
    this.#life = { kind: 'down', cancelRestart: () => {} };
    if (this.#isClosing || (this.#base === null && this.#settleStart === null)) {
      this.#flights.failAll(downError());
      return;
    }
    if (isLoop) this.#giveUp();
    if (isLoop && this.#base === null) return; // it never worked: start() has been rejected
    const cancelRestart = clock.after(delayMs, () => {
      this.#restarts += 1;
      this.#spawn();
    });
    this.#life = { kind: 'down', cancelRestart };
  }

  #giveUp(): void {
    this.#isCrashLooping = true;
    this.#flights.failAll(downError());
    this.#settleStart?.reject(downError());
    this.#settleStart = null;
  }
}

function errorOf({ code, message }: { code: string; message: string }): GatewayError {
  return new GatewayError(code as ErrorCode, message);
}

function downError(): GatewayError {
  return new GatewayError('NO_CAPACITY', 'the engine is down', { retryAfterS: 5 });
}

const noStats: EngineStats = {
  running: 0,
  waiting: 0,
  kvCellsUsed: 0,
  kvCellsMax: 0,
  residents: [],
  adapterSlotsMax: 0,
  preemptions: 0,
  prewarms: 0,
  prewarmsUsed: 0,
  threads: 0,
  steps: 0,
  tokensGenerated: 0,
  draftTokens: 0,
  draftTokensAccepted: 0,
  prefixTokensQueried: 0,
  prefixTokensHit: 0,
};
