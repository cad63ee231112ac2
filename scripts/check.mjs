// The one gate, cheapest first: format and lint, types, dead code, tests. Stops at the first that fails. The last line is
// `N passed, N failed, N skipped` in every case: a step that fails before the tests counts as one failure.

import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { root, runNode } from './prepare.mjs';

const steps = [
  ['lint and format', 'node_modules/@biomejs/biome/bin/biome', 'ci', '.'],
  ['types', 'node_modules/typescript/bin/tsc', '--noEmit'],
  ['dead code', 'node_modules/knip/bin/knip.js'],
  ['tests', 'node_modules/vitest/vitest.mjs', 'run'],
];

for (const [name, ...command] of steps) {
  if (!existsSync(join(root, command[0]))) throw new Error(`${command[0]} is not installed`);
  console.error(`check: ${name}`);
  const exitCode = runNode(command);
  if (exitCode === 0) continue;
  if (name !== 'tests') console.log(`check: ${name} failed\n0 passed, 1 failed, 0 skipped`);
  process.exitCode = exitCode;
  break;
}
