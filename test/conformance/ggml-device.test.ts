import { describe, expect, it } from 'vitest';
import { GgmlKernels } from '../../src/kernels/ggml/ggml-kernels.ts';
import { registerStandIn } from '../support/stand-in-device.ts';
import { kernelSuite } from './kernels.suite.ts';

const device = registerStandIn();
const open = (lacks: readonly string[]): GgmlKernels => {
  device.lacks.clear();
  for (const op of lacks) device.lacks.add(op);
  return new GgmlKernels({ threads: 1, device: 'cuda' });
};

kernelSuite('ggml on a device with every op', () => open([]));
