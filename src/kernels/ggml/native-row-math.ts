// RowMath by our own kernels (native/sampling.c), called with the rows themselves: nothing is copied.

import { leastMaximum, type RowMath } from '../row-math.ts';
import { nativeKernels } from './native.ts';

/** null where there is no compiler. */
export function nativeRowMath(): RowMath | null {
  const { library } = nativeKernels();
  if (library === undefined) return null;
  const rows = ['void *', 'int64_t', 'void *'];
  const maximaOf = library.func('rankgate_row_maxima', 'int', rows);
  const massesOf = library.func('rankgate_row_masses', 'double', [
    ...rows,
    'double',
    'double',
    'double',
    'void *',
  ]);
  return {
    maxima: (row, maxima) => maximaOf(row, row.length, maxima) === 1,
    masses(row, scale, masses) {
      const { maxima, max, inverse } = scale;
      return massesOf(row, row.length, maxima, max, inverse, leastMaximum(scale), masses) as number;
    },
  };
}
