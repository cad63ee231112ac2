import { GgmlKernels } from '../../src/kernels/ggml/ggml-kernels.ts';
import { trainingSuite } from './training.suite.ts';

trainingSuite('ggml, one thread', () => new GgmlKernels({ threads: 1 }));
