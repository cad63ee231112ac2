// Random damage to a valid file: bit flips, boundary values written over it, cuts, repeats and splices of another file.

import fc from 'fast-check';

export type Mutation =
  | { readonly kind: 'flip'; readonly at: number; readonly bit: number }
  | { readonly kind: 'write'; readonly at: number; readonly bytes: Uint8Array }
  | { readonly kind: 'cut'; readonly at: number; readonly length: number }
  | { readonly kind: 'truncate'; readonly at: number }
  | { readonly kind: 'repeat'; readonly at: number; readonly length: number }
  | {
      readonly kind: 'splice';
      readonly at: number;
      readonly from: number;
      readonly length: number;
    };

// Places are shares of the file in millionths, so that one mutation fits files of every size and shrinks well.
const place = fc.integer({ min: 0, max: 1_000_000 });
const span = fc.integer({ min: 1, max: 64 });
const boundary = fc.constantFrom(
  ...[0n, 1n, 0x7fn, 0xffn, 0xffffn, 0x7fff_ffffn, 0xffff_ffffn, 1n << 40n],
  ...[(1n << 53n) - 1n, 1n << 53n, (1n << 62n) - 1n, 1n << 63n, (1n << 64n) - 1n],
);

function littleEndian(value: bigint, length: number): Uint8Array {
  const bytes = new Uint8Array(8);
  new DataView(bytes.buffer).setBigUint64(0, value, true);
  return bytes.subarray(0, length);
}

export const mutations: fc.Arbitrary<Mutation[]> = fc.array(
  fc.oneof(
    fc.record({
      kind: fc.constant('flip' as const),
      at: place,
      bit: fc.integer({ min: 0, max: 7 }),
    }),
    fc.record({
      kind: fc.constant('write' as const),
      at: place,
      bytes: fc.oneof(
        fc
          .tuple(boundary, fc.constantFrom(1, 4, 8))
          .map(([value, size]) => littleEndian(value, size)),
        fc.uint8Array({ minLength: 1, maxLength: 8 }),
      ),
    }),
    fc.record({ kind: fc.constant('cut' as const), at: place, length: span }),
    fc.record({ kind: fc.constant('truncate' as const), at: place }),
    fc.record({ kind: fc.constant('repeat' as const), at: place, length: span }),
    fc.record({ kind: fc.constant('splice' as const), at: place, from: place, length: span }),
  ),
  { minLength: 1, maxLength: 4 },
);

/** `other` is what splices are taken from. */
export function mutate(
  bytes: Uint8Array,
  other: Uint8Array,
  changes: readonly Mutation[],
): Uint8Array {
  let file = Uint8Array.from(bytes);
  const join = (...parts: Uint8Array[]): Uint8Array<ArrayBuffer> =>
    new Uint8Array(Buffer.concat(parts));
  for (const change of changes) {
    const at = Math.min(file.length, Math.floor((change.at / 1_000_000) * file.length));
    const [before, after] = [file.subarray(0, at), file.subarray(at)];
    if (change.kind === 'flip') {
      if (at < file.length) file[at]! ^= 1 << change.bit;
    } else if (change.kind === 'write') {
      file = join(before, change.bytes, after.subarray(change.bytes.length));
    } else if (change.kind === 'cut') {
      file = join(before, after.subarray(change.length));
    } else if (change.kind === 'truncate') {
      file = join(before);
    } else if (change.kind === 'repeat') {
      file = join(before, after.subarray(0, change.length), after);
    } else {
      const from = Math.floor((change.from / 1_000_000) * other.length);
      file = join(before, other.subarray(from, from + change.length), after);
    }
  }
  return file;
}

/** Bytes that `run` allocated, counted by the heap and by array buffers: a lower bound, as a collection may pass. */
export function allocatedBy(run: () => void): number {
  const used = (): number => {
    const { heapUsed, arrayBuffers } = process.memoryUsage();
    return heapUsed + arrayBuffers;
  };
  const before = used();
  run();
  return used() - before;
}
