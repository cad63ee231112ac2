import { expect, it } from 'vitest';
import { paceOf } from '../../../src/jobs/pace.ts';

const idle = { answers: 0, isQuota: false, threads: 2, threadsMax: 2 };

it('gives a trainer everything while nobody asks for anything, also before the first step', () => {
  expect(paceOf(idle)).toBe(1);
  expect(paceOf({ ...idle, isQuota: true })).toBe(1);
  expect(paceOf({ ...idle, threads: 0 })).toBe(1);
  expect(paceOf({ ...idle, threads: 1 })).toBe(1); // no step would change it
});

it('gives it what answers leave while they have all their threads', () => {
  expect(paceOf({ ...idle, answers: 3 })).toBe(1);
});

it('gives it nothing while others want the cores that answers need', () => {
  expect(paceOf({ ...idle, answers: 1, threads: 1 })).toBe(0);
});

it('gives it nothing of a quota that answers need', () => {
  expect(paceOf({ ...idle, answers: 1, isQuota: true })).toBe(0);
});
