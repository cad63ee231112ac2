import { describe, expect, it } from 'vitest';
import type { Residency } from '../../../src/adapters/residency.ts';
import type {
  AdapterPart,
  AdapterUse,
  GenerateRequest,
  HotAdapter,
  StepCosts,
  Urgency,
} from '../../../src/engine/messages.ts';
import {
  type CellAdmission,
  type CellIdentity,
  PrefixCache,
} from '../../../src/engine/prefix-cache.ts';
import { drawUniform } from '../../../src/engine/random-draw.ts';
import type { Segment, Stepper } from '../../../src/model/stepper.ts';
import { useOf } from '../../support/adapter-use.ts';
import { type FakeStepper, fakeGeneration } from '../../support/fake-stepper.ts';
import { idleAnswer } from '../../support/idle-answer.ts';
import {
  changesOf,
  fakeRankOf,
  greedy,
  type HarnessOptions,
  idsOf,
  LoopHarness,
  makeRequest,
  textOf,
} from '../../support/loop-harness.ts';

// Goal: no interleaving of loads, unloads, swaps of what a name points at, cancels, full memory and prefix reuse ever
// changes a stream (faults.md section 2: R1 to R11, R17 to R19, S17). Method: hundreds of seeded streams through one busy
// loop, each compared, token for token, with the model alone. Then the same run with one fault planted in what the loop
// stands on: the comparison must see each of them, or it would prove nothing.

const endTokens = [2];
const names = 6;
const versions = 4; // generations per name: 24 in all, 1 to 5 pages each, over 11 pages

interface Storm {
  readonly wrong: string[];
  readonly ended: number;
  readonly cancelled: number;
  readonly unloads: number;
  readonly harness: LoopHarness;
}

class Dice {
  readonly #seed: number;
  #draws = 0;
  constructor(seed: number) {
    this.#seed = seed;
  }
  /** 0 … n-1 */
  roll(n: number): number {
    this.#draws += 1;
    return Math.floor(drawUniform(this.#seed, this.#draws) * n);
  }
}

function rollRequest(dice: Dice, id: string, pointsAt: readonly number[]): GenerateRequest {
  // Few prefixes and one token that differs at times: whatever can be mistaken for the same prompt will be.
  const prefix = Array.from({ length: 16 * (1 + dice.roll(2)) }, (_, i) => (i * 11) % 60);
  if (dice.roll(8) === 0) prefix[dice.roll(prefix.length)] = 61;
  const rest = Array.from({ length: dice.roll(20) }, () => dice.roll(8));
  const name = dice.roll(names);
  const generation = fakeGeneration(name * versions + pointsAt[name]!);
  // Mostly one rank that all have, so that only the generation tells two prompts' cells apart.
  const rankMax = fakeRankOf(generation);
  const rank = dice.roll(3) === 0 ? 1 + dice.roll(rankMax) : Math.min(4, rankMax);
  const isWarm = dice.roll(3) === 0;
  return makeRequest({
    id,
    tokens: Int32Array.from([...prefix, ...rest]),
    tokensMax: 1 + dice.roll(30),
    tenant: `tenant${dice.roll(2)}`,
    adapter: dice.roll(6) === 0 ? null : useOf(generation, dice.roll(12) === 0 ? 0 : rank),
    sampling: isWarm ? { ...greedy, temperature: 0.7, seed: dice.roll(1000), topK: 20 } : greedy,
    stop: dice.roll(5) === 0 ? ['qà', 'xyz', 'kk'] : [],
  });
}

/** Any adapters, at any ranks. */
function rollHot(dice: Dice): HotAdapter[] {
  return Array.from({ length: dice.roll(7) }, () => {
    const generation = fakeGeneration(dice.roll(names * versions));
    const rank = 1 + dice.roll(fakeRankOf(generation));
    return { generation, rank, pages: Math.ceil(rank / 8) };
  });
}

interface StormOptions extends HarnessOptions {
  /** Requests state times and priorities, and steps take time: ranks change on the way and cells are taken away. */
  readonly isHasty?: boolean;
}

function rollUrgency(dice: Dice): Urgency {
  const deadlineMs = [null, 300, 1000, 4000][dice.roll(4)]!;
  const perTokenMs = [null, null, 20, 60][dice.roll(4)]!;
  return {
    ...{ deadlineMs, perTokenMs, ttftMs: dice.roll(3) === 0 ? 200 : null },
    ...{ priority: [2, 5, 8][dice.roll(3)]!, rankMin: dice.roll(3) },
    ...{ rankIsFixed: dice.roll(8) === 0, strict: false },
  };
}

/** With times, and at times what somebody would say next: the prompt and the answer of an earlier request, and more. */
function hastyOf(
  rolled: GenerateRequest,
  dice: Dice,
  harness: LoopHarness,
  requests: readonly GenerateRequest[],
): GenerateRequest {
  const request = { ...rolled, urgency: rollUrgency(dice) };
  const earlier = requests[requests.length - 1 - dice.roll(20)];
  if (earlier === undefined || dice.roll(3) > 0) return request;
  const { adapter, tenant, tokens } = earlier;
  const heard = idsOf(harness.heard.get(earlier.id)!);
  const told = [...tokens, ...heard].slice(0, 70);
  return { ...request, adapter, tenant, tokens: Int32Array.from([...told, 5]) };
}

const costs: StepCosts = {
  ...{ step: 8, decodeRow: 2, prefillToken: 0.5, decodeRank: 0.4, prefillRank: 0, kvCell: 0 },
};

/** One seeded storm of `streams` requests. `warming`: what is prewarmed meanwhile. */
async function storm(
  seed: number,
  streams: number,
  options: StormOptions,
  warming: Dice | null = null,
): Promise<Storm> {
  const dice = new Dice(seed);
  const harness = new LoopHarness({
    cells: 33 * 16, // about five sequences: nearly always full
    pages: 12,
    base: { endTokens },
    limits: { waitingMax: 64 },
    ...options,
  });
  const isHasty = options.isHasty === true;
  if (isHasty) {
    harness.loop.setCosts(costs);
    harness.advanceBy(costs);
  }
  const pointsAt = new Array<number>(names).fill(0);
  const requests: GenerateRequest[] = [];
  const cancelled = new Set<string>();
  let unloads = 0;
  for (let i = 0; i < streams; ) {
    const action = dice.roll(10);
    if (warming?.roll(3) === 0) harness.loop.prewarm(rollHot(warming));
    const generation = fakeGeneration(dice.roll(names * versions));
    if (action <= 1) {
      unloads += 1;
      harness.loop.unload(generation);
    } else if (action === 2) pointsAt[dice.roll(names)] = dice.roll(versions);
    else if (action === 3 && requests.length > 0) {
      const { id } = requests[Math.max(0, requests.length - 1 - dice.roll(12))]!;
      cancelled.add(id);
      harness.loop.cancel(id);
    } else if (harness.loop.stats().waiting < 30) {
      const rolled = rollRequest(dice, `s${i}`, pointsAt);
      const request = isHasty ? hastyOf(rolled, dice, harness, requests) : rolled;
      requests.push(request);
      harness.submit(request);
      i += 1;
    }
    await harness.ticks(dice.roll(3));
  }
  await harness.drain();
  const wrong: string[] = [];
  let ended = 0;
  for (const request of requests) {
    const heard = harness.heard.get(request.id)!;
    const end = heard.events.at(-1);
    if (end?.kind !== 'end') {
      if (!cancelled.has(request.id)) wrong.push(`${request.id}: ${JSON.stringify(heard.failure)}`);
      continue;
    }
    ended += 1;
    const want = idleAnswer(request, fakeRankOf, endTokens, changesOf(heard));
    const isRight =
      textOf(heard) === want.text &&
      end.reason === want.reason &&
      idsOf(heard).join() === want.tokens.join();
    if (!isRight) wrong.push(`${request.id}: ${idsOf(heard).join()} not ${want.tokens.join()}`);
  }
  return { wrong, ended, unloads, cancelled: cancelled.size, harness };
}

/** A stepper whose batches somebody tampers with on the way. */
function tampered(
  stepper: FakeStepper,
  change: (segment: Segment, step: number) => Segment,
): Stepper {
  return {
    config: stepper.config,
    cells: stepper.cells,
    pages: stepper.pages,
    pageBytes: stepper.pageBytes,
    tokensMax: stepper.tokensMax,
    segmentsMax: stepper.segmentsMax,
    step: (segments) => stepper.step(segments.map((one) => change(one, stepper.steps))),
    copyCells: (from, to, count) => stepper.copyCells(from, to, count),
    writePage: (page, module, data) => stepper.writePage(page, module, data),
    setAtomBank: (bank) => stepper.setAtomBank(bank),
    embeddings: (ids) => stepper.embeddings(ids),
    [Symbol.dispose]: () => {},
  };
}

function changeParts(
  { use }: CellIdentity,
  change: (part: AdapterPart) => AdapterPart,
): AdapterUse | null {
  return use === null ? null : { ...use, parts: use.parts.map(change) };
}

/** Keys by the adapter's name instead of its generation: vllm#42125. */
class NameKeyedCache extends PrefixCache {
  override admit(identity: CellIdentity, tokens: Int32Array, cells: number): CellAdmission | null {
    const use = changeParts(identity, ({ generation, ...part }) => {
      const n = Number.parseInt(generation.slice(-6), 16);
      return { ...part, generation: fakeGeneration(Math.floor(n / versions)) };
    });
    return super.admit({ ...identity, use }, tokens, cells);
  }
}

/** Keys without the rank. */
class RanklessCache extends PrefixCache {
  override admit(identity: CellIdentity, tokens: Int32Array, cells: number): CellAdmission | null {
    const use = changeParts(identity, (part) => ({ ...part, rank: 0 }));
    return super.admit({ ...identity, use }, tokens, cells);
  }
}

/** The residency but for `changes`. */
function changed(residency: Residency, changes: Partial<Residency>): Residency {
  return {
    pagesMax: residency.pagesMax,
    get pagesFree() {
      return residency.pagesFree;
    },
    acquire: (key, rank) => residency.acquire(key, rank),
    beginLoad: (key, onProgress, rank) => residency.beginLoad(key, onProgress, rank),
    pagesSpare: (keep) => residency.pagesSpare(keep),
    unload: (generation) => residency.unload(generation),
    pin: (generations) => residency.pin(generations),
    list: () => residency.list(),
    ...changes,
  };
}

/** Counts no uses, so that pages in use are reassigned: vllm#47724. */
function forgetful(residency: Residency): Residency {
  return changed(residency, {
    acquire(key, rank) {
      const use = residency.acquire(key, rank);
      use?.release();
      return use;
    },
  });
}

describe('swap oracle', () => {
  it.each([1, 2, 3])('every stream of storm %i equals the model alone', async (seed) => {
    const { wrong, ended, unloads, cancelled, harness } = await storm(seed, 220, {});
    expect(wrong).toEqual([]);
    expect(ended).toBeGreaterThan(150);
    expect(cancelled).toBeGreaterThan(20);
    const stats = harness.loop.stats();
    expect(stats).toMatchObject({ running: 0, waiting: 0, kvCellsUsed: 0 });
    expect(stats.residents.filter((one) => one.uses > 0)).toEqual([]);
    // The storm really stressed what it means to stress.
    expect(stats.prefixTokensHit).toBeGreaterThan(500);
    expect(harness.stepper.copies).toBeGreaterThan(20);
    expect(unloads).toBeGreaterThan(20);
    expect(Math.max(...harness.reports.map((one) => one.decodeRows))).toBeGreaterThan(3);
  });

  it.each([4, 5, 6])('nor does what is prewarmed change one: storm %i', async (seed) => {
    let loads = 0;
    const count = (residency: Residency): Residency =>
      changed(residency, {
        beginLoad(key, onProgress, rank) {
          loads += 1;
          return residency.beginLoad(key, onProgress, rank);
        },
      });
    const options = { wrapResidency: count };
    const { wrong, ended, harness } = await storm(seed, 220, options, new Dice(seed + 100));
    expect(wrong).toEqual([]);
    expect(ended).toBeGreaterThan(150);
    const withThem = loads;
    await storm(seed, 220, options);
    expect(withThem).toBeGreaterThan(1.1 * (loads - withThem));
    // Nothing is held, and no page was lost.
    await harness.ticks(200);
    const { residents } = harness.loop.stats();
    expect(residents.filter((one) => one.uses > 0)).toEqual([]);
    const pages = residents.reduce((sum, { bytes }) => sum + Math.round(bytes / 1000), 0);
    expect(harness.residency.pagesFree + pages).toBe(11);
  });

  it.each([1, 2, 3])('and in a hurry, at the ranks that it was told: storm %i', async (seed) => {
    const { wrong, ended, cancelled, harness } = await storm(seed, 220, { isHasty: true });
    expect(wrong).toEqual([]);
    expect(ended).toBeGreaterThan(150);
    expect(cancelled).toBeGreaterThan(20);
    const stats = harness.loop.stats();
    expect(stats).toMatchObject({ running: 0, waiting: 0, kvCellsUsed: 0 });
    expect(stats.residents.filter((one) => one.uses > 0)).toEqual([]);
    expect(stats.preemptions).toBeGreaterThan(10);
    const changes = [...harness.heard.values()].map(changesOf);
    expect(changes.filter(({ length }) => length > 0).length).toBeGreaterThan(30);
    const reasons = [...harness.heard.values()].flatMap(({ events }) =>
      events.flatMap((event) => (event.kind === 'rank' ? [event.reason] : [])),
    );
    expect(new Set(reasons)).toEqual(new Set(['late', 'slack']));
  });

  it('the same storm is the same run: two runs agree event for event', async () => {
    const [first, second] = [await storm(9, 60, {}), await storm(9, 60, {})];
    expect([...second.harness.heard]).toEqual([...first.harness.heard]);
  });

  const faults: ReadonlyArray<readonly [string, StormOptions]> = [
    ['cells keyed by name', { createCache: (options) => new NameKeyedCache(options) }],
    ['cells keyed without the rank', { createCache: (options) => new RanklessCache(options) }],
    ['pages reassigned while in use', { wrapResidency: forgetful }],
    [
      'a wrong page in one step of fifty',
      {
        wrapStepper: (stepper) =>
          tampered(stepper, (segment, step) => {
            if (segment.adapter === null || step % 50 !== 0) return segment;
            const pages = segment.adapter.pages.map((page) => (page % 11) + 1);
            return { ...segment, adapter: { ...segment.adapter, pages } };
          }),
      },
    ],
    [
      'one rank too few in one step of fifty',
      {
        wrapStepper: (stepper) =>
          tampered(stepper, (segment, step) => {
            const { adapter } = segment;
            if (adapter === null || adapter.rank % 8 < 2 || step % 50 !== 0) return segment;
            return { ...segment, adapter: { ...adapter, rank: adapter.rank - 1 } };
          }),
      },
    ],
  ];
  it.each(faults)('sees a planted fault: %s', async (_name, options) => {
    const wrong: string[] = [];
    for (const seed of [1, 2, 3]) wrong.push(...(await storm(seed, 220, options)).wrong);
    expect(wrong.filter((one) => one.includes(' not ')).length).toBeGreaterThan(0); // tokens, not failures
  });
});
