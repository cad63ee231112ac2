import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { StepWork as Work } from '../../../src/engine/messages.ts';
import {
  estimate,
  ThreadGovernor,
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
  /** The others are guests of the same host: this one's CPU time does not show what they take. */
  hidesTheft = false;
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
      return Math.max(0, cores - threads - (this.hidesTheft ? 0 : this.others));
    });
  }

  step(work: Work): void {
    const { threads } = this.governor;
    const rows = work.decodeRows + work.prefillTokens;
    const cost = 6 + 2.2 * rows + work.decodeRanks / 30 + work.kvCells / 9000;
    const calmMs = cost * (0.15 + 0.85 / threads) * (0.9 + 0.2 * this.#random());
    const { ms, cores } = this.#contend(threads, calmMs);
    this.nowMs += ms + 0.5;
    this.history.push({ nowMs: this.nowMs, threads });
    this.governor.observe({
      nowMs: this.nowMs,
      ms,
      cpuMs: (this.hidesTheft ? 0.99 * threads : cores) * ms,
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
    const ms = calmMs * this.slowdown * (random < 0.3 ? 10 : 2);
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

  it('lowers within a few steps when others want the cores, and raises again after they have gone', () => {
    fc.assert(
      fc.property(coreCounts, seeds, fc.integer({ min: 1, max: 8 }), (cores, seed, wanted) => {
        const machine = new Machine(cores, seed);
        const others = Math.min(wanted, cores);
        machine.run(mixed(seed), () => false, 200);
        machine.others = others;
        const steps = machine.run(mixed(seed), () => machine.governor.threads < cores, 1000);
        expect(steps).toBeLessThanOrEqual(windowSteps);
        // As many as the others leave, or one when they leave none; of sixteen one may share its core unseen.
        const fits = Math.max(1, cores - others);
        const most = fits + Math.floor(cores / 16);
        machine.run(mixed(seed), () => machine.governor.threads <= most, 50 * windowSteps);
        expect(machine.governor.threads).toBeLessThanOrEqual(most);
        expect(machine.governor.threads).toBeGreaterThanOrEqual(Math.floor(fits / 2));
        machine.others = 0;
        const calmMs = machine.nowMs;
        machine.run(mixed(seed), () => machine.governor.threads === cores);
        expect(machine.nowMs - calmMs).toBeLessThan(7 * waitMsMax);
      }),
      { numRuns: 100 },
    );
  });

  it('sees by the estimate alone what a hypervisor takes', () => {
    const machine = new Machine(4, 11);
    machine.hidesTheft = true;
    machine.run(mixed(12), () => false, 300);
    expect(machine.changes()).toEqual([]);
    machine.others = 2;
    const steps = machine.run(mixed(13), () => machine.governor.threads < 4, 1000);
    expect(steps).toBeLessThanOrEqual(windowSteps);
    const fromMs = machine.nowMs;
    machine.run(mixed(14), () => machine.nowMs - fromMs > 300_000);
    const during = machine.history.filter(({ nowMs }) => nowMs > fromMs);
    const lowered = during.filter(({ threads }) => threads <= 2).length / during.length;
    expect(lowered).toBeGreaterThan(0.8);
  });

  it('believes a machine that became slower, and keeps its threads', () => {
    fc.assert(
      fc.property(coreCounts, seeds, (cores, seed) => {
        const machine = new Machine(cores, seed);
        machine.run(
          () => decode(2),
          () => false,
          300,
        );
        machine.slowdown = 3;
        machine.run(
          () => decode(2),
          () => machine.nowMs > 60_000,
        );
        expect(machine.changes().length).toBeGreaterThan(0); // it was tried
        expect(machine.changes().length).toBeLessThan(20);
        const at = machine.history.length;
        machine.run(
          () => decode(2),
          () => false,
          2000,
        );
        const low = machine.history.slice(at).filter(({ threads }) => threads < cores);
        expect(low.length).toBeLessThan(4 * windowSteps);
      }),
      { numRuns: 40 },
    );
  });

  it('changes at most once in a window and tries ever more rarely what does not last', () => {
    fc.assert(
      fc.property(seeds, fc.integer({ min: 1, max: 3 }), (seed, others) => {
        const machine = new Machine(2, seed);
        machine.others = others;
        machine.hidesIdle = true;
        machine.run(mixed(seed), () => machine.nowMs > 300_000);
        const changes = machine.changes();
        const raises = changes.filter(({ from, to }) => to > from);
        for (let i = 1; i < raises.length; i++) {
          expect(raises[i]!.nowMs - raises[i - 1]!.nowMs).toBeGreaterThanOrEqual(waitMsMin);
        }
        // 1 + 2 + 4 + … + 64 s, then one every 64 s: at most 7 + 300 / 64 tries in 300 s.
        expect(raises.length).toBeGreaterThanOrEqual(5);
        expect(raises.length).toBeLessThanOrEqual(7 + Math.ceil(300_000 / waitMsMax));
        const raised = machine.history.filter(({ threads }) => threads === 2).length;
        expect(raised).toBeLessThanOrEqual((raises.length + 1) * windowSteps);
      }),
      { numRuns: 40 },
    );
  });

  it('does not wait for eight steps that take seconds, and does not try where no core is idle', () => {
    const machine = new Machine(2, 21);
    machine.run(mixed(22), () => false, 100);
    machine.others = 2;
    machine.slowdown = 30; // two that share a core meet at every barrier
    const steps = machine.run(
      () => decode(8),
      () => machine.governor.threads === 1,
    );
    expect(steps).toBeLessThanOrEqual(2);
    machine.slowdown = 1;
    const fromMs = machine.nowMs;
    machine.run(mixed(23), () => machine.nowMs - fromMs > 100_000);
    expect(machine.changes()).toHaveLength(1);
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
    for (let i = 0; i < windowSteps; i++) step(40, 2.2);
    expect(set).toEqual([2]);
    expect(watch.threads).toBe(2);
  });
});
