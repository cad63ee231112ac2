import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { openJobsDatabase } from '../../../src/jobs/job.ts';
import {
  checkpointsMax,
  eventsMax,
  JobStore,
  jobsMax,
  openJobsMax,
} from '../../../src/jobs/job-store.ts';
import { createTestStore, leaseMs, newJob, progressAt } from '../../support/job-stores.ts';

const wish = { after: null, limit: 100, order: 'desc' } as const;

describe('the job store', () => {
  it('hands out jobs as they came, owners by turns', () => {
    const { store } = createTestStore();
    const ids = ['', '', '', 'acme', 'acme'].map((owner) => store.create(owner, null, newJob()).id);
    const order = ids.map(() => ids.indexOf(store.claim()!.jobId));
    expect(order).toEqual([0, 3, 1, 4, 2]);
    expect(store.claim()).toBeNull();
  });

  it('goes from the queue over the files to running and the end, and tells each', () => {
    const { store } = createTestStore();
    const { id } = store.create('', null, newJob());
    const state = (): string => store.find(id, null)!.state;
    expect(state()).toBe('queued');
    const claim = store.claim()!;
    expect(state()).toBe('validating_files');
    expect(claim.checkpointPath).toBeNull();
    store.start(claim, 100, 'training has begun');
    expect(state()).toBe('running');
    store.progress(claim, progressAt(7));
    store.checkpoint(claim, 'a/1/step-7', progressAt(7));
    const result = {
      generation: `sha256:${'a'.repeat(64)}`,
      losses: [{ rank: 1, loss: 2 }],
      baseLoss: 3,
      aurac: 0.5,
    } as const;
    store.succeed(claim, result);
    const job = store.find(id, null)!;
    expect(job).toMatchObject({ state: 'succeeded', result, progress: progressAt(7), error: null });
    const events = store.events(job, null, 100).items;
    expect(events.map(({ message }) => message)).toEqual([
      'the model ft.tiny.1 can be asked for',
      'checkpoint at step 7',
      'step 7 of 100: loss 0.1250',
      'training has begun',
      'a trainer has begun: it reads the files',
      'the job waits for a trainer; its model will be ft.tiny.1',
    ]);
    expect(events[2]!.metrics).toMatchObject({ step: 7, train_loss: 0.125 });
    expect([...store.counts()]).toEqual([['succeeded', 1]]);
  });

  it('goes on from the furthest checkpoint, and forgets progress beyond it', () => {
    const { store, clock } = createTestStore();
    const { id } = store.create('', null, newJob());
    const first = store.claim()!;
    store.start(first, 100, 'begun');
    store.checkpoint(first, 'x/1/a', progressAt(10));
    store.progress(first, progressAt(19));
    store.crash(first, 'signal SIGKILL');
    expect(store.find(id, null)).toMatchObject({ attempts: 1, progress: progressAt(10) });
    expect(store.claim(), 'not at once').toBeNull();
    clock.advance(2000);
    const second = store.claim()!;
    expect(second).toMatchObject({ checkpointPath: 'x/1/a', fence: first.fence + 1 });
    // A checkpoint that is no further is no progress: a job that dies after each resume ends all the same.
    store.checkpoint(second, 'x/2/a', progressAt(10));
    expect(store.find(id, null)!.attempts).toBe(1);
    store.checkpoint(second, 'x/2/b', progressAt(20));
    expect(store.find(id, null)!.attempts).toBe(0);
  });

  it('ends a job that three in a row have died of, with the reason', () => {
    const { store, clock } = createTestStore();
    const { id } = store.create('', null, newJob());
    for (let attempt = 1; attempt <= 3; attempt++) {
      clock.advance(60_000);
      store.crash(store.claim()!, 'the trainer ended (signal SIGKILL)');
    }
    clock.advance(60_000);
    expect(store.claim()).toBeNull();
    expect(store.find(id, null)).toMatchObject({
      state: 'failed',
      error: {
        code: 'TRAINER_FAILED',
        message:
          'the trainer ended (signal SIGKILL): the last of 3 attempts without a new checkpoint',
      },
    });
  });

  it('takes back what gave no sign of life, and not what did', () => {
    const { store, clock } = createTestStore();
    const [one, two] = [store.create('', null, newJob()), store.create('', null, newJob())];
    const [silent, alive] = [store.claim()!, store.claim()!];
    clock.advance(leaseMs - 1);
    store.renew(alive);
    clock.advance(2);
    store.expire();
    expect([store.isHeld(silent), store.isHeld(alive)]).toEqual([false, true]);
    expect(store.find(one.id, null)!.state).toBe('queued');
    expect(store.find(two.id, null)!.state).toBe('validating_files');
  });

  it('gives a job back unharmed when the gateway closes, and with a strike when it dies', () => {
    const { store, reopen } = createTestStore();
    const { id } = store.create('', null, newJob());
    store.release(store.claim()!);
    expect(store.find(id, null)).toMatchObject({ state: 'queued', attempts: 0 });
    const claim = store.claim()!;
    const next = reopen();
    expect(next.find(id, null)).toMatchObject({ state: 'queued', attempts: 1 });
    expect(next.renew(claim)).toBe(false);
    expect(next.claim()!.fence).toBe(claim.fence + 1); // at once: the wait was for the dead process's clock
  });

  it('shows a tenant its own alone', () => {
    const { store } = createTestStore();
    const theirs = store.create('acme', 'acme', newJob('file-acme'));
    store.create('', null, newJob());
    expect(store.list('acme', wish).items.map(({ id }) => id)).toEqual([theirs.id]);
    expect(store.list(null, wish).items).toHaveLength(2);
    expect(store.find(theirs.id, 'rival')).toBeNull();
    expect(() => store.create('rival', 'rival', newJob('file-acme'))).toThrow(/no such file/);
    expect(() => store.list('rival', { ...wish, after: theirs.id })).toThrow(/after/);
  });

  it('pages both ways', () => {
    const { store } = createTestStore();
    const ids = Array.from({ length: 5 }, () => store.create('', null, newJob()).id);
    const pages: string[][] = [];
    for (let after: string | null = null; ; ) {
      const { items, hasMore } = store.list(null, { after, limit: 2, order: 'asc' });
      pages.push(items.map(({ id }) => id));
      if (!hasMore) break;
      after = items.at(-1)!.id;
    }
    expect(pages).toEqual([ids.slice(0, 2), ids.slice(2, 4), ids.slice(4)]);
    const back = store.list(null, { after: ids[3]!, limit: 9, order: 'desc' });
    expect(back).toMatchObject({ hasMore: false });
    expect(back.items.map(({ id }) => id)).toEqual(ids.slice(0, 3).reverse());
  });

  it('keeps the last events and checkpoints of a job, and pages them', () => {
    const { store } = createTestStore();
    const job = store.create('', null, newJob());
    const claim = store.claim()!;
    for (let i = 0; i < eventsMax; i++) store.tell(claim, `event ${i}`, null);
    const { items, hasMore } = store.events(job, null, 2);
    expect([items.map(({ message }) => message), hasMore]).toEqual([
      [`event ${eventsMax - 1}`, `event ${eventsMax - 2}`],
      true,
    ]);
    expect(store.events(job, items[1]!.id, 1).items[0]!.message).toBe(`event ${eventsMax - 3}`);
    const all = store.events(job, null, eventsMax + 10);
    expect([all.items.length, all.hasMore]).toEqual([eventsMax, false]);
    for (let step = 0; step < checkpointsMax + 5; step++) {
      store.checkpoint(claim, `p/${step}`, progressAt(step));
    }
    const kept = store.checkpoints(job, null, 1000).items;
    expect([kept.length, kept[0]!.path, kept.at(-1)!.path]).toEqual([
      checkpointsMax,
      `p/${checkpointsMax + 4}`,
      'p/5',
    ]);
    const other = store.create('', null, newJob());
    expect(() => store.events(other, items[0]!.id, 5)).toThrow(/after/);
    expect(() => store.events(other, 'nonsense', 5)).toThrow(/after/);
  });

  it('holds an owner to so many open jobs, and forgets its oldest ended ones', () => {
    const { store } = createTestStore();
    const open = Array.from({ length: openJobsMax }, () => store.create('', null, newJob()));
    expect(() => store.create('', null, newJob())).toThrow(
      expect.objectContaining({ code: 'QUOTA_EXCEEDED' }),
    );
    store.create('acme', 'acme', newJob('file-acme')); // another's limit is its own
    for (const job of open) store.cancel(job);
    for (let i = openJobsMax; i < jobsMax; i++) store.cancel(store.create('', null, newJob()));
    const { id } = store.create('', null, newJob());
    expect(store.find(open[0]!.id, null)).toBeNull();
    expect(store.find(open[1]!.id, null)).not.toBeNull();
    expect(store.find(id, null)!.state).toBe('queued');
  });

  it('survives its process, and admits one process at a time', () => {
    const dir = mkdtempSync(join(tmpdir(), 'rankgate-jobs-'));
    const path = join(dir, 'jobs.sqlite');
    const open = () => {
      const db = openJobsDatabase(path);
      const options = { nowMs: () => 0, unixS: () => 5, newId: () => 'abc', leaseMs };
      return { db, store: new JobStore({ db, ...options }) };
    };
    const { db, store } = open();
    db.sql("INSERT INTO files VALUES (1, 'file-1', '', 'f', 1, 1, 'x', 0)").run();
    const job = store.create('', null, newJob());
    expect(open).toThrow(expect.objectContaining({ code: 'NO_CAPACITY' }));
    db.close();
    const again = open();
    expect(again.store.find(job.id, null)).toEqual(job);
    again.db.close();
    rmSync(dir, { recursive: true });
  });
});
