// The atom bank that rows may use, as stored tensors. One bank at a time; another one of the same sizes takes its memory,
// because stored tensors live as long as their kernels do.

import { GatewayError } from '../errors.ts';
import type { Kernels, StoredTensor } from '../kernels/kernels.ts';
import type { AtomBank } from './stepper.ts';

export interface StoredBank extends Pick<AtomBank, 'id' | 'r' | 'dq' | 'K' | 'blockLayers'> {
  readonly covers: ReadonlySet<string>;
  readonly atoms: StoredTensor; // [K, r, r]
  readonly query: StoredTensor; // [dq, r]
  readonly summary: StoredTensor; // [r, r]
  readonly context: StoredTensor; // [dq, r]
}

/** Sizes of banks that a decoder has memory for in its life. */
const sizesMax = 8;

const memoryNames = ['atoms', 'query', 'summary', 'context'] as const;
type BankMemory = Pick<StoredBank, (typeof memoryNames)[number]>;

export class AtomMemory {
  bank: StoredBank | null = null;
  readonly #kernels: Kernels;
  readonly #memories: Map<string, BankMemory> = new Map();

  constructor(kernels: Kernels) {
    this.#kernels = kernels;
  }

  /** Throws SHAPE_MISMATCH for numbers that do not fit the sizes, UNSUPPORTED after too many sizes. The bank before stays
   *  until `fill`. */
  reserve(bank: AtomBank): StoredBank {
    const { id, r, dq, K, blockLayers, covers = new Set() } = bank;
    const shapes = { atoms: [K, r, r], query: [dq, r], summary: [r, r], context: [dq, r] } as const;
    const isWhole = [r, dq, K, blockLayers].every((size) => Number.isInteger(size) && size >= 1);
    for (const name of memoryNames) {
      const count = shapes[name].reduce((product, size) => product * size, 1);
      if (isWhole && bank[name].length === count && bank[name].every(Number.isFinite)) continue;
      throw new GatewayError(
        'SHAPE_MISMATCH',
        `atom bank ${id}: ${name} wants ${shapes[name].join('×')} finite numbers, got ${bank[name].length}`,
      );
    }
    return { id, r, dq, K, blockLayers, covers, ...this.#memory(shapes) };
  }

  fill(room: StoredBank | null, bank: AtomBank | null): void {
    this.bank = room;
    for (const name of memoryNames) {
      if (room === null || bank === null) return;
      const { buffer, byteOffset, byteLength } = bank[name];
      this.#kernels.write(room[name], new Uint8Array(buffer, byteOffset, byteLength), 0);
    }
  }

  #memory(shapes: Readonly<Record<keyof BankMemory, readonly number[]>>): BankMemory {
    const key = JSON.stringify(shapes);
    const known = this.#memories.get(key);
    if (known !== undefined) return known;
    if (this.#memories.size >= sizesMax) {
      throw new GatewayError('UNSUPPORTED', `atom banks of more than ${sizesMax} different sizes`);
    }
    const store = (name: keyof BankMemory): StoredTensor =>
      this.#kernels.store('f32', shapes[name], 'undefined');
    const memory = {
      atoms: store('atoms'),
      query: store('query'),
      summary: store('summary'),
      context: store('context'),
    };
    this.#memories.set(key, memory);
    return memory;
  }
}
