// Backend name → implementation, loaded when asked for: ggml opens shared objects, tfjs looks for what may not be installed.

import type { DeviceWish } from './ggml/select-device.ts';
import type { Kernels } from './kernels.ts';

export type BackendName = 'ggml' | 'tfjs' | 'reference';

export interface KernelsOptions {
  /** Of ggml. TensorFlow.js takes its own from the environment, before it is loaded. */
  readonly threads: number;
  /** Of ggml's shared objects, or a folder with TensorFlow.js in its node_modules. */
  readonly libraryDirectory?: string;
  /** Of ggml: what holds the model, the CPU by default, and how many bytes it will be asked to hold. */
  readonly device?: DeviceWish;
  readonly bytesNeeded?: number;
  /** Of ggml: whether our own kernels compute linears over quantised weights. */
  readonly f32Activations?: boolean;
  /** Of ggml: false composes everything of ggml's ops. */
  readonly native?: boolean;
}

export async function createKernels(name: BackendName, options: KernelsOptions): Promise<Kernels> {
  switch (name) {
    case 'ggml': {
      const { GgmlKernels } = await import('./ggml/ggml-kernels.ts');
      return new GgmlKernels(options);
    }
    case 'tfjs': {
      const { loadTensorFlow } = await import('./tfjs/tensorflow.ts');
      const { TfjsKernels } = await import('./tfjs/tfjs-kernels.ts');
      const directory = options.libraryDirectory;
      return new TfjsKernels(await loadTensorFlow(directory === undefined ? {} : { directory }));
    }
    case 'reference': {
      const { ReferenceKernels } = await import('./reference-kernels.ts');
      return new ReferenceKernels();
    }
  }
}
