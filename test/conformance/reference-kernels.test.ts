import { ReferenceKernels } from '../../src/kernels/reference-kernels.ts';
import { kernelSuite } from './kernels.suite.ts';

// The reference against itself: its cases cannot fail, but the suite's rules on refusals and replays can.
kernelSuite('reference', () => new ReferenceKernels());
