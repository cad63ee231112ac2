// Low-rank ops for a device: every row pays for the program's whole page count, since neither the tiers' patched sizes nor
// their writes into one shared result may be spread over two backends. Pages that a row does not use are page 0: zeros.

import { type ExpandPart, ranksPerPage, type ShrinkPart, type Tensor } from '../kernels.ts';
import { type Node, pointerOf } from './recorder.ts';
import type { RecorderHost } from './training-recorder.ts';

type GraphHost = Pick<RecorderHost, 'op' | 'node'>;

export function shrinkWhole(
  { op, node }: GraphHost,
  { x, pages, uses }: { readonly x: Tensor; readonly pages: Tensor; readonly uses: Tensor },
  parts: readonly ShrinkPart[],
): Node[] {
  const [rows, inner] = x.shape as [number, number];
  const count = pages.shape[1]!;
  const ranks = count * ranksPerPage;
  const input = op('ggml_reshape_4d', pointerOf(x), inner, 1, rows, 1); // [T, 1, K]
  return parts.map(({ a, gate }) => {
    const product = op('ggml_mul_mat_id', pointerOf(a), input, pointerOf(pages)); // [T, P, 8]
    const scale = op('ggml_get_rows', pointerOf(gate), pointerOf(uses)); // [T, 8P]
    const gated = op(
      'ggml_mul',
      product,
      op('ggml_reshape_4d', scale, ranksPerPage, count, rows, 1),
    );
    return node(op('ggml_reshape_4d', gated, ranks, rows, 1, 1), [rows, ranks]);
  });
}

export function expandWhole({ op, node }: GraphHost, pages: Tensor, { y, h, b }: ExpandPart): Node {
  const [rows, outer] = y.shape as [number, number];
  const count = pages.shape[1]!;
  const input = op('ggml_reshape_4d', pointerOf(h), ranksPerPage, count, rows, 1); // [T, P, 8]
  const product = op('ggml_mul_mat_id', pointerOf(b), input, pointerOf(pages)); // [T, P, N]
  let sum = pointerOf(y);
  for (let page = 0; page < count; page++) {
    const offset = page * outer * 4;
    const part = op('ggml_view_2d', product, outer, rows, count * outer * 4, offset);
    sum = op('ggml_add', sum, part);
  }
  return node(sum, y.shape);
}
