// An Engine without a process between: the loop runs in the test's own. Not for serving: a signal in native code would
// take the gateway with it, and every step holds its event loop.

import type { Generation } from '../../src/adapters/adapter.ts';
import type { Engine } from '../../src/engine/engine.ts';
import type { EngineLoop } from '../../src/engine/engine-loop.ts';
import { EventStream } from '../../src/engine/event-stream.ts';
import type {
  BaseInfo,
  EngineEvent,
  EngineStats,
  FromEngine,
  GenerateRequest,
  HotAdapter,
  StepReport,
} from '../../src/engine/messages.ts';
import { type ErrorCode, GatewayError } from '../../src/errors.ts';

/** `createLoop` gets the loop's `emit`. */
export async function createLocalEngine(
  createLoop: (emit: (message: FromEngine) => void) => Promise<EngineLoop>,
  nowMs: () => number,
): Promise<Engine> {
  let hear = (_message: FromEngine): void => {};
  const loop = await createLoop((message) => hear(message));
  const engine = new LocalEngine(loop, nowMs);
  hear = (message) => engine.hear(message);
  return engine;
}

/** Events that one reader may be behind. */
const eventsMax = 4096;

class LocalEngine implements Engine {
  readonly base: BaseInfo;
  readonly #loop: EngineLoop;
  readonly #nowMs: () => number;
  readonly #streams: Map<string, EventStream> = new Map();
  readonly #onLand: Map<string, () => void> = new Map();
  readonly #stepListeners: Set<(report: StepReport) => void> = new Set();
  #lastTokenMs: number | null = null;
  #isClosed = false;

  constructor(loop: EngineLoop, nowMs: () => number) {
    this.base = loop.base;
    this.#loop = loop;
    this.#nowMs = nowMs;
  }

  submit(request: GenerateRequest, signal: AbortSignal): AsyncIterable<EngineEvent> {
    const { id } = request;
    const stream = new EventStream(eventsMax, () => {
      this.#land(id);
      this.#loop.cancel(id);
    });
    if (this.#isClosed || this.#streams.has(id)) {
      stream.fail(
        this.#isClosed
          ? new GatewayError('NO_CAPACITY', 'the engine is draining')
          : new GatewayError('INTERNAL', `request id ${id} is in use`),
      );
      return stream;
    }
    if (signal.aborted) {
      stream.fail(new GatewayError('CANCELLED', 'cancelled by the caller'));
      return stream;
    }
    const abort = (): void => stream.cancel();
    signal.addEventListener('abort', abort, { once: true });
    this.#streams.set(id, stream);
    this.#onLand.set(id, () => signal.removeEventListener('abort', abort));
    this.#loop.submit(request);
    return stream;
  }

  #land(id: string): void {
    this.#streams.delete(id);
    this.#onLand.get(id)?.();
    this.#onLand.delete(id);
  }

  hear(message: FromEngine): void {
    switch (message.kind) {
      case 'events':
        for (const { id, event } of message.batch) {
          if (event.kind === 'piece') this.#lastTokenMs = this.#nowMs();
          const stream = this.#streams.get(id);
          if (event.kind === 'end') this.#land(id);
          stream?.push(event);
        }
        break;
      case 'failed': {
        const stream = this.#streams.get(message.id);
        this.#land(message.id);
        stream?.fail(new GatewayError(message.code as ErrorCode, message.message));
        break;
      }
      case 'step':
        for (const listener of this.#stepListeners) listener(message.report);
        break;
      case 'stats':
      case 'ready':
      case 'refused':
        break; // said by serve-loop.ts only, or asked of the loop directly
    }
  }

  unload(generation: Generation): void {
    this.#loop.unload(generation);
  }

  pin(generations: readonly Generation[]): void {
    this.#loop.pin(generations);
  }

  prewarm(hot: readonly HotAdapter[]): void {
    this.#loop.prewarm(hot);
  }

  stats(): EngineStats {
    return this.#loop.stats();
  }

  onStep(listener: (report: StepReport) => void): () => void {
    this.#stepListeners.add(listener);
    return () => this.#stepListeners.delete(listener);
  }

  isReady(): boolean {
    return !this.#isClosed;
  }

  lastTokenAtMs(): number | null {
    return this.#lastTokenMs;
  }

  close(): Promise<void> {
    this.#isClosed = true;
    this.#loop.stop();
    const error = new GatewayError('NO_CAPACITY', 'the engine is shutting down');
    for (const [id, stream] of [...this.#streams]) {
      this.#land(id);
      stream.fail(error);
    }
    return Promise.resolve();
  }
}
