// Prefixes and levels of the golden adapters as rankgate exports them: what test/oracle/peft-exports.py has PEFT load, and
// test/golden/exported-peft.test.ts makes again.
//
//   npx tsx test/oracle/exported-prefixes.ts <directory>

import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import type { PackedAdapter } from '../../src/adapters/pack.ts';
import type { LevelRule } from '../../src/adapters/pack-pairs.ts';
import { unpackPeft } from '../../src/adapters/pack-peft.ts';
import { packDirectory } from '../support/load-adapter.ts';
import { goldenDirectory, tinyBase } from '../support/tiny-base.ts';

export interface ExportedPrefix {
  readonly name: string;
  readonly packed: PackedAdapter;
  readonly rank: number;
  readonly config: string;
  readonly weights: Uint8Array;
}

const cases: readonly (readonly [string, LevelRule, readonly number[]])[] = [
  ['plain-r4', 'uniform', [1, 4]],
  ['rslora-r8', 'uniform', [1, 2, 4, 8]],
  ['patterns-r16', 'uniform', [3, 16]],
  ['patterns-r16', 'energy', [1, 4, 16]],
  ['qv-r8', 'uniform', [5]],
  ['bf16-r8', 'energy', [2]],
  ['bf16-r256', 'uniform', [24]],
  ['regex-r64', 'energy', [9]],
];

export function exportedPrefixes(): ExportedPrefix[] {
  return cases.flatMap(([adapter, levels, ranks]) => {
    const packed = packDirectory(goldenDirectory(adapter), tinyBase.config, levels);
    return ranks.map((rank) => {
      const name = `${adapter}-${levels}-${rank}`;
      return { name, packed, rank, ...unpackPeft(packed, rank, tinyBase.config) };
    });
  });
}

const [, script = '', directory] = process.argv;
if (directory !== undefined && import.meta.url === pathToFileURL(script).href) {
  for (const { name, config, weights } of exportedPrefixes()) {
    mkdirSync(join(directory, name), { recursive: true });
    writeFileSync(join(directory, name, 'adapter_config.json'), config);
    writeFileSync(join(directory, name, 'adapter_model.safetensors'), weights);
  }
}
