// One step's segments → the inputs of a program: checked against the decoder's limits, sized, ordered and written.

import { GatewayError } from '../errors.ts';
import { type Program, ranksPerPage } from '../kernels/kernels.ts';
import type { AdapterRows, Segment, Stepper } from './stepper.ts';
import {
  type BankSizes,
  checkUse,
  pagesOf,
  pagesPerRowMax,
  type UseLimits,
  type UseTableSize,
} from './use-table.ts';

/** Cells at the start of KV memory that no sequence owns: padding rows of a step write there. */
export const scrapCells = 16;

type StepLimits = Pick<Stepper, 'cells' | 'tokensMax' | 'segmentsMax'> & UseLimits;

/** The sizes a program is recorded for; a step uses the smallest that fits. */
export interface ProgramSize extends UseTableSize {
  readonly rows: number; // T
  readonly segments: number; // S
  readonly outputs: number; // rows of logits
}

type Batch = Omit<ProgramSize, 'uses'>;

/** How many rows of a segment give logits. */
function outputsOf({ wantsLogits, drafts = 0 }: Segment): number {
  return wantsLogits ? 1 + drafts : 0;
}

/** Throws SHAPE_MISMATCH for anything that would read or write outside a sequence's run or a limit of the decoder. */
export function checkBatch(segments: readonly Segment[], limits: StepLimits): Batch {
  let rows = 0;
  let outputs = 0;
  for (const segment of segments) {
    const { tokens, cellBase, position, drafts = 0 } = segment;
    const end = cellBase + position + tokens.length;
    if (tokens.length < 1 || position < 0 || cellBase < scrapCells || end > limits.cells) {
      throw new GatewayError(
        'SHAPE_MISMATCH',
        `step: ${tokens.length} tokens at position ${position} of cells ${cellBase} leave ${limits.cells} cells`,
      );
    }
    if (drafts < 0 || drafts >= tokens.length) {
      throw new GatewayError('SHAPE_MISMATCH', `step: ${drafts} of ${tokens.length} are drafts`);
    }
    rows += tokens.length;
    outputs += outputsOf(segment);
  }
  const { segmentsMax, tokensMax } = limits;
  if (segments.length < 1 || Math.max(segments.length, outputs) > segmentsMax || rows > tokensMax) {
    throw new GatewayError(
      'SHAPE_MISMATCH',
      `step: ${segments.length} segments of ${rows} tokens with ${outputs} outputs, limits are ${segmentsMax} and ${tokensMax}`,
    );
  }
  const uses = usesOf(segments);
  for (const use of uses) checkUse(use, limits);
  return {
    rows,
    segments: segments.length,
    outputs,
    pages: pagesOf(uses[0] ?? null),
    gates: uses.some(({ gates }) => gates !== null) ? 'modules' : 'shared',
    isRouted: uses.some(({ routing }) => routing !== null),
    hasAtoms: uses.some(({ atoms }) => atoms !== null),
  };
}

/** Padding costs compute, every size costs a program: exact up to 8 rows, then steps of at most a quarter. */
function roundUpRows(rows: number, max: number): number {
  if (rows <= 8) return Math.min(rows, max);
  const step = 2 ** Math.max(1, Math.floor(Math.log2(rows - 1)) - 2);
  return Math.min(Math.ceil(rows / step) * step, max);
}

function roundUpPower(count: number, max: number): number {
  return Math.min(2 ** Math.ceil(Math.log2(count)), max);
}

export function programSize(batch: Batch, limits: StepLimits): ProgramSize {
  const segments = roundUpPower(batch.segments, limits.segmentsMax);
  return {
    ...batch,
    rows: roundUpRows(batch.rows, limits.tokensMax),
    segments,
    uses: batch.pages === 0 ? 0 : 1 + segments, // no sizes of their own: a use more costs a few zeroes
    // Without drafts there are at most as many as segments: no program of its own for a batch that wants fewer.
    outputs: roundUpPower(Math.max(batch.segments, batch.outputs), limits.segmentsMax),
    pages: batch.pages === 0 ? 0 : roundUpPower(batch.pages, pagesPerRowMax),
  };
}

/** One row of a use that is just large enough for the bank. */
export function smallestWithAtoms({ r }: BankSizes): ProgramSize {
  const one = { rows: 1, segments: 1, outputs: 1, uses: 2 };
  const pages = roundUpPower(Math.ceil(r / ranksPerPage), pagesPerRowMax);
  return { ...one, pages, gates: 'shared', isRouted: false, hasAtoms: true };
}

export interface PlacedSegment {
  /** Index in the caller's order. */
  readonly index: number;
  readonly segment: Segment;
  /** Entry of the use table; 0 without an adapter. */
  readonly use: number;
  readonly rowStart: number;
}

/** The batch's uses, told apart by identity, in the order of falling page counts. */
export function usesOf(segments: readonly Segment[]): AdapterRows[] {
  const uses = new Set(segments.map(({ adapter }) => adapter));
  uses.delete(null);
  return [...(uses as Set<AdapterRows>)].sort((a, b) => pagesOf(b) - pagesOf(a));
}

/** Rows in the order of their uses, so that a row costs its own pages only (Ops.shrink) and rows of one use are neighbours,
 *  which read their pages once. */
export function placeRows(
  segments: readonly Segment[],
  uses: readonly AdapterRows[],
): readonly PlacedSegment[] {
  const entries = new Map<AdapterRows | null, number>(uses.map((use, i) => [use, i + 1]));
  let rowStart = 0;
  return segments
    .map((segment, index) => ({ segment, index, use: entries.get(segment.adapter) ?? 0 }))
    .sort((a, b) => (a.use || uses.length + 1) - (b.use || uses.length + 1))
    .map((one) => {
      const placed = { ...one, rowStart };
      rowStart += one.segment.tokens.length;
      return placed;
    });
}

/** Fills the rows' inputs; returns the first output row of each segment that wants logits, by the caller's index. */
export function writeInputs(
  program: Program,
  placed: readonly PlacedSegment[],
  size: ProgramSize,
): ReadonlyMap<number, number> {
  const tokens = new Int32Array(size.rows);
  const positions = new Int32Array(size.rows);
  const cells = new BigInt64Array(size.rows); // padding rows write cell 0, which is scrap
  const outputRows = new Int32Array(size.outputs);
  const pages = new Int32Array(size.rows * size.pages); // page 0 is zero
  const uses = new Int32Array(size.rows); // entry 0 is zero
  const outputs = new Map<number, number>();
  let outputCount = 0;
  for (const { index, segment, rowStart, use } of placed) {
    const { adapter, position, cellBase } = segment;
    for (let i = 0; i < segment.tokens.length; i++) {
      const row = rowStart + i;
      tokens[row] = segment.tokens[i]!;
      positions[row] = position + i;
      cells[row] = BigInt(cellBase + position + i);
      if (adapter === null) continue;
      pages.set(adapter.pages.slice(0, pagesOf(adapter)), row * size.pages);
      uses[row] = use;
    }
    const count = outputsOf(segment);
    if (count > 0) outputs.set(index, outputCount);
    for (let i = segment.tokens.length - count; i < segment.tokens.length; i++) {
      outputRows[outputCount] = rowStart + i;
      outputCount += 1;
    }
  }
  program.write('tokens', tokens);
  program.write('positions', positions);
  program.write('cells', cells);
  program.write('outputRows', outputRows);
  if (size.pages > 0) {
    program.write('pages', pages);
    program.write('uses', uses);
  }
  return outputs;
}
