// Who of the waiting gets cells and pages now. Both are taken together or not at all: a sequence that waited with one of
// them in hand could keep the other from the one before it in line, for ever. Order is scheduler.ts's; whoever does not
// fit is passed over, but only so often: then everybody behind it waits until it fits.

import type { Residency, ResidentUse } from '../adapters/residency.ts';
import { composeRows } from '../adapters/rows.ts';
import { asGatewayError, GatewayError } from '../errors.ts';
import type { AdapterRows, Stepper } from '../model/stepper.ts';
import type { AdapterLoader, Want } from './adapter-loading.ts';
import { atomLogits } from './instruction-prior.ts';
import { blockCells, blocksFor, reservedBlocks } from './kv-pool.ts';
import { type AdapterUse, type BaseInfo, type GenerateRequest, weightMax } from './messages.ts';
import type { CellAdmission, PrefixCache } from './prefix-cache.ts';
import { planAdmission } from './scheduler.ts';
import { allParts, type Sequence } from './sequence.ts';

interface AdmissionOptions {
  readonly base: BaseInfo;
  readonly stepper: Stepper;
  readonly residency: Residency;
  readonly cache: PrefixCache;
  readonly loader: AdapterLoader;
}

interface Decision {
  readonly sequence: Sequence;
  /** null: it holds what it needs. */
  readonly error: GatewayError | null;
}

/** How many may be admitted past one that waits for room. Guess: a few batches. */
const passesMax = 32;

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

  /** Admits and refuses; whoever is in no decision goes on waiting. Starts the load that the first of them needs. */
  run(waiting: Iterable<Sequence>, running: Iterable<Sequence>): Decision[] {
    const { loader, stepper } = this.#options;
    const held = new Map<string, number>();
    let runningCount = 0;
    for (const { tenant } of running) {
      held.set(tenant, (held.get(tenant) ?? 0) + 1);
      runningCount += 1;
    }
    if (loader.progress !== 'no-room') this.#passesOfLoad = 0;
    const decisions: Decision[] = [];
    const passed: Sequence[] = [];
    for (const sequence of planAdmission([...waiting], held)) {
      if (runningCount >= stepper.segmentsMax || this.#passesOfLoad >= passesMax) break;
      const outcome = this.#tryOne(sequence);
      if (outcome === 'no-cells') {
        if (sequence.passes >= passesMax) break;
        passed.push(sequence);
      } else if (outcome !== 'no-adapter') {
        decisions.push({ sequence, error: outcome });
        if (outcome !== null) continue;
        runningCount += 1;
        for (const one of passed) one.passes += 1;
        if (loader.progress === 'no-room') this.#passesOfLoad += 1;
      }
    }
    return decisions;
  }

  #tryOne(sequence: Sequence): GatewayError | null | 'no-cells' | 'no-adapter' {
    const adapters = this.#acquireAll(sequence.wants);
    if (adapters === null) {
      this.#options.loader.want(sequence.wants);
      return 'no-adapter';
    }
    try {
      const rows = this.#rowsOf(sequence, adapters);
      const cells = this.#takeCells(sequence);
      if (cells !== null) {
        sequence.holdings = { cells, adapters, rows };
        sequence.position = cells.cachedTokens;
        return null;
      }
    } catch (error) {
      releaseAll(adapters);
      return asGatewayError(error);
    }
    releaseAll(adapters);
    return 'no-cells';
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
  #rowsOf(sequence: Sequence, uses: readonly ResidentUse[]): AdapterRows | null {
    const { use } = sequence;
    if (use === null) return null;
    const parts = sequence.loadable.map(({ key, rank, weight }) => {
      const resident = uses.find((one) => one.generation === key)!;
      const { rankMax } = resident;
      if (Number.isFinite(rank) && rank > rankMax) {
        throw new GatewayError('INVALID_REQUEST', `rank ${rank} of an adapter that has ${rankMax}`);
      }
      return { use: resident, rank: Math.min(rank, rankMax), weight };
    });
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
    const cells = cache.admit(
      {
        baseHash: base.hash,
        use: sequence.use,
        tenant: sequence.tenant,
      },
      sequence.tokens.subarray(0, sequence.count),
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
