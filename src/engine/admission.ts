// Who of the waiting gets cells and pages now. Both are taken together or not at all: a sequence that waited with one of
// them in hand could keep the other from the one before it in line, for ever. Order is waiting-queue.ts's; whoever does not
// fit is passed over, but only so often: then everybody behind it waits until it fits. The first that does not fit may have
// the cells of others (preemption.ts). A tick looks at a bounded number of sequences, however many wait.

import type { Residency, ResidentUse } from '../adapters/residency.ts';
import { composeRows, hasPrefixes, type RowsPart } from '../adapters/rows.ts';
import { asGatewayError, GatewayError } from '../errors.ts';
import type { AdapterRows, Stepper } from '../model/stepper.ts';
import { type AdapterLoader, keyOf, type Want } from './adapter-loading.ts';
import type { RankOption } from './batch-ranks.ts';
import { atomLogits } from './instruction-prior.ts';
import { blockCells, blocksFor, reservedBlocks } from './kv-pool.ts';
import { allParts, type Loadable } from './loadable.ts';
import { type AdapterUse, type BaseInfo, type GenerateRequest, weightMax } from './messages.ts';
import { planPreemption } from './preemption.ts';
import type { CellAdmission, PrefixCache } from './prefix-cache.ts';
import type { Holdings, Sequence } from './sequence.ts';
import type { WaitingQueue } from './waiting-queue.ts';

export interface AdmissionOptions {
  readonly base: BaseInfo;
  readonly stepper: Stepper;
  readonly residency: Residency;
  readonly cache: PrefixCache;
  readonly loader: AdapterLoader;
}

/** `admitted`: it holds what it needs. `preempted`: it is to give back what it holds. Else: why it never will. */
export interface Decision {
  readonly sequence: Sequence;
  readonly outcome: 'admitted' | 'preempted' | GatewayError;
}

/** How many may be admitted past one that waits for room. Guess: a few batches. */
const passesMax = 32;
/** Sequences looked at in a tick, at first and when those have not taken all the room; and those of them that find no cells,
 *  which costs more. Guesses. */
const [looksFew, looksMax] = [4, 64] as const;
const missesMax = 16;

export class Admission {
  readonly #options: AdmissionOptions;
  /** Admissions while a load waited for pages. */
  #passesOfLoad = 0;

  constructor(options: AdmissionOptions) {
    this.#options = options;
  }

  /** Throws what no waiting would change. */
  check(request: GenerateRequest): void {
    const { base, stepper } = this.#options;
    const { tokens, tokensMax } = request;
    if (tokens.length < 1 || tokensMax < 1) {
      throw new GatewayError('INVALID_REQUEST', 'a request needs a prompt and room for an answer');
    }
    const cells = tokens.length + tokensMax;
    const cellsMax = (Math.floor(stepper.cells / blockCells) - reservedBlocks) * blockCells;
    if (cells > base.contextMax || cells - 1 > cellsMax) {
      const room = Math.min(base.contextMax, cellsMax + 1);
      throw new GatewayError(
        'CONTEXT_LENGTH_EXCEEDED',
        `${tokens.length} prompt tokens and ${tokensMax} for the answer do not fit in ${room}`,
      );
    }
    const { vocabSize } = base.config;
    const isForeign = (token: number): boolean => token < 0 || token >= vocabSize;
    if (tokens.some(isForeign) || request.adapter?.prior?.tokens.some(isForeign)) {
      throw new GatewayError('INVALID_REQUEST', `a prompt token is not in 0…${vocabSize - 1}`);
    }
    for (const { rank, weight } of request.adapter === null ? [] : allParts(request.adapter)) {
      if (Number.isSafeInteger(rank) && rank >= 0 && Math.abs(weight) <= weightMax) continue;
      throw new GatewayError('INVALID_REQUEST', `an adapter at rank ${rank}, weight ${weight}`);
    }
  }

  /** Admits, preempts and refuses; whoever is in no decision goes on as it is. Each decision is to be carried out before
   *  the next is asked for. Starts the load that the first of them needs. */
  *run(
    queue: WaitingQueue<Sequence>,
    running: ReadonlyMap<string, Sequence>,
    nowMs: number,
  ): Generator<Decision, void, void> {
    const { loader, stepper } = this.#options;
    if (loader.progress !== 'no-room') this.#passesOfLoad = 0;
    const passed: Sequence[] = [];
    let mayPreempt = true;
    for (const sequence of this.#inLine(queue)) {
      if (this.#passesOfLoad >= passesMax || passed.length >= missesMax) break;
      if (sequence.isOverdue(nowMs)) {
        queue.regroup(sequence, () => this.changeRank(sequence, sequence.rankLeast));
      }
      let outcome = this.#tryOne(sequence, running);
      if (outcome === 'no-room' && mayPreempt) {
        mayPreempt = false;
        const victims = this.#victimsFor(sequence, queue, running);
        for (const victim of victims) yield { sequence: victim, outcome: 'preempted' };
        if (victims.length > 0) outcome = this.#tryOne(sequence, running);
      }
      if (outcome === 'no-room') {
        if (sequence.passes >= passesMax || running.size >= stepper.segmentsMax) break;
        passed.push(sequence);
      } else if (outcome !== 'no-adapter') {
        yield { sequence, outcome: outcome ?? 'admitted' };
        if (outcome !== null) continue;
        for (const one of passed) one.passes += 1;
        if (loader.progress === 'no-room') this.#passesOfLoad += 1;
      }
    }
  }

  /** Nothing else is loaded before one has what was loaded for it: however far behind it has fallen, it comes first. The rest
   *  of the line is asked for when it is needed: mostly the first of it take all the room. */
  *#inLine(queue: WaitingQueue<Sequence>): Generator<Sequence, void, void> {
    const seen = new Set<Sequence>();
    const { loaded } = this.#options.loader;
    const one = loaded === null ? undefined : queue.wanting(keyOf(loaded));
    if (one !== undefined) {
      seen.add(one);
      yield one;
    }
    for (const count of [looksFew, looksMax]) {
      for (const sequence of queue.first(count)) {
        if (seen.has(sequence)) continue;
        seen.add(sequence);
        yield sequence;
      }
    }
  }

  /** What it holds is as ever; the tokens from its position on have another rank. */
  changeRank(sequence: Sequence, rank: number): void {
    const { holdings } = sequence;
    sequence.changeRank(rank);
    if (holdings === null) return;
    const rows = this.#rowsAt(sequence, holdings.adapters, rank);
    const spans = [...holdings.spans, { from: sequence.position, rows }];
    sequence.holdings = { ...holdings, spans };
  }

  #tryOne(
    sequence: Sequence,
    running: ReadonlyMap<string, Sequence>,
  ): GatewayError | null | 'no-room' | 'no-adapter' {
    const adapters = this.#acquireAll(sequence.wants);
    if (adapters === null) {
      this.#options.loader.want(sequence.wants);
      return 'no-adapter';
    }
    try {
      const holdings = this.#take(sequence, adapters, running.size);
      if (holdings !== null) {
        sequence.holdings = holdings;
        sequence.position = holdings.cells.cachedTokens;
        this.#options.loader.noteUse(sequence.wants);
        return null;
      }
    } catch (error) {
      releaseAll(adapters);
      return asGatewayError(error);
    }
    releaseAll(adapters);
    return 'no-room';
  }

  #take(
    sequence: Sequence,
    adapters: readonly ResidentUse[],
    runningCount: number,
  ): Holdings | null {
    if (runningCount >= this.#options.stepper.segmentsMax) return null;
    checkRanks(sequence, adapters);
    const spans = sequence.ranks.map(({ from, rank }) => {
      return { from, rows: this.#rowsAt(sequence, adapters, rank) };
    });
    const ladder = ladderOf(sequence, adapters);
    const cells = this.#takeCells(sequence); // last: nothing may throw after it
    return cells === null ? null : { cells, adapters, spans, ladder };
  }

  #victimsFor(
    sequence: Sequence,
    queue: WaitingQueue<Sequence>,
    running: ReadonlyMap<string, Sequence>,
  ): readonly Sequence[] {
    const { cache, stepper } = this.#options;
    const fits = (gone: readonly Sequence[]): boolean => {
      const holds = gone.map(({ holdings }) => holdings!.cells.hold);
      const hasRow = running.size - gone.length < stepper.segmentsMax;
      return hasRow && cache.hasRoom(sequence.cellsMax, holds);
    };
    return planPreemption(sequence, running.values(), (tenant) => queue.held(tenant), fits);
  }

  /** All or none. */
  #acquireAll(wants: readonly Want[]): ResidentUse[] | null {
    const uses: ResidentUse[] = [];
    for (const { key, rank } of wants) {
      const use = this.#options.residency.acquire(key, rank);
      if (use === null) {
        releaseAll(uses);
        return null;
      }
      uses.push(use);
    }
    return uses;
  }

  /** `uses`: of all that the sequence wants. */
  #rowsAt(sequence: Sequence, uses: readonly ResidentUse[], rank: number): AdapterRows | null {
    const { use } = sequence;
    if (use === null) return null;
    const parts = sequence.loadable.flatMap((part): RowsPart[] => {
      const own = sequence.partRank(part, rank);
      if (own === 0) return [];
      const resident = residentOf(part, uses);
      return [{ use: resident, rank: Math.min(own, resident.rankMax), weight: part.weight }];
    });
    if (parts.length === 0) return null;
    sequence.atomBias ??= this.#atomBias(use, uses);
    return composeRows(parts, { flyTopK: use.flyTopK, atomBias: sequence.atomBias });
  }

  #atomBias({ prior }: AdapterUse, uses: readonly ResidentUse[]): readonly number[] | null {
    if (prior === null) return null;
    const labels = uses.find((one) => one.labels !== null)?.labels ?? null;
    if (labels === null) {
      throw new GatewayError('INVALID_REQUEST', 'a prior over atoms, and no queryable adapter');
    }
    const { width } = this.#options.base.config;
    if (labels.shape[1] !== width) {
      throw new GatewayError(
        'ADAPTER_CORRUPT',
        `labels of ${labels.shape[1]} numbers, want ${width}`,
      );
    }
    const words = this.#options.stepper.embeddings(Int32Array.from(prior.tokens)); // [ids, width]
    return atomLogits(words, labels, prior.strength);
  }

  #takeCells(sequence: Sequence): CellAdmission | null {
    const { cache, stepper, base } = this.#options;
    const known = Math.min(sequence.count, sequence.sharedCells + 1);
    const cells = cache.admit(
      {
        baseHash: base.hash,
        use: sequence.use,
        tenant: sequence.tenant,
      },
      sequence.tokens.subarray(0, known),
      sequence.cellsMax,
    );
    if (cells === null) return null;
    if (cells.copyFrom !== null) {
      stepper.copyCells(cells.copyFrom, cells.cellBase, blocksFor(cells.cachedTokens) * blockCells);
    }
    return cells;
  }
}

function releaseAll(uses: readonly ResidentUse[]): void {
  for (const use of uses) use.release();
}

function checkRanks({ loadable }: Sequence, uses: readonly ResidentUse[]): void {
  for (const { key, rank } of loadable) {
    const rankMax = uses.find((one) => one.generation === key)?.rankMax ?? rank;
    if (!Number.isFinite(rank) || rank <= rankMax) continue;
    throw new GatewayError('INVALID_REQUEST', `rank ${rank} of an adapter that has ${rankMax}`);
  }
}

/** The least that the request allows, powers of two, and what was planned. More than that only where it is loaded and
 *  nothing else is in the row. */
function ladderOf(sequence: Sequence, uses: readonly ResidentUse[]): readonly RankOption[] {
  const { isGovernable, loadable, planRank, rank: now } = sequence;
  if (!isGovernable || !loadable.every((part) => holds(part, uses))) return [];
  if (uses.some(({ kind }) => !hasPrefixes(kind))) return [];
  const parts = loadable.map((part) => ({ part, use: residentOf(part, uses) }));
  const [alone] = parts;
  const most = parts.length === 1 ? alone!.use.rankMax : planRank;
  const least = sequence.rankLeast;
  const ranks = new Set([least, planRank, now, most]);
  for (let rank = 1; rank < most; rank *= 2) if (rank > least) ranks.add(rank);
  return [...ranks]
    .filter((rank) => rank <= planRank || alone!.use.isLoaded(rank))
    .sort((a, b) => a - b)
    .map((rank) => {
      const has = ({ part, use }: (typeof parts)[number]): number =>
        Math.min(sequence.partRank(part, rank), use.rankMax);
      const governed = parts.filter(({ part }) => part.isGoverned);
      const kept = governed.map((one) => one.use.rankCurve[has(one) - 1] ?? 0);
      return {
        rank,
        ranks: parts.reduce((sum, one) => sum + has(one), 0),
        quality: kept.reduce((sum, energy) => sum + energy, 0) / kept.length,
      };
    });
}

/** Not what has rank 0 from the first token on. */
function holds({ key }: Loadable, uses: readonly ResidentUse[]): boolean {
  return uses.some(({ generation }) => generation === key);
}

/** Never as if the adapter were not there: the answer would be the base model's. */
function residentOf({ key }: Loadable, uses: readonly ResidentUse[]): ResidentUse {
  const use = uses.find((one) => one.generation === key);
  if (use === undefined) throw new GatewayError('INTERNAL', 'an adapter of the row is not held');
  return use;
}
