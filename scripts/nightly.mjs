// `npm run test:nightly`: the tests that take minutes each, on top of `npm test`.

import { build, checkNode, install, runNode } from './prepare.mjs';

checkNode();
install();
build();
process.env.RANKGATE_TIER = 'nightly';
process.exitCode = runNode(['node_modules/vitest/vitest.mjs', 'run', ...process.argv.slice(2)]);
