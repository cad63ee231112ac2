import { ReferenceKernels } from '../../src/kernels/reference-kernels.ts';
import { trainingSuite } from './training.suite.ts';

// The rules against themselves cannot fail; the suite's own claims on the loss and on refusals can.
trainingSuite('reference', () => new ReferenceKernels());
