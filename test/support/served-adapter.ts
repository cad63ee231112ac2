// What a training session publishes, imported as a directory of an adapter is and loaded as the engine loads it: rows for a decoder.

import type { Generation } from '../../src/adapters/adapter.ts';
import { generationOf, openPacked, type PackedAdapter } from '../../src/adapters/pack.ts';
import type { Packed } from '../../src/adapters/pack-pairs.ts';
import { importPacked } from '../../src/adapters/packed-import.ts';
import { isQueryable, packQueryable } from '../../src/adapters/queryable-directory.ts';
import { createResidency } from '../../src/adapters/residency.ts';
import { composeRows } from '../../src/adapters/rows.ts';
import { openGguf } from '../../src/model/gguf.ts';
import type { AdapterRows, Stepper } from '../../src/model/stepper.ts';
import type { AdapterFiles } from '../../src/trainer/publish.ts';
import type { TrainingBase } from '../../src/trainer/session.ts';
import { tinyPath } from './open-test-decoder.ts';

export interface Imported {
  readonly adapter: PackedAdapter;
  /** Of queryable. */
  readonly bank: PackedAdapter | null;
}

const opened = ({ bytes }: Packed): PackedAdapter => openPacked(bytes, generationOf(bytes));

/** Of the tiny base. */
export async function importFiles(
  { config, bytes }: AdapterFiles,
  base: TrainingBase,
): Promise<Imported> {
  const into = { config: base.config, hash: base.hash, names: [] };
  if (!isQueryable(config)) {
    return { adapter: opened(importPacked(config, bytes, into)), bank: null };
  }
  using baseFile = openGguf(tinyPath);
  let bank: PackedAdapter | null = null;
  const packed = await packQueryable({
    ...{ config, weights: bytes, base: into, baseFile },
    readBank: async () => null,
    async storeShared(made): Promise<Generation> {
      bank = opened(made);
      return bank.generation;
    },
  });
  return { adapter: opened(packed), bank };
}

/** Its rows with all ranks, resident in the stepper. */
export async function rowsOf(
  { adapter, bank }: Imported,
  stepper: Stepper,
  { baseHash, atomBias = null }: { readonly baseHash: string; readonly atomBias?: number[] | null },
): Promise<AdapterRows> {
  const files = new Map([adapter, ...(bank === null ? [] : [bank])].map((x) => [x.generation, x]));
  const residency = createResidency({
    ...{ stepper, baseHash },
    open: async (key) => files.get(key as Generation)!,
  });
  let wake = (): void => {};
  const read = new Promise<void>((resolve) => {
    wake = resolve;
  });
  const load = residency.beginLoad(adapter.generation, () => wake());
  if (load.advance(1e9) === 'reading') await read;
  for (let progress = load.advance(1e9); progress !== 'done'; progress = load.advance(1e9)) {
    if (progress !== 'more') throw new Error(`the load is at ${progress}`);
  }
  const use = residency.acquire(adapter.generation)!;
  const part = { use, rank: adapter.manifest.rankMax, weight: 1 };
  return composeRows([part], { flyTopK: null, atomBias });
}
