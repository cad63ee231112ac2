// Backend name → implementation, loaded when asked for: the ggml backend opens shared objects on import of its library.

import type { Kernels } from './kernels.ts';

export type BackendName = 'ggml' | 'reference';

export interface KernelsOptions {
  readonly threads: number;
  readonly libraryDirectory?: string;
}

export async function createKernels(name: BackendName, options: KernelsOptions): Promise<Kernels> {
  switch (name) {
    case 'ggml': {
      const { GgmlKernels } = await import('./ggml/ggml-kernels.ts');
      return new GgmlKernels(options);
    }
    case 'reference': {
      const { ReferenceKernels } = await import('./reference-kernels.ts');
      return new ReferenceKernels();
    }
  }
}
