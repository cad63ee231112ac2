import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { Job } from '../../src/jobs/job.ts';
import { attemptsMax, type Claim, type JobStore } from '../../src/jobs/job-store.ts';
import { createTestStore, leaseMs, newJob, progressAt } from '../support/job-stores.ts';

// Any interleaving of workers that claim, write, die, stop and wake up again, of time that passes, of cancels and of gateways
// that end: whoever has lost a job changes nothing of it, nobody holds one for ever, and no job is tried for ever.

const verbs = ['renew', 'start', 'progress', 'checkpoint', 'crash', 'release', 'fail', 'succeed'];
type Step =
  | { readonly kind: 'create' | 'claim' | 'expire' | 'reopen' }
  | { readonly kind: 'pass'; readonly ms: number }
  | { readonly kind: 'cancel'; readonly at: number }
  | { readonly kind: 'write'; readonly at: number; readonly verb: string; readonly step: number };

const pick = fc.nat(1000);
const stepArbitrary: fc.Arbitrary<Step> = fc.oneof(
  { weight: 2, arbitrary: fc.constant({ kind: 'create' } as const) },
  { weight: 4, arbitrary: fc.constant({ kind: 'claim' } as const) },
  { weight: 2, arbitrary: fc.constant({ kind: 'expire' } as const) },
  { weight: 1, arbitrary: fc.constant({ kind: 'reopen' } as const) },
  { weight: 3, arbitrary: fc.record({ kind: fc.constant('pass' as const), ms: fc.nat(2500) }) },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant('cancel' as const), at: pick }) },
  {
    weight: 12,
    arbitrary: fc.record({
      kind: fc.constant('write' as const),
      at: pick,
      verb: fc.constantFrom(...verbs),
      step: fc.nat(6),
    }),
  },
);

function write(store: JobStore, claim: Claim, verb: string, step: number): boolean {
  switch (verb) {
    case 'renew':
      return store.renew(claim);
    case 'start':
      return store.start(claim, 100, 'begun');
    case 'progress':
      return store.progress(claim, progressAt(step));
    case 'checkpoint':
      return store.checkpoint(claim, `${claim.jobId}/${claim.fence}/${step}`, progressAt(step));
    case 'crash':
      return store.crash(claim, 'it died');
    case 'release':
      return store.release(claim);
    case 'fail':
      return store.fail(claim, { code: 'INVALID_REQUEST', message: 'no' });
    default:
      return store.succeed(claim, {
        generation: `sha256:${'a'.repeat(64)}`,
        losses: [],
        baseLoss: null,
        aurac: null,
      });
  }
}

/** What the store should hold of one job, written plainly. */
interface Known {
  holder: Claim | null;
  /** Time of the holder's last write. */
  signMs: number;
  strikes: number;
  furthest: number;
  fences: number[];
  ended: Job['state'] | null;
}

class Run {
  readonly test = createTestStore();
  store = this.test.store;
  readonly known = new Map<string, Known>();
  readonly claims: Claim[] = [];

  do(step: Step): void {
    const { clock } = this.test;
    switch (step.kind) {
      case 'create':
        if (this.known.size < 5) {
          const { id } = this.store.create('', null, newJob());
          const fresh = {
            holder: null,
            signMs: 0,
            strikes: 0,
            furthest: -1,
            fences: [],
            ended: null,
          };
          this.known.set(id, fresh);
        }
        break;
      case 'claim':
        this.claim();
        break;
      case 'expire':
        this.store.expire();
        for (const job of this.known.values()) {
          if (job.holder !== null && job.signMs + leaseMs < clock.nowMs()) this.strike(job);
        }
        break;
      case 'reopen':
        this.store = this.test.reopen();
        for (const job of this.known.values()) if (job.holder !== null) this.strike(job);
        break;
      case 'pass':
        clock.advance(step.ms);
        break;
      case 'cancel':
        this.cancel(step.at);
        break;
      case 'write':
        this.write(step);
        break;
    }
  }

  claim(): void {
    const claimed = this.store.claim();
    if (claimed === null) return;
    const { jobId, fence } = claimed;
    const job = this.known.get(jobId)!;
    expect(job.holder, 'two hold one job').toBeNull();
    expect(job.ended).toBeNull();
    expect(job.fences.every((earlier) => earlier < fence)).toBe(true);
    job.fences.push(fence);
    job.holder = { jobId, fence };
    job.signMs = this.test.clock.nowMs();
    this.claims.push(job.holder);
    // It goes on from what was furthest, whoever wrote it.
    const step =
      claimed.checkpointPath === null ? -1 : Number(claimed.checkpointPath.split('/')[2]);
    expect(step).toBe(job.furthest);
  }

  cancel(at: number): void {
    const id = [...this.known.keys()][at % Math.max(1, this.known.size)];
    if (id === undefined) return;
    const job = this.known.get(id)!;
    const found = this.store.find(id, null)!;
    if (job.ended === 'succeeded' || job.ended === 'failed') {
      expect(() => this.store.cancel(found)).toThrow(/already/);
      return;
    }
    expect(this.store.cancel(found).state).toBe('cancelled');
    [job.holder, job.ended] = [null, 'cancelled'];
  }

  write({ at, verb, step }: Extract<Step, { kind: 'write' }>): void {
    const claim = this.claims[at % Math.max(1, this.claims.length)];
    if (claim === undefined) return;
    const job = this.known.get(claim.jobId)!;
    const before = this.store.find(claim.jobId, null)!;
    const events = this.store.events(before, null, 100).items;
    const isHeld = job.holder === claim;
    expect(this.store.isHeld(claim)).toBe(isHeld);
    expect(write(this.store, claim, verb, step)).toBe(isHeld);
    if (!isHeld) {
      expect(this.store.find(claim.jobId, null)).toEqual(before);
      expect(this.store.events(before, null, 100).items).toEqual(events);
      return;
    }
    job.signMs = this.test.clock.nowMs();
    if (verb === 'checkpoint' && step > job.furthest) [job.furthest, job.strikes] = [step, 0];
    if (verb === 'crash') this.strike(job);
    if (verb === 'release') job.holder = null;
    if (verb === 'fail') [job.holder, job.ended] = [null, 'failed'];
    if (verb === 'succeed') [job.holder, job.ended] = [null, 'succeeded'];
  }

  strike(job: Known): void {
    job.holder = null;
    job.strikes += 1;
    if (job.strikes === attemptsMax) job.ended = 'failed';
  }

  check(): void {
    for (const [id, job] of this.known) {
      const { state, attempts, finishedS, error } = this.store.find(id, null)!;
      expect(attempts).toBe(job.strikes);
      expect(attempts).toBeLessThanOrEqual(attemptsMax);
      expect(finishedS !== null).toBe(job.ended !== null);
      if (job.ended !== null) expect(state).toBe(job.ended);
      else if (job.holder !== null) expect(['validating_files', 'running']).toContain(state);
      else expect(state).toBe('queued');
      if (state === 'failed') expect(error).not.toBeNull();
      expect(this.claims.filter((claim) => claim.jobId === id && this.store.isHeld(claim))).toEqual(
        job.holder === null ? [] : [job.holder],
      );
    }
  }
}

describe('jobs', () => {
  it('under any interleaving a lost claim changes nothing and no job is tried for ever', () => {
    fc.assert(
      fc.property(fc.array(stepArbitrary, { maxLength: 60 }), (steps) => {
        const run = new Run();
        for (const step of steps) {
          run.do(step);
          run.check();
        }
        // Faults stop: every job that is left can be taken up and finished.
        run.test.clock.advance(100_000);
        run.store.expire();
        for (const job of run.known.values()) if (job.holder !== null) run.strike(job);
        run.test.clock.advance(100_000);
        for (let claimed = run.store.claim(); claimed !== null; claimed = run.store.claim()) {
          expect(run.known.get(claimed.jobId)!.ended).toBeNull();
          expect(write(run.store, claimed, 'succeed', 0)).toBe(true);
          run.known.get(claimed.jobId)!.ended = 'succeeded';
        }
        expect([...run.known.values()].every(({ ended }) => ended !== null)).toBe(true);
        run.test.db.close();
      }),
      { numRuns: 300 },
    );
  });
});
