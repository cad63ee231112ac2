// How many threads the next step uses. ggml's threads spin at a barrier after every op, so one thread that waits for a core
// stops all of them: with as many busy loops beside two threads, 119 steps a second became 20, and one thread made 50. Beside
// what only now and then wants a core, two threads are still 1.2 to 1.8 times as fast as one: it is tried, not concluded.
// A pure policy over measured steps. A trial has steps on two counts of threads in turns, so that both see the same work and
// the same machine, and the faster one stays. It begins where fewer threads may be better: the process got less CPU time than
// its threads × the step's time (spinning threads take all that they can get). Or where more may be: cores are idle. What
// was tried in vain is tried ever more rarely, but at once when its sign has grown.

import type { StepWork } from './messages.ts';

export interface StepSample {
  readonly nowMs: number;
  /** Of the computation alone, and CPU time of the whole process meanwhile. */
  readonly ms: number;
  readonly cpuMs: number;
  readonly work: StepWork;
}

/** Steps that are looked at, and how many of them must agree: pauses are no contention. */
export const windowSteps = 8;
export const agreeing = 6;
/** Contended steps in a row that are enough however few they are: eight rows on two contended cores took 2.4 s a step. */
const runMsMax = 1000;
/** Steps of a trial on either count. */
export const trialSteps = 12;
/** A trial ends when so many pairs or more have cost so much more on one count than on the other. Guesses. */
const clearPairs = 2;
const lossMsMax = 500;
/** As fast as the other, for noise: then fewer threads leave the cores to those who want them. Guess. */
const tie = 1.05;
/** From a trial in vain to the next: the least, doubled by each, the most. Guesses. */
export const waitMsMin = 1000;
export const waitMsMax = 64_000;
/** By how many cores a sign must have grown to be followed before. Guess. */
const growthMin = 0.3;
/** Idle cores without which more threads are not tried: below, they are only what nobody wanted for a moment. Guess. */
const idleCoresMin = 0.25;
/** Cores' worth of CPU time that may be missing. Measured on two cores: calm 0.03, with one busy loop beside 0.5. The share
 *  leaves room for what the step does on one thread. */
const missingCoresMax = 0.3;
const missingShareMax = 0.03;

/** What a step takes, in decode rows: measured on the machine of docs/benchmarks.md, SmolLM2. Only neighbours in time are
 *  compared, so that it need not be right elsewhere. */
export function estimate(work: StepWork): number {
  const { decodeRows, prefillTokens, decodeRanks, prefillRanks, kvCells } = work;
  return 3 + decodeRows + prefillTokens + decodeRanks / 48 + prefillRanks / 128 + kvCells / 2000;
}

interface Step {
  readonly ms: number;
  /** CPU time per time: cores that the process had. */
  readonly cores: number;
  /** `estimate` */
  readonly work: number;
}

/** Two counts in turns. */
class Trial {
  readonly threads: number;
  readonly sign: number;
  readonly #kept: Step[] = [];
  readonly #tried: Step[] = [];

  constructor(threads: number, sign: number) {
    this.threads = threads;
    this.sign = sign;
  }

  /** Whether the next step is one of those that are tried. */
  get isTrying(): boolean {
    return this.#tried.length < this.#kept.length;
  }

  add(step: Step): void {
    (this.isTrying ? this.#tried : this.#kept).push(step);
  }

  /** How much longer the tried count takes, as a factor; null: not known yet. */
  get slowdown(): number | null {
    const pairs = this.#tried.map((tried, i) => ({ tried, kept: this.#kept[i]! }));
    const lossMs = pairs.reduce(
      (sum, { tried, kept }) => sum + tried.ms - (tried.work * kept.ms) / kept.work,
      0,
    );
    const isClear = pairs.length >= clearPairs && Math.abs(lossMs) >= lossMsMax;
    if (!isClear && pairs.length < trialSteps) return null;
    // As means, not as medians: what stops all threads for one step in three is slow on the whole.
    return paceOf(this.#tried) / paceOf(this.#kept);
  }
}

export class ThreadGovernor {
  /** Of the next step. */
  threads: number;
  readonly #threadsMax: number;
  readonly #idleCores: () => number;
  /** Without a trial. */
  #kept: number;
  #trial: Trial | null = null;
  /** The last steps since the last change or trial. */
  #window: Step[] = [];
  #waitMs: number = waitMsMin;
  #triedMs: number = Number.NEGATIVE_INFINITY;
  /** Of the last trial, if that was in vain: nothing else can have grown. */
  #sign: number = Number.POSITIVE_INFINITY;
  #askedMs: number = Number.NEGATIVE_INFINITY;

  /** `idleCores`: of the whole machine, on average since it was last asked; Infinity where nobody knows. */
  constructor(threadsMax: number, idleCores: () => number) {
    this.threads = threadsMax;
    this.#kept = threadsMax;
    this.#threadsMax = threadsMax;
    this.#idleCores = idleCores;
  }

  /** Returns the threads of the next step, which `threads` is from then on. */
  observe({ nowMs, ms, cpuMs, work }: StepSample): number {
    if (this.#threadsMax === 1 || !(ms > 0)) return this.threads;
    const step: Step = { ms, cores: cpuMs / ms, work: estimate(work) };
    if (this.#trial === null) {
      this.#window = [...this.#window, step].slice(-windowSteps);
      this.#trial = this.#fewer(nowMs) ?? this.#more(nowMs);
    } else {
      this.#trial.add(step);
      this.#end(this.#trial, nowMs);
    }
    this.threads = this.#trial?.isTrying ? this.#trial.threads : this.#kept;
    return this.threads;
  }

  #fewer(nowMs: number): Trial | null {
    const missing = this.#missingCores();
    if (this.#kept === 1 || missing === null || !this.#isDue(missing, nowMs)) return null;
    // Two that share a core have half of it each: as much again is to be given up.
    const threads = Math.round(this.#kept - 2 * missing);
    return new Trial(Math.max(1, Math.min(this.#kept - 1, threads)), missing);
  }

  #more(nowMs: number): Trial | null {
    const isEarly = nowMs - this.#askedMs < waitMsMin || this.#window.length < windowSteps;
    if (this.#kept === this.#threadsMax || isEarly) return null;
    this.#askedMs = nowMs;
    const idle = this.#idleCores();
    if (idle < idleCoresMin || !this.#isDue(idle, nowMs)) return null;
    return new Trial(Math.min(this.#threadsMax, Math.ceil(this.#kept * 1.5)), idle);
  }

  #isDue(sign: number, nowMs: number): boolean {
    return nowMs - this.#triedMs >= this.#waitMs || sign - this.#sign >= growthMin;
  }

  #end(trial: Trial, nowMs: number): void {
    const { slowdown, sign, threads } = trial;
    if (slowdown === null) return;
    const isBetter = threads < this.#kept ? slowdown <= tie : slowdown * tie < 1;
    if (isBetter) this.#kept = threads;
    this.#waitMs = isBetter ? waitMsMin : Math.min(2 * this.#waitMs, waitMsMax);
    this.#sign = isBetter ? Number.POSITIVE_INFINITY : sign;
    this.#triedMs = nowMs;
    this.#trial = null;
    this.#window = [];
  }

  /** Of most of a whole window, or of a long run at its end; null: none are. */
  #missingCores(): number | null {
    const missing = this.#window.map(({ cores }) => this.#kept - cores);
    const most = Math.max(missingCoresMax, missingShareMax * this.#kept);
    const robbed = missing.filter((cores) => cores > most);
    const calm = missing.findLastIndex((cores) => cores <= most);
    const runMs = this.#window.slice(calm + 1).reduce((sum, { ms }) => sum + ms, 0);
    return robbed.length >= agreeing || runMs >= runMsMax ? median(robbed) : null;
  }
}

/** Of all of them together. */
function paceOf(steps: readonly Step[]): number {
  const sum = (of: (step: Step) => number): number => steps.reduce((all, one) => all + of(one), 0);
  return sum(({ ms }) => ms) / sum(({ work }) => work);
}

function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
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
