// `npm start`: installs what is missing, builds, and serves. Arguments go to `rankgate serve`. The server runs in this very
// process, so that signals reach it without a wrapper that must pass them on.

import { build, checkNode, install } from './prepare.mjs';

checkNode();
install();
build();
process.argv.splice(2, 0, 'serve');
await import('../dist/cli.js');
