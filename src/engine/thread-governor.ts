// How many threads the next step uses. ggml's threads spin at a barrier after every op, so one thread that waits for a core
// stops all of them: with as many busy loops beside two threads, 119 steps a second became 20, and one thread made 50.
// A pure policy over measured steps. Two signs of contention, each wanted of most of the last steps, so that pauses are none:
//
//   robbed   the process got less CPU time than its threads × the step's time; spinning threads take all that they can get
//   late     the step took longer than its work did before on as many threads: also sees what a hypervisor takes, but a
//            machine that only became slower looks the same, so fewer threads must then prove to be faster
//
// Lowered at once to what was got; raised by trying, where cores are idle, ever more rarely while that fails.

import type { StepWork } from './messages.ts';

export interface StepSample {
  readonly nowMs: number;
  /** Of the computation alone, and CPU time of the whole process meanwhile. */
  readonly ms: number;
  readonly cpuMs: number;
  readonly work: StepWork;
}

/** Steps that are looked at, and how many of them must agree. */
export const windowSteps = 8;
const agreeing = 6;
/** Contended steps in a row that are enough however few they are: eight rows on two contended cores took 2.4 s a step. */
const runMsMax = 1000;
/** From a change to the next raise: the least, doubled after every raise that did not last, the most. Guesses: a try that
 *  fails costs 8 slow steps or, when they are very slow, a second and a step. */
export const waitMsMin = 1000;
export const waitMsMax = 64_000;
/** Idle cores without which a raise is not tried. */
const idleCoresMin = 0.5;
/** A raise that is taken back within so many waits did not last. */
const lastingWaits = 4;
/** Cores' worth of CPU time that may be missing. Measured on two cores: calm 0.03, with one busy loop beside 0.5. The share
 *  leaves room for what the step does on one thread. */
const missingCoresMax = 0.3;
const missingShareMax = 0.03;
const lateMax = 1.6; // a guess between the noise of calm steps (1.1) and one thread of many on a shared core (2)
// The estimate follows a faster step at once and a slower one by 0.2 % a step, so that it is the pace of calm steps; a
// machine that stays slower is believed after some hundred.
const gainDown = 0.25;
const gainUp = 0.002;
/** Sizes of steps that are told apart: powers of two of their rows. */
const sizes = 16;

/** The model's own estimate of a step, in decode rows: weights are read once (3 rows' worth), 24 ranks or 6,000 cells cost
 *  what a row costs (the latency model's priors, router/step-time.ts). Only steps of like size are compared. */
export function estimate(work: StepWork): number {
  const { decodeRows, prefillTokens, decodeRanks, prefillRanks, kvCells } = work;
  return 3 + decodeRows + prefillTokens + (decodeRanks + prefillRanks) / 24 + kvCells / 6000;
}

/** The value that most do not exceed: `agreeing` of a whole window. */
function mostAreBelow(values: readonly number[]): number {
  const index = Math.ceil((values.length * agreeing) / windowSteps) - 1;
  return values.toSorted((a, b) => a - b)[index]!;
}

function isLate({ lateness }: Step): boolean {
  return lateness > lateMax;
}

interface Step {
  readonly ms: number;
  /** CPU time per time: cores that the process had. */
  readonly cores: number;
  /** Milliseconds per unit of work. */
  readonly pace: number;
  /** Against the usual pace of such steps. */
  readonly lateness: number;
}

export class ThreadGovernor {
  threads: number;
  readonly #threadsMax: number;
  /** Usual milliseconds per unit of work, by thread count and size of step. */
  readonly #paces: Map<number, number> = new Map();
  /** The last steps since the last change. */
  #window: Step[] = [];
  /** What was lowered for being late alone, until fewer threads have proved to be faster. */
  #doubted: { readonly threads: number; readonly pace: number } | null = null;
  #changedMs: number = Number.NEGATIVE_INFINITY;
  #raisedMs: number = Number.NEGATIVE_INFINITY;
  #waitMs: number = waitMsMin;

  readonly #idleCores: () => number;

  /** `idleCores`: of the whole machine, on average since it was last asked; Infinity where nobody knows. */
  constructor(threadsMax: number, idleCores: () => number) {
    this.threads = threadsMax;
    this.#threadsMax = threadsMax;
    this.#idleCores = idleCores;
  }

  /** Returns the threads of the next step, which `threads` is from then on. */
  observe(sample: StepSample): number {
    if (this.#threadsMax === 1 || !(sample.ms > 0)) return this.threads;
    this.#window = [...this.#window, this.#stepOf(sample)].slice(-windowSteps);
    this.#decide(sample.nowMs);
    return this.threads;
  }

  /** Most of a whole window, or a long run at its end. */
  #isMost(isContended: (step: Step) => boolean): boolean {
    const count = this.#window.filter(isContended).length;
    const calm = this.#window.findLastIndex((step) => !isContended(step));
    const runMs = this.#window.slice(calm + 1).reduce((sum, step) => sum + step.ms, 0);
    return count >= agreeing || runMs >= runMsMax;
  }

  readonly #isRobbed = ({ cores }: Step): boolean =>
    this.threads - cores > Math.max(missingCoresMax, missingShareMax * this.threads);

  #decide(nowMs: number): void {
    const isFull = this.#window.length === windowSteps;
    const pace = mostAreBelow(this.#window.map((step) => step.pace));
    if (this.#doubted !== null && isFull) {
      const { threads, pace: before } = this.#doubted;
      this.#doubted = null;
      if (pace >= before) {
        this.#believe(threads, nowMs);
        return;
      }
    }
    if (this.threads > 1 && this.#isMost(this.#isRobbed)) {
      const robbed = this.#window.filter(this.#isRobbed);
      this.#lower(Math.floor(mostAreBelow(robbed.map((step) => step.cores))), nowMs);
    } else if (this.threads > 1 && this.#isMost(isLate)) {
      this.#doubted = { threads: this.threads, pace };
      this.#lower(Math.floor(this.threads / 2), nowMs);
    } else if (
      isFull &&
      this.threads < this.#threadsMax &&
      nowMs - this.#changedMs >= this.#waitMs
    ) {
      this.#raise(nowMs);
    }
  }

  #raise(nowMs: number): void {
    if (this.#idleCores() < idleCoresMin) {
      this.#changedMs = nowMs; // asked again after as long
      return;
    }
    this.#raisedMs = nowMs;
    this.#change(Math.min(this.#threadsMax, Math.ceil(this.threads * 1.5)), nowMs);
  }

  #stepOf({ ms, cpuMs, work }: StepSample): Step {
    const size = Math.min(
      sizes - 1,
      Math.floor(Math.log2(1 + work.decodeRows + work.prefillTokens)),
    );
    const key = this.threads * sizes + size;
    const pace = ms / estimate(work);
    const usual = this.#paces.get(key) ?? Math.min(pace, this.#paceMax(size));
    this.#paces.set(key, usual + (pace < usual ? gainDown : gainUp) * (pace - usual));
    return { ms, cores: cpuMs / ms, pace, lateness: pace / usual };
  }

  /** What a count that is new takes at most, if all threads are known: as if every part of the work were shared. */
  #paceMax(size: number): number {
    const all = this.#paces.get(this.#threadsMax * sizes + size) ?? Number.POSITIVE_INFINITY;
    return (all * this.#threadsMax) / this.threads;
  }

  /** Fewer threads were no faster: the machine is slower than it was, and its pace is learned anew. */
  #believe(threads: number, nowMs: number): void {
    this.#paces.clear();
    this.#change(threads, nowMs);
  }

  #lower(cores: number, nowMs: number): void {
    const isShort = nowMs - this.#raisedMs < lastingWaits * this.#waitMs;
    this.#waitMs = isShort ? Math.min(2 * this.#waitMs, waitMsMax) : waitMsMin;
    this.#change(Math.max(1, Math.min(this.threads - 1, cores)), nowMs);
  }

  #change(threads: number, nowMs: number): void {
    this.threads = threads;
    this.#changedMs = nowMs;
    this.#window = [];
  }
}

/** What the loop calls around the computation of each step. */
export interface StepWatch {
  readonly threads: number;
  begin(): void;
  end(work: StepWork): void;
}

export interface StepWatchOptions {
  readonly threadsMax: number;
  readonly setThreads: (threads: number) => void;
  readonly nowMs: () => number;
  /** CPU time of this process so far. */
  readonly cpuMs: () => number;
  readonly idleCores: () => number;
}

export function watchSteps({
  threadsMax,
  setThreads,
  nowMs,
  ...rest
}: StepWatchOptions): StepWatch {
  const { cpuMs, idleCores } = rest;
  const governor = new ThreadGovernor(threadsMax, idleCores);
  let [startMs, startCpuMs] = [0, 0];
  return {
    get threads() {
      return governor.threads;
    },
    begin() {
      [startMs, startCpuMs] = [nowMs(), cpuMs()];
    },
    end(work) {
      const before = governor.threads;
      const now = nowMs();
      const sample = { nowMs: now, ms: now - startMs, cpuMs: cpuMs() - startCpuMs, work };
      if (governor.observe(sample) !== before) setThreads(governor.threads);
    },
  };
}
