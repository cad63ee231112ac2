// Who waits and who runs: requests are checked and queued, get room in the order of waiting-queue.ts, and give everything
// back when they leave. A sequence keeps the cells, the pages and the generation it was admitted with (invariants I1 to I3
// of faults.md section 2) until it ends or, preempted, waits again.

import { asGatewayError, GatewayError } from '../errors.ts';
import { AdapterLoader, isWithin, keyOf, type Want } from './adapter-loading.ts';
import { Admission, type AdmissionOptions } from './admission.ts';
import type { EngineClock } from './clock.ts';
import type { GenerateRequest, HotAdapter, RankChange } from './messages.ts';
import type { Outbox } from './outbox.ts';
import { Sequence } from './sequence.ts';
import { WaitingQueue } from './waiting-queue.ts';

export interface QueueLimits {
  /** Sequences that wait, the prompt tokens they may bring together, and how long one waits before it is refused. */
  readonly waitingMax: number;
  readonly waitingTokensMax: number;
  readonly waitingMsMax: number;
}

export interface RosterOptions extends Omit<AdmissionOptions, 'loader'> {
  readonly limits: QueueLimits;
  readonly bytesOf: (token: number) => Uint8Array;
  readonly clock: EngineClock;
  readonly outbox: Outbox;
  /** There may be something to do in a tick. */
  readonly wake: () => void;
}

export class Roster {
  readonly running: Map<string, Sequence> = new Map();
  preemptions = 0;
  readonly #options: RosterOptions;
  readonly #queue: WaitingQueue<Sequence> = new WaitingQueue();
  readonly #loader: AdapterLoader;
  readonly #admission: Admission;
  #arrivals = 0;

  constructor(options: RosterOptions) {
    this.#options = options;
    this.#loader = new AdapterLoader(options.residency, {
      wake: options.wake,
      isAwaited: (set) => this.#queue.wanting(keyOf(set)) !== undefined,
      onFailed: (set, error) => this.#failWaiting(set, error),
    });
    this.#admission = new Admission({ ...options, loader: this.#loader });
  }

  get waiting(): number {
    return this.#queue.size;
  }

  get prewarms(): AdapterLoader['prewarms'] {
    return this.#loader.prewarms;
  }

  /** `generated` are tokens of its answer that the reader has already (sequence.ts): such a request was accepted before, so
   *  it is not refused for a full queue. */
  add(request: GenerateRequest, generated: Int32Array, rankChanges: readonly RankChange[]): void {
    const { outbox, clock, limits, bytesOf, wake } = this.#options;
    try {
      if (this.#queue.has(request.id) || this.running.has(request.id)) {
        throw new GatewayError('INTERNAL', `request id ${request.id} is in use`);
      }
      this.#admission.check(request);
      if (generated.length === 0) this.#checkQueue(request);
      this.#arrivals += 1;
      this.#queue.add(
        new Sequence({
          ...{ request, generated, rankChanges, bytesOf },
          arrival: this.#arrivals,
          submittedMs: clock.nowMs(),
          waitMsMax: limits.waitingMsMax,
        }),
      );
      wake();
    } catch (error) {
      outbox.failed(request.id, asGatewayError(error));
    }
  }

  /** No effect on an id that has ended. What it held is free when this returns. */
  cancel(id: string): void {
    this.#queue.delete(id);
    const sequence = this.running.get(id);
    if (sequence !== undefined) this.leave(sequence, 'cells-valid');
    this.#loader.letGo();
  }

  prewarm(hot: readonly HotAdapter[]): void {
    this.#loader.prewarm(hot);
  }

  /** A tick's loads, refusals and admissions. `step`: the last one that was computed. */
  advance(step: number): void {
    this.#loader.advance();
    this.#expire();
    this.#admit(step);
    // Once more for the load that the next in line needs: its file is read during this step, not the one after.
    if (this.#loader.letGo() && this.#queue.size > 0) this.#admit(step);
    this.#loader.warm();
  }

  /** Whether another `advance` would move something on although nothing runs. `stuck`: nobody that waits will ever. */
  get prospects(): 'more' | 'later' | 'stuck' {
    const { progress } = this.#loader;
    if (progress === 'more') return 'more';
    return this.#queue.size === 0 || progress === 'reading' ? 'later' : 'stuck';
  }

  /** Adapters that fit one by one and not together; anything else is a bug, for an idle engine has room for whatever
   *  Admission.check let in: better one failed request with a name to look for than a queue that nobody serves. */
  giveUp(): void {
    if (this.#loader.progress === 'no-room') {
      this.#loader.refuse();
      return;
    }
    const [first] = this.#queue.values();
    if (first === undefined) return;
    this.#refuse(first, new GatewayError('INTERNAL', 'no room in an idle engine'));
  }

  changeRank(sequence: Sequence, rank: number): void {
    this.#admission.changeRank(sequence, rank);
  }

  /** It runs no more, and holds nothing. */
  leave(sequence: Sequence, cells: 'cells-valid' | 'cells-suspect'): void {
    this.running.delete(sequence.id);
    const { holdings } = sequence;
    sequence.holdings = null;
    if (holdings === null) return;
    this.#queue.release(sequence.tenant);
    for (const one of holdings.adapters) one.release();
    if (cells === 'cells-valid') this.#options.cache.retire(holdings.cells.hold);
    else this.#options.cache.drop(holdings.cells.hold);
  }

  /** A full queue is shared: who floods it gives way, one for one, to whoever has less in it. */
  #checkQueue({ tokens, tenant }: GenerateRequest): void {
    const { waitingMax, waitingTokensMax } = this.#options.limits;
    const { size, promptTokens } = this.#queue;
    const isRoom = (count: number, held: number): boolean =>
      count < waitingMax && (count === 0 || held + tokens.length <= waitingTokensMax);
    if (isRoom(size, promptTokens)) return;
    const message = `${size} requests wait with ${promptTokens} prompt tokens`;
    const other = this.#queue.displaceable(tenant);
    if (other === undefined || !isRoom(size - 1, promptTokens - other.promptTokens)) {
      throw new GatewayError('CONTENDED', message);
    }
    this.#refuse(other, new GatewayError('CONTENDED', message));
  }

  #refuse(sequence: Sequence, error: GatewayError): void {
    this.#queue.delete(sequence.id);
    this.#options.outbox.failed(sequence.id, error);
  }

  /** Who is late, and who is refused for it: before anything is spent on them. */
  #expire(): void {
    const nowMs = this.#options.clock.nowMs();
    this.#queue.passTime(nowMs);
    for (const one of this.#queue.expired(nowMs)) {
      const waited = `it had no room for ${Math.round(nowMs - one.submittedMs)} ms`;
      const isDue = one.request.urgency.strict && one.dueMs <= nowMs;
      const error = isDue
        ? new GatewayError('DEADLINE_TOO_SHORT', `the budget is strict and has passed: ${waited}`)
        : new GatewayError('CONTENDED', waited);
      this.#refuse(one, error);
    }
  }

  #admit(step: number): void {
    const nowMs = this.#options.clock.nowMs();
    for (const { sequence, outcome } of this.#admission.run(this.#queue, this.running, nowMs)) {
      if (outcome === 'preempted') this.#preempt(sequence);
      else if (outcome === 'admitted') {
        sequence.lastStep = step;
        this.#begin(sequence, nowMs);
      } else {
        this.#refuse(sequence, outcome);
      }
    }
  }

  #begin(sequence: Sequence, nowMs: number): void {
    this.#queue.admit(sequence);
    this.running.set(sequence.id, sequence);
    if (sequence.preemptions > 0) return; // its reader knows that it began
    const { outbox } = this.#options;
    const { id, submittedMs, position, rank, planRank, generatedCount } = sequence;
    const queueMs = nowMs - submittedMs;
    outbox.event(id, { kind: 'start', queueMs, cachedTokens: position });
    if (rank === planRank || generatedCount > 0) return;
    outbox.event(id, { kind: 'rank', rank, reason: 'late' });
  }

  /** It comes back with its tokens, and its draws depend on their number only: the answer goes on as it would have. */
  #preempt(sequence: Sequence): void {
    this.leave(sequence, 'cells-valid');
    this.preemptions += 1;
    sequence.rewind();
    this.#queue.add(sequence);
  }

  #failWaiting(set: readonly Want[], error: GatewayError): void {
    for (const sequence of [...this.#queue.values()]) {
      if (!isWithin(set, sequence.wants)) continue;
      this.#refuse(sequence, error);
    }
  }
}
