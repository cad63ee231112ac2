// `npm test`: installs what is missing, builds (the end-to-end tests start the built server), then runs the gate. TensorFlow.js
// is no dependency: where it cannot be fetched, its tests print so and are left out.

import { build, checkNode, install } from './prepare.mjs';
import { setUpTensorFlow } from './setup-tensorflow.mjs';

checkNode();
install();
build();
try {
  await setUpTensorFlow();
} catch (error) {
  console.error(`no TensorFlow.js here: ${error instanceof Error ? error.message : error}`);
}
await import('./check.mjs');
