import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { onEvent } from '../../../src/channels.ts';
import type { Job } from '../../../src/jobs/job.ts';
import type { TrainingResult } from '../../../src/jobs/messages.ts';
import type { Losses, Verdict } from '../../../src/jobs/refresh-gate.ts';
import { fakeGeneration, fakeManifest } from '../../support/fake-registry.ts';
import { createTestTraining, type TestTraining } from '../../support/test-training.ts';

// The test is the trainer: it answers what a refresh came to. `support` is live at generation a; b and c are made of it.

const [a, b, c] = [fakeGeneration('a1'), fakeGeneration('b2'), fakeGeneration('c3')];
let test: TestTraining;
let outcomes: string[];
let stopListening: () => void;

beforeEach(() => {
  test = createTestTraining({ bytesMax: 1_000_000, filesMax: 100 });
  for (const one of [a, b, c]) test.registry.store(one, fakeManifest(8), 100);
  test.registry.create('support', a);
  test.capture.switch('support', true);
  outcomes = [];
  stopListening = onEvent('refresh-end', ({ outcome }) => void outcomes.push(outcome));
});
afterEach(async () => {
  await test.refresher.close();
  expect(test.failures).toEqual([]);
  stopListening();
  test[Symbol.dispose]();
});

let asked = 0;
/** So many questions that were answered well. */
function traffic(count: number): void {
  for (let i = 0; i < count; i++) {
    asked += 1;
    const id = `id-${asked}`;
    const prompt = { messages: [{ role: 'user', content: `question ${asked}` }] } as const;
    const made = { id, tenant: 'local', adapter: 'support', generation: a, rank: 8, prompt };
    test.capture.offer({ ...made, answer: `answer ${asked}`, isWhole: true });
    test.capture.score(id, 'local', { score: 1, comment: null, correction: null });
    test.refresher.noteScore('support', live(), 1);
  }
}
const live = () => test.registry.find('support')!.generation;
const notes = () => test.refresher.notes('support');

async function started(): Promise<Job> {
  const job = await test.refresher.start('support', true);
  if (typeof job === 'string') throw new Error(job);
  return job;
}

const lossesOf = (count: number, loss: number): Losses => ({
  byRank: [1, 2, 4, 8].map(() => Array.from({ length: count }, (_, i) => loss + i / 100)),
  guard: [3, 4],
});
function resultOf(
  { before, after, earlier = null }: { before: number; after: number; earlier?: number | null },
  examples = 8,
): TrainingResult {
  const comparison = {
    ranks: [1, 2, 4, 8],
    before: lossesOf(examples, before),
    after: lossesOf(examples, after),
    earlier: earlier === null ? null : lossesOf(examples, earlier).byRank.at(-1)!,
  };
  return { directory: '', losses: [], baseLoss: null, aurac: null, comparison };
}
const verdictOn = (job: Job, result: TrainingResult): Verdict => test.refresher.judge(job, result)!;
/** As the supervisor ends a job. */
async function end(job: Job): Promise<void> {
  test.jobs.cancel(job);
  await test.refresher.look();
}

async function promote(to: typeof b, result = resultOf({ before: 2, after: 1 })): Promise<Job> {
  traffic(24);
  const job = await started();
  expect(verdictOn(job, result).reasons).toEqual([]);
  expect(test.refresher.promote(job, to)).toBeNull();
  await end(job);
  return job;
}

describe('the refresh loop', () => {
  it('starts by itself once there is enough, and not again before its time', async () => {
    traffic(3);
    await test.refresher.look();
    expect(notes().job).toBeNull();
    traffic(24);
    test.clock.advance(2000); // its tick
    await expect.poll(() => notes().job).not.toBeNull();
    const job = test.jobs.find(notes().job!, null)!;
    const { model, startFrom, adapter, refresh, recipe } = job.request;
    expect({ model, startFrom, adapter, refresh }).toMatchObject({
      ...{ model: 'support', startFrom: a, adapter: 'support' },
      refresh: { earlier: null },
    });
    expect(refresh!.freshHeldOut).toBe(test.files.find(job.validationFile!, null)!.examples);
    expect([recipe.rank, recipe.stepsMax]).toEqual([8, 3]);
    await end(job);
    test.clock.advance(1000);
    traffic(24);
    await test.refresher.look();
    expect(notes().job).toBeNull();
    test.clock.advance(60_000);
    await expect.poll(() => notes().job).not.toBeNull();
  });

  it('promotes what the gate lets pass, and watches it', async () => {
    const job = await promote(b);
    expect(live()).toBe(b);
    expect(notes()).toMatchObject({
      ...{ job: null, files: [] },
      watch: { generation: b, earlier: a },
      last: { outcome: 'promoted', job: job.id, generation: b, reasons: [] },
    });
    expect(notes().watch!.bound).toBeCloseTo(1 - Math.sqrt(Math.log(400) / 48), 12);
    expect(outcomes).toEqual(['promoted']);
    expect(test.files.list(null, { after: null, limit: 10, order: 'asc' }).items).toEqual([]);
  });

  it('is the same when the gateway dies after the swap', async () => {
    traffic(24);
    const job = await started();
    test.refresher.promote(job, b);
    test.refresher.noteScore('support', b, 0.5);
    const watch = notes().watch;
    expect(test.refresher.promote(job, b)).toBeNull();
    expect([live(), notes().watch]).toEqual([b, watch]);
  });

  it('discards what the gate refuses', async () => {
    traffic(24);
    const job = await started();
    const verdict = verdictOn(job, resultOf({ before: 1, after: 2 }));
    expect(verdict).toMatchObject({ isPromoted: false });
    expect(notes().last).toMatchObject({ outcome: 'discarded', job: job.id });
    expect(notes().last!.reasons).toEqual(verdict.reasons);
    expect(live()).toBe(a);
  });

  it('discards what was made from a generation that is no longer live, or of a name that is gone', async () => {
    traffic(24);
    const job = await started();
    test.registry.swap('support', c, a);
    expect(test.refresher.promote(job, b)).toBe('the live generation changed meanwhile');
    expect([live(), notes().watch]).toEqual([c, null]);
    test.registry.remove('support', null);
    expect(test.refresher.promote(job, b)).toBe('the live generation changed meanwhile');
    await test.refresher.look();
    expect(test.capture.isOn('support')).toBe(false);
    expect(outcomes).toEqual(['discarded', 'discarded']);
  });

  it('leaves jobs alone that are no refreshes', () => {
    const request = { refresh: undefined, adapter: 'x' };
    const job = { id: 'x', request } as unknown as Job;
    expect(test.refresher.judge(job, resultOf({ before: 1, after: 2 }))).toBeNull();
  });

  it('tells that its job failed', async () => {
    traffic(24);
    const job = await started();
    const claim = test.jobs.claim()!;
    test.jobs.fail(claim, { code: 'INVALID_FILE', message: 'line 3 cannot be learnt' });
    await test.refresher.look();
    expect(notes().last).toMatchObject({
      outcome: 'failed',
      job: job.id,
      reasons: ['line 3 cannot be learnt'],
    });
    expect([notes().job, notes().files]).toEqual([null, []]);
  });
});

describe('a generation on probation', () => {
  it('is put back when its scores are worse, and not for the scores of another', async () => {
    await promote(b);
    for (let i = 0; i < 100; i++) test.refresher.noteScore('support', a, 0);
    expect(live()).toBe(b);
    let scores = 0;
    while (live() === b && scores < 100) {
      test.refresher.noteScore('support', b, 0);
      scores += 1;
    }
    expect(scores).toBeLessThan(15);
    expect(live()).toBe(a);
    expect(notes()).toMatchObject({ watch: null, last: { outcome: 'rolled-back', generation: b } });
    expect(notes().last!.reasons[0]).toContain('its scores are worse');
    expect(outcomes).toEqual(['promoted', 'rolled-back']);
  });

  it('stays while it is as good, and where nothing was said of the one before', async () => {
    await promote(b);
    for (let i = 0; i < 60; i++) test.refresher.noteScore('support', b, 1);
    expect(live()).toBe(b);
    test.capture.switch('support', false);
    test.capture.switch('support', true);
    traffic(24);
    const job = await started();
    test.capture.switch('support', false);
    test.capture.switch('support', true); // also forgets the scores
    expect(test.refresher.promote(job, c)).toBeNull();
    for (let i = 0; i < 60; i++) test.refresher.noteScore('support', c, 0);
    expect(live()).toBe(c);
  });

  it('is put back when new questions show it worse, and what was made of it is discarded', async () => {
    await promote(b);
    test.clock.advance(1000);
    traffic(40);
    const job = await started();
    expect(job.request.refresh).toMatchObject({ earlier: a });
    const fresh = job.request.refresh!.freshHeldOut;
    expect(fresh).toBeGreaterThan(8);
    const result = resultOf({ earlier: 1, before: 2, after: 0.5 }, fresh);
    const verdict = verdictOn(job, result);
    expect(verdict.isPromoted).toBe(false);
    expect(verdict.reasons.join()).toContain('has been rolled back');
    expect(live()).toBe(a);
    expect(outcomes).toEqual(['promoted', 'rolled-back', 'discarded']);
  });

  it('counts a job’s losses once, however often it is judged', async () => {
    await promote(b);
    test.clock.advance(1000);
    traffic(10);
    const job = await started();
    const fresh = job.request.refresh!.freshHeldOut;
    const result = resultOf({ earlier: 1, before: 1.3, after: 0.5 }, fresh);
    for (let i = 0; i < 50; i++) verdictOn(job, result);
    expect(live()).toBe(b);
  });

  it('is let go when somebody moves the name', async () => {
    await promote(b);
    test.registry.swap('support', c, b);
    for (let i = 0; i < 30; i++) test.refresher.noteScore('support', b, 0);
    expect([live(), notes().watch]).toEqual([c, null]);
    expect(outcomes).toEqual(['promoted']);
  });

  it('is remembered by the next process', async () => {
    await promote(b);
    expect(test.capture.state('support')).toMatchObject({ watch: { generation: b } });
  });
});
