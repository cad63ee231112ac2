// `npm test`: installs what is missing, builds (the end-to-end tests start the built server), then runs the gate.

import { build, checkNode, install } from './prepare.mjs';

checkNode();
install();
build();
await import('./check.mjs');
