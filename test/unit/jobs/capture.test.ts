import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import {
  Capture,
  type CapturedAnswer,
  type CaptureLimits,
  openCaptureDatabase,
  scoresMax,
} from '../../../src/jobs/capture.ts';
import { fakeGeneration } from '../../support/fake-registry.ts';
import { createManualClock, type ManualClock } from '../../support/manual-clock.ts';

const limits: CaptureLimits = { examplesMax: 8, bytesMax: 100_000, ageS: 3600 };
const generation = fakeGeneration('a1');
const good = { score: 1, comment: null, correction: null };

let directory: string;
let clock: ManualClock;
let capture: Capture;
let failures: unknown[];

function open(over: Partial<CaptureLimits> = {}): Capture {
  return new Capture({
    db: openCaptureDatabase(join(directory, 'capture.sqlite')),
    limits: { ...limits, ...over },
    seed: 1n,
    unixS: () => Math.floor(clock.unixMs() / 1000),
    after: clock.after,
    onFailure: (error) => void failures.push(error),
  });
}
function reopen(over: Partial<CaptureLimits> = {}): void {
  capture.close();
  capture = open(over);
}

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'rankgate-capture-'));
  clock = createManualClock();
  failures = [];
  capture = open();
  capture.switch('support', true);
});
afterEach(() => {
  capture.close();
  rmSync(directory, { recursive: true });
});

const answer = (i: number, over: Partial<CapturedAnswer> = {}): CapturedAnswer => ({
  id: `id-${i}`,
  tenant: 'local',
  adapter: 'support',
  generation,
  rank: 4,
  prompt: { messages: [{ role: 'user', content: `question ${i}` }] },
  answer: `answer ${i}`,
  isWhole: true,
  ...over,
});
function capturedAnswers(count: number, from = 0): void {
  for (let i = from; i < from + count; i++) capture.offer(answer(i));
  capture.flush();
}
const kept = (): string[] => capture.scored('support').map((one) => one.answer);

describe('capture', () => {
  it('keeps what is offered a little later, and learns what was said of it', () => {
    capture.offer(answer(1));
    expect(capture.figures('support').waiting).toBe(0);
    clock.advance(1000);
    expect(capture.figures('support')).toMatchObject({ waiting: 1, scored: 0 });
    const said = { score: 0.5, comment: 'short', correction: 'longer' };
    expect(capture.score('id-1', 'local', said)).toBe(true);
    expect(capture.scored('support')).toEqual([
      {
        prompt: { messages: [{ role: 'user', content: 'question 1' }] },
        answer: 'answer 1',
        isWhole: true,
        score: 0.5,
        correction: 'longer',
        scoredS: 1_764_000_001,
      },
    ]);
    expect([capture.dropped, failures, clock.pending()]).toEqual([0, [], 0]);
  });

  it('takes a score of what is still on its way', () => {
    capture.offer(answer(1));
    expect(capture.score('id-1', 'local', good)).toBe(true);
    expect([kept(), clock.pending()]).toEqual([['answer 1'], 0]);
  });

  it('is off until it is switched on, and forgets when it is switched off', () => {
    capture.offer(answer(1, { adapter: 'other' }));
    capture.flush();
    expect(capture.figures('other')).toEqual({ scored: 0, waiting: 0, bytes: 0, seen: 0 });
    capturedAnswers(3);
    capture.score('id-1', 'local', good);
    capture.noteScore('support', generation, 1);
    capture.offer(answer(9));
    capture.switch('support', false);
    capture.flush();
    capture.switch('support', true);
    expect(capture.figures('support')).toEqual({ scored: 0, waiting: 0, bytes: 0, seen: 0 });
    expect(capture.scoresOf('support', generation)).toEqual([]);
  });

  it('keeps nothing of a tenant that refuses, and forgets what it had', () => {
    const theirs = { tenant: 'tenant-acme' };
    capture.offer(answer(1, theirs));
    capture.offer(answer(2));
    capture.flush();
    capture.offer(answer(3, theirs)); // on its way
    capture.refuse('tenant-acme', true);
    capture.flush();
    capture.offer(answer(4, theirs));
    capture.flush();
    expect(capture.figures('support').waiting).toBe(1);
    reopen();
    expect(capture.isRefused('tenant-acme')).toBe(true);
    expect(capture.wants('support', 'tenant-acme')).toBe(false);
    capture.refuse('tenant-acme', false);
    expect(capture.wants('support', 'tenant-acme')).toBe(true);
  });

  it('takes no score from another tenant, or of what it has not', () => {
    capturedAnswers(1);
    expect(capture.score('id-0', 'tenant-rival', good)).toBe(false);
    expect(capture.score('nothing', 'local', good)).toBe(false);
    expect(kept()).toEqual([]);
  });

  it('keeps a sample of what was scored, of bounded size', () => {
    for (let i = 0; i < 100; i++) {
      capture.offer(answer(i));
      expect(capture.score(`id-${i}`, 'local', good)).toBe(true);
    }
    const { scored, seen } = capture.figures('support');
    expect([scored, seen]).toEqual([8, 100]);
    expect(kept().some((one) => Number(one.slice(7)) >= 50)).toBe(true);
    expect(kept().some((one) => Number(one.slice(7)) < 50)).toBe(true);
  });

  it('lets the newest wait for a score', () => {
    for (let i = 0; i < 30; i++) {
      capturedAnswers(1, i);
      clock.advance(1000);
    }
    expect(capture.figures('support').waiting).toBe(8);
    expect(capture.score('id-21', 'local', good)).toBe(false);
    expect(capture.score('id-29', 'local', good)).toBe(true);
  });

  it('counts the same answer to the same question once', () => {
    for (let i = 0; i < 20; i++) {
      capture.offer({ ...answer(1), id: `again-${i}` });
      capture.score(`again-${i}`, 'local', good);
    }
    expect(capture.figures('support')).toMatchObject({ scored: 1, waiting: 0, seen: 1 });
    expect(capture.score('again-3', 'local', good)).toBe(false); // The last one can be scored again.
    expect(capture.score('again-19', 'local', { ...good, score: 0 })).toBe(true);
    expect(capture.scored('support')[0]!.score).toBe(0);
  });

  it('forgets what is too old', () => {
    capturedAnswers(4);
    for (let i = 0; i < 4; i++) capture.score(`id-${i}`, 'local', good);
    clock.advance(3_000_000);
    capturedAnswers(1, 10);
    capture.score('id-10', 'local', good);
    clock.advance(1_000_000);
    expect(kept()).toEqual(['answer 10']);
    expect(capture.figures('support').seen).toBe(1);
  });

  it('is bounded in bytes: what waits goes first', () => {
    reopen({ bytesMax: 5000 });
    const long = 'x'.repeat(900);
    for (let i = 0; i < 4; i++) capture.offer(answer(i, { answer: `${i}${long}` }));
    capture.flush();
    for (let i = 0; i < 4; i++) capture.score(`id-${i}`, 'local', good);
    for (let i = 4; i < 8; i++) capture.offer(answer(i, { answer: `${i}${long}` }));
    capture.flush();
    expect(capture.figures('support')).toMatchObject({ scored: 4, waiting: 1 });
    capture.score('id-0', 'local', { ...good, correction: 'y'.repeat(4000) });
    const { bytes, waiting } = capture.figures('support');
    expect(bytes).toBeLessThanOrEqual(5000);
    expect(waiting).toBe(0);
    capture.offer(answer(99, { answer: 'z'.repeat(300_000) })); // more than a line may have
    capture.flush();
    expect(capture.figures('support').bytes).toBe(bytes);
  });

  it('drops and counts what comes faster than it can be written', () => {
    for (let i = 0; i < 600; i++) capture.offer(answer(i));
    expect(capture.dropped).toBe(600 - 512);
    expect(clock.pending()).toBe(1);
  });

  it('drops and counts what cannot be written, and goes on', () => {
    capture.close();
    const db = openCaptureDatabase(join(directory, 'capture.sqlite'));
    let isFull = false;
    const failing = new Proxy(db, {
      get(target, name) {
        if (name === 'atomically' && isFull) {
          return () => {
            throw new Error('full');
          };
        }
        const value = Reflect.get(target, name);
        return typeof value === 'function' ? value.bind(target) : value;
      },
    });
    const onFailure = (error: unknown): void => void failures.push(error);
    capture = new Capture({
      ...{ db: failing, limits, seed: 1n, unixS: () => 1000, after: clock.after, onFailure },
    });
    capture.offer(answer(1));
    isFull = true;
    clock.advance(1000);
    expect(capture.score('id-1', 'local', good)).toBe(false);
    capture.noteScore('support', generation, 1);
    expect([capture.dropped, failures.length]).toEqual([1, 3]);
    isFull = false;
    capturedAnswers(1, 2);
    expect(capture.figures('support').waiting).toBe(1);
  });

  it('is there again after a restart', () => {
    capturedAnswers(2);
    capture.score('id-0', 'local', good);
    capture.setState('support', { job: 'ftjob-1' });
    capture.offer(answer(5)); // closing writes it
    reopen();
    expect(capture.figures('support')).toMatchObject({ scored: 1, waiting: 2, seen: 1 });
    expect(capture.state('support')).toEqual({ job: 'ftjob-1' });
    expect([capture.isOn('support'), capture.isOn('other')]).toEqual([true, false]);
  });

  it('remembers the last scores of each generation', () => {
    const other = fakeGeneration('b2');
    capture.switch('other', true);
    for (let i = 0; i < scoresMax + 10; i++) capture.noteScore('support', generation, i / 1000);
    capture.noteScore('other', generation, 1);
    capture.noteScore('support', other, 0.5);
    const scores = capture.scoresOf('support', generation);
    expect([scores.length, scores[0], scores.at(-1)]).toEqual([
      scoresMax - 1,
      0.011,
      (scoresMax + 9) / 1000,
    ]);
    expect(capture.scoresOf('support', other)).toEqual([0.5]);
    expect(capture.scoresOf('other', generation)).toEqual([1]);
  });

  it('is of a bounded number of adapters', () => {
    for (let i = 0; i < 255; i++) capture.switch(`adapter-${i}`, true);
    expect(() => capture.switch('one-more', true)).toThrow(/256 adapters/);
    capture.switch('support', true); // is on already
    capture.switch('adapter-0', false);
    capture.switch('one-more', true);
  });
});
