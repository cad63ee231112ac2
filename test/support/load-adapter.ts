// A PEFT directory → pages of a stepper, by the code that serves: packed, opened, and written page by page.

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { generationOf, openPacked, type PackedAdapter } from '../../src/adapters/pack.ts';
import type { LevelRule } from '../../src/adapters/pack-pairs.ts';
import { packPeft } from '../../src/adapters/pack-peft.ts';
import { type DecoderConfig, moduleIndex, projections } from '../../src/model/decoder-config.ts';
import { type AdapterRows, type Stepper, uniformRows } from '../../src/model/stepper.ts';

export function packDirectory(
  directory: string,
  config: DecoderConfig,
  levels: LevelRule = 'uniform',
): PackedAdapter {
  const input = {
    config: readFileSync(join(directory, 'adapter_config.json'), 'utf8'),
    weights: readFileSync(join(directory, 'adapter_model.safetensors')),
    base: { config, hash: 'ab'.repeat(32), names: [] },
    acceptBaseName: null,
  };
  const { bytes } = packPeft(input, levels);
  return openPacked(bytes, generationOf(bytes));
}

/** Writes every module of every page, zeroes included, to pages from `firstPage` on. */
export function writeAdapter(
  stepper: Stepper,
  packed: PackedAdapter,
  firstPage: number,
): (rank: number) => AdapterRows | null {
  const pages = Array.from({ length: packed.pages }, (_, i) => firstPage + i);
  for (const [index, page] of pages.entries()) {
    for (let block = 0; block < stepper.config.blocks; block++) {
      for (const projection of projections) {
        const module = { block, projection };
        stepper.writePage(page, module, packed.page(module, index));
      }
    }
  }
  const { levels } = packed.manifest;
  return (rank) => {
    if (rank === 0) return null;
    const uniform = uniformRows(pages, rank);
    return levels === null ? uniform : { ...uniform, gates: gatesAt(stepper, packed, rank) };
  };
}

/** [M, 8·pages], read off the manifest: 1 for each rank that is on at the level. */
function gatesAt(
  stepper: Stepper,
  { manifest, pages }: PackedAdapter,
  level: number,
): Float32Array {
  const width = 8 * pages;
  const gates = new Float32Array(stepper.config.blocks * projections.length * width);
  manifest.modules.forEach(({ block, projection }, i) => {
    const row = moduleIndex(block, projection) * width;
    manifest.levels![i]!.forEach((from, r) => {
      if (from <= level) gates[row + r] = 1;
    });
  });
  return gates;
}
