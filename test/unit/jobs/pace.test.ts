import { expect, it } from 'vitest';
import { paceOf } from '../../../src/jobs/pace.ts';

const idle = { running: 0, waiting: 0, threads: 2, threadsMax: 2 };

it('gives a trainer everything while nobody asks for anything, also before the first step', () => {
  expect(paceOf(idle)).toBe(1);
  expect(paceOf({ ...idle, threads: 0 })).toBe(1);
});

it('gives it nothing while somebody waits, or while the engine’s threads are contended for', () => {
  expect(paceOf({ ...idle, waiting: 1 })).toBe(0);
  expect(paceOf({ ...idle, running: 3, waiting: 1 })).toBe(0);
  expect(paceOf({ ...idle, running: 1, threads: 1 })).toBe(0);
});

it('gives it some while answers are generated undisturbed', () => {
  const share = paceOf({ ...idle, running: 2 });
  expect(share).toBeGreaterThan(0);
  expect(share).toBeLessThan(0.5);
});
