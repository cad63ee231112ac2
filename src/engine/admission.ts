// Who of the waiting gets cells and pages now. Both are taken together or not at all: a sequence that waited with one of
// them in hand could keep the other from the one before it in line, for ever. Order is scheduler.ts's; whoever does not
// fit is passed over, but only so often: then everybody behind it waits until it fits.

import type { Residency, ResidentUse } from '../adapters/residency.ts';
import { GatewayError } from '../errors.ts';
import type { Stepper } from '../model/stepper.ts';
import type { AdapterLoader } from './adapter-loading.ts';
import { blockCells, blocksFor, reservedBlocks } from './kv-pool.ts';
import type { BaseInfo, GenerateRequest } from './messages.ts';
import type { CellAdmission, PrefixCache } from './prefix-cache.ts';
import { planAdmission } from './scheduler.ts';
import type { Sequence } from './sequence.ts';

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
    const { tokens, tokensMax, adapter } = request;
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
    if (tokens.some((token) => token < 0 || token >= vocabSize)) {
      throw new GatewayError('INVALID_REQUEST', `a prompt token is not in 0…${vocabSize - 1}`);
    }
    if (adapter !== null && (!Number.isSafeInteger(adapter.rank) || adapter.rank < 0)) {
      throw new GatewayError('INVALID_REQUEST', `rank ${adapter.rank} is not a whole number ≥ 0`);
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
    const { residency, loader } = this.#options;
    const { generation, rank } = sequence;
    let adapter: ResidentUse | null = null;
    if (generation !== null) {
      adapter = residency.acquire(generation);
      if (adapter === null) {
        loader.want(generation);
        return 'no-adapter';
      }
      if (rank > adapter.rankMax) {
        const message = `rank ${rank} of an adapter that has ${adapter.rankMax}`;
        adapter.release();
        return new GatewayError('INVALID_REQUEST', message);
      }
    }
    const cells = this.#takeCells(sequence);
    if (cells === null) {
      adapter?.release();
      return 'no-cells';
    }
    sequence.holdings = { cells, adapter };
    sequence.position = cells.cachedTokens;
    return null;
  }

  #takeCells(sequence: Sequence): CellAdmission | null {
    const { cache, stepper, base } = this.#options;
    const cells = cache.admit(
      {
        baseHash: base.hash,
        generation: sequence.generation,
        rank: sequence.rank,
        scale: 1,
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
