// Kernels that count how often training's operations are asked for while programs are recorded.

import type { Kernels, Ops } from '../../src/kernels/kernels.ts';

export interface CountingKernels {
  readonly kernels: Kernels;
  count: number;
}

export function countTraining(inner: Kernels): CountingKernels {
  const watched = (ops: Ops): Ops => around(ops, { training: () => (counting.count += 1) });
  const compile: Kernels['compile'] = (build, shape) =>
    inner.compile((ops) => build(watched(ops)), shape);
  const counting: CountingKernels = { kernels: around(inner, {}, { compile }), count: 0 };
  return counting;
}

/** The same object, which calls what `on` has for a property whenever that is read, and has some others instead. */
function around<T extends object>(
  inner: T,
  on: Readonly<Record<string, () => void>>,
  instead: Partial<T> = {},
): T {
  return new Proxy(inner, {
    get(target, name) {
      on[name as string]?.();
      const value = Reflect.get(name in instead ? instead : target, name) as unknown;
      return typeof value === 'function' ? value.bind(target) : value;
    },
  });
}
