// The part of a Stepper that residency writes to, remembered: what each module's page holds, or null for zeros.

import type { ResidencyOptions } from '../../src/adapters/residency.ts';
import type { AtomBank, ModuleRef, PageData } from '../../src/model/stepper.ts';
import { tinyBase } from './tiny-base.ts';

export class PageMemory {
  readonly config: ResidencyOptions['stepper']['config'] = tinyBase.config;
  readonly pages: number;
  readonly pageBytes = 1000;
  bank: AtomBank | null = null;
  writes = 0;
  readonly #held: Map<string, PageData | null> = new Map();

  constructor(pages: number) {
    this.pages = pages;
  }

  writePage(page: number, { block, projection }: ModuleRef, data: PageData | null): void {
    if (page < 1 || page >= this.pages) throw new Error(`page ${page} of ${this.pages}`);
    this.writes += 1;
    this.#held.set(`${page}.${block}.${projection}`, data);
  }

  setAtomBank(bank: AtomBank | null): void {
    this.bank = bank;
  }

  /** undefined: never written. */
  at(page: number, { block, projection }: ModuleRef): PageData | null | undefined {
    return this.#held.get(`${page}.${block}.${projection}`);
  }
}

/** Whether two pages are the same views of the same bytes. */
export function isSamePage(x: PageData | null | undefined, y: PageData | null): boolean {
  if (x === undefined || x === null || y === null) return x === y;
  return (['a', 'b'] as const).every(
    (side) => x[side].buffer === y[side].buffer && x[side].byteOffset === y[side].byteOffset,
  );
}
