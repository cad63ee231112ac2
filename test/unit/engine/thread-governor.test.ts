import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { StepWork as Work } from '../../../src/engine/messages.ts';
import {
  agreeing,
  estimate,
  ThreadGovernor,
  trialSteps,
  waitMsMax,
  waitMsMin,
  watchSteps,
  windowSteps,
} from '../../../src/engine/thread-governor.ts';
import { createRng } from '../../support/random.ts';

const decode = (rows: number): Work => ({
  decodeRows: rows,
  prefillTokens: 0,
  decodeRanks: 16 * rows,
  prefillRanks: 0,
  kvCells: 300 * rows,
});
const prefill = (tokens: number): Work => ({
  ...decode(0),
  prefillTokens: tokens,
  kvCells: (tokens * tokens) / 2,
});

/** Cores shared fairly by the engine's spinning threads and by `others`, which never sleep. Its costs are not the governor's
 *  estimate: another price of a row for every size of step. */
class Machine {
  nowMs = 0;
  others = 0;
  /** Another clock rate. */
  slowdown = 1;
  /** As in a container. */
  hidesIdle = false;
  /** The others want a core for moments only: they take time, and stop nobody for long. */
  areBrief = false;
  readonly #cores: number;
  readonly #random: () => number;
  readonly governor: ThreadGovernor;
  readonly history: Array<{ nowMs: number; threads: number }> = [];

  constructor(cores: number, seed: number, threadsMax: number = cores) {
    this.#cores = cores;
    this.#random = createRng(seed).next;
    this.governor = new ThreadGovernor(threadsMax, () => {
      const { threads } = this.governor;
      if (this.hidesIdle) return Number.POSITIVE_INFINITY;
      return Math.max(0, cores - threads - this.others);
    });
  }

  step(work: Work): void {
    const { threads } = this.governor;
    const rows = work.decodeRows + work.prefillTokens;
    const cost = 6 + 2.2 * rows + work.decodeRanks / 30 + work.kvCells / 9000;
    const calmMs = cost * share(threads) * (0.9 + 0.2 * this.#random());
    const { ms, cores } = this.#contend(threads, calmMs);
    this.nowMs += ms + 0.5;
    this.history.push({ nowMs: this.nowMs, threads });
    this.governor.observe({
      nowMs: this.nowMs,
      ms,
      cpuMs: cores * ms,
      work,
    });
  }

  /** A barrier waits for the thread with the least time, and each of a step's many waits for the slowest of its waiters. */
  #contend(threads: number, calmMs: number): { ms: number; cores: number } {
    const random = this.#random();
    const wanting = threads + this.others;
    if (wanting <= this.#cores) {
      const pauseMs = random < 0.03 ? 100 * this.#random() : 0; // a step in thirty is hit by something
      const ms = calmMs * this.slowdown + pauseMs;
      return { ms, cores: (threads * (0.99 * ms - pauseMs)) / ms };
    }
    if (threads === 1) {
      const share = this.others < this.#cores ? 1 : this.#cores / wanting;
      return { ms: calmMs / share, cores: share };
    }
    const shared = wanting - this.#cores; // cores on which two meet
    const ms = calmMs * this.slowdown * (this.areBrief ? 1.3 : random < 0.3 ? 10 : 2);
    return { ms, cores: Math.max(0.5 * threads, threads - 0.5 * shared) };
  }

  /** Steps until `until` holds; the number of steps. */
  run(work: () => Work, until: () => boolean, stepsMax = 100_000): number {
    let steps = 0;
    while (!until() && steps < stepsMax) {
      this.step(work());
      steps++;
    }
    return steps;
  }

  changes(): Array<{ nowMs: number; from: number; to: number }> {
    return this.history.flatMap((one, i) => {
      const next = this.history[i + 1];
      return next === undefined || next.threads === one.threads
        ? []
        : [{ nowMs: one.nowMs, from: one.threads, to: next.threads }];
    });
  }
}

/** Of a step's time on one thread. */
const share = (threads: number): number => 0.15 + 0.85 / threads;
const coreCounts = fc.constantFrom(2, 3, 4, 8, 16, 64);
const seeds = fc.integer({ min: 0, max: 2 ** 31 });
const mixed = (seed: number): (() => Work) => {
  const random = createRng(seed).next;
  return () =>
    random() < 0.2
      ? prefill(16 + Math.floor(random() * 200))
      : decode(1 + Math.floor(random() * 12));
};

describe('ThreadGovernor', () => {
  it('stays at all threads on a calm machine, whatever the steps are and however they jitter', () => {
    fc.assert(
      fc.property(coreCounts, seeds, (cores, seed) => {
        const machine = new Machine(cores, seed);
        machine.run(mixed(seed), () => false, 2000);
        expect(machine.changes()).toEqual([]);
      }),
      { numRuns: 60 },
    );
  });

  it('goes down to what others leave, and up again when they have gone', () => {
    fc.assert(
      fc.property(coreCounts, seeds, fc.integer({ min: 1, max: 8 }), (cores, seed, wanted) => {
        const machine = new Machine(cores, seed);
        const others = Math.min(wanted, (cores / 2) | 0);
        machine.run(mixed(seed), () => false, 200);
        machine.others = others;
        const fits = Math.max(1, cores - others);
        const most = fits + Math.floor(cores / 16); // of sixteen one may share its core unseen
        const steps = machine.run(mixed(seed), () => machine.governor.threads <= most, 1000);
        expect(steps).toBeLessThan(windowSteps + 2);
        const at = machine.history.length;
        machine.run(mixed(seed), () => false, 2000);
        const during = machine.history.slice(at).map(({ threads }) => threads);
        expect(during.filter((threads) => threads <= most).length).toBeGreaterThan(0.85 * 2000);
        expect(Math.min(...during)).toBeGreaterThanOrEqual(Math.floor(fits / 2));
        machine.others = 0;
        const calmMs = machine.nowMs;
        const isFast = ({ threads }: { threads: number }): boolean =>
          share(threads) <= 1.12 * share(cores);
        const lasts = 3 * trialSteps;
        machine.run(
          mixed(seed),
          () => machine.history.length > lasts && machine.history.slice(-lasts).every(isFast),
        );
        expect(machine.nowMs - calmMs).toBeLessThan(2 * waitMsMax);
      }),
      { numRuns: 60 },
    );
  });

  it('keeps its threads beside what wants a core for moments: they are faster all the same', () => {
    fc.assert(
      fc.property(seeds, (seed) => {
        const machine = new Machine(2, seed);
        machine.others = 1;
        machine.areBrief = true;
        machine.run(mixed(seed), () => machine.nowMs > 300_000);
        const fewer = machine.history.filter(({ threads }) => threads < 2).length;
        expect(fewer).toBeGreaterThan(0); // it was tried
        expect(fewer / machine.history.length).toBeLessThan(0.1);
      }),
      { numRuns: 30 },
    );
  });

  it('does not take a machine that became slower for a contended one', () => {
    const machine = new Machine(4, 11);
    machine.run(mixed(12), () => false, 300);
    machine.slowdown = 3;
    machine.run(mixed(13), () => false, 2000);
    expect(machine.changes()).toEqual([]);
  });

  it('tries ever more rarely what is no better', () => {
    fc.assert(
      fc.property(seeds, (seed) => {
        const machine = new Machine(2, seed);
        machine.others = 1;
        machine.hidesIdle = true;
        machine.run(mixed(seed), () => machine.nowMs > 300_000);
        const raised = machine.history.filter(({ threads }) => threads === 2).length;
        // 1 + 2 + 4 + … + 64 s, then one every 64 s; before the first and after a misjudged one it is at two.
        const trials = 7 + Math.ceil(300_000 / waitMsMax);
        expect(raised).toBeGreaterThan(4 * trialSteps);
        expect(raised).toBeLessThanOrEqual((trials + 4) * trialSteps + 2 * windowSteps);
      }),
      { numRuns: 40 },
    );
  });

  it('does not wait for eight steps that take seconds, and does not try where no core is idle', () => {
    const machine = new Machine(2, 21);
    machine.run(mixed(22), () => false, 100);
    machine.others = 2;
    machine.slowdown = 30; // two that share a core meet at every barrier
    const isOver = (): boolean => machine.history.slice(-4).every(({ threads }) => threads === 1);
    expect(machine.run(() => decode(8), isOver)).toBeLessThanOrEqual(2 + 4 + 4);
    machine.slowdown = 1;
    const fromMs = machine.nowMs;
    const from = machine.history.length;
    machine.run(mixed(23), () => machine.nowMs - fromMs > 100_000);
    expect(machine.history.slice(from).every(({ threads }) => threads === 1)).toBe(true);
    machine.others = 0;
    machine.run(mixed(24), () => machine.governor.threads === 2);
    expect(machine.nowMs - fromMs).toBeLessThan(100_000 + 3 * waitMsMin);
  });

  it('stays within 1 and the most, whatever it is told', () => {
    const number = fc.double({ min: 0, max: 1e6, noDefaultInfinity: true, noNaN: true });
    const sample = fc.record({ gapMs: number, ms: number, cpuMs: number, rows: fc.nat(5000) });
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 256 }),
        fc.array(sample, { maxLength: 200 }),
        (max, samples) => {
          const governor = new ThreadGovernor(max, () => 1);
          let nowMs = 0;
          for (const { gapMs, ms, cpuMs, rows } of samples) {
            nowMs += gapMs;
            governor.observe({ nowMs, ms, cpuMs, work: decode(rows) });
            expect(Number.isInteger(governor.threads)).toBe(true);
            expect(governor.threads).toBeGreaterThanOrEqual(1);
            expect(governor.threads).toBeLessThanOrEqual(max);
          }
        },
      ),
    );
  });

  it('estimates more for more work of every kind', () => {
    const base = { ...decode(4), prefillTokens: 10, prefillRanks: 80 };
    for (const key of Object.keys(base) as Array<keyof Work>) {
      expect(estimate({ ...base, [key]: base[key] + 100 }), key).toBeGreaterThan(estimate(base));
    }
  });
});

describe('watchSteps', () => {
  it('measures between begin and end, and sets threads only when they change', () => {
    let [now, cpu] = [0, 0];
    const set: number[] = [];
    const watch = watchSteps({
      threadsMax: 4,
      setThreads: (threads) => set.push(threads),
      nowMs: () => now,
      cpuMs: () => cpu,
      idleCores: () => 0,
    });
    const step = (ms: number, cores: number): void => {
      [now, cpu] = [now + 5, cpu + 5]; // between steps the loop works on one thread: not the kernels' doing
      watch.begin();
      [now, cpu] = [now + ms, cpu + ms * cores];
      watch.end(decode(1));
    };
    for (let i = 0; i < 50; i++) step(10, 4);
    expect(set).toEqual([]);
    for (let i = 0; i < agreeing; i++) step(40, 2.2);
    expect(set).toEqual([]);
    step(40, 2.2); // a trial begins with what it is compared with
    expect(set).toEqual([1]);
    for (let i = 1; i < 2 * trialSteps; i++) step(i % 2 === 0 ? 40 : 10, watch.threads);
    expect(set.slice(-2)).toEqual([4, 1]);
    expect(watch.threads).toBe(1);
  });
});
