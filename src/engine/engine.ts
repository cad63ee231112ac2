// The contract between everything that wants tokens and whatever makes them: the supervisor of the engine process
// (engine/supervisor.ts), the same engine inside this process (tests, --in-process), or a fake.

import type { Generation } from '../adapters/adapter.ts';
import type {
  BaseInfo,
  EngineEvent,
  EngineStats,
  GenerateRequest,
  HotAdapter,
  StepReport,
} from './messages.ts';

export interface Engine {
  readonly base: BaseInfo;
  /** Queues a sequence and yields its events in order, `end` last. Ends early without `end` only by throwing:
   *  GatewayError CANCELLED when `signal` aborts (compute stops within one step), ADAPTER_NOT_FOUND or ADAPTER_CORRUPT,
   *  CONTENDED when the queue is full or the wait too long, DEADLINE_TOO_SHORT when it was strict and its time passed in the
   *  queue, ENGINE_POISONED, NO_CAPACITY while draining. Returning the iterator early (a
   *  `break` in for-await) cancels as `signal` does. */
  submit(request: GenerateRequest, signal: AbortSignal): AsyncIterable<EngineEvent>;
  /** The generation's memory is freed at its last use, not before. */
  unload(generation: Generation): void;
  /** These, and no others, stay in memory once loaded. */
  pin(generations: readonly Generation[]): void;
  /** Loads these, the hottest first, where that takes no memory from what is in use or among them. */
  prewarm(hot: readonly HotAdapter[]): void;
  stats(): EngineStats;
  /** Every step's figures, for the latency model. Returns the function that stops it. */
  onStep(listener: (report: StepReport) => void): () => void;
  /** True while the engine can make tokens now; false while it (re)starts. */
  isReady(): boolean;
  /** performance.now() of the last token that any sequence got. */
  lastTokenAtMs(): number | null;
  close(): Promise<void>;
}
