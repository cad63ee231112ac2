// One step's segments → the inputs of a program: checked against the decoder's limits, sized, ordered and written.

import { GatewayError } from '../errors.ts';
import { type Program, ranksPerPage } from '../kernels/kernels.ts';
import type { Segment, Stepper } from './stepper.ts';

/** Cells at the start of KV memory that no sequence owns: padding rows of a step write there. */
export const scrapCells = 16;
const pagesPerRowMax = 32; // rank 256

type StepLimits = Pick<Stepper, 'cells' | 'tokensMax' | 'segmentsMax'>;

/** The sizes a program is recorded for; a step uses the smallest that fits. */
export interface ProgramSize {
  readonly rows: number; // T
  readonly segments: number; // S
  readonly outputs: number; // rows of logits
  readonly pages: number; // P per row; 0 = no adapter ops at all
}

type Batch = ProgramSize;

/** How many rows of a segment give logits. */
function outputsOf({ wantsLogits, drafts = 0 }: Segment): number {
  return wantsLogits ? 1 + drafts : 0;
}

/** Throws SHAPE_MISMATCH for anything that would read or write outside a sequence's run or a limit of the decoder. */
export function checkBatch(segments: readonly Segment[], limits: StepLimits): Batch {
  let rows = 0;
  let pages = 0;
  let outputs = 0;
  for (const segment of segments) {
    const { tokens, cellBase, position, adapter, drafts = 0 } = segment;
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
    if (adapter === null) continue;
    if (adapter.gates !== null || adapter.routing !== null || adapter.atoms !== null) {
      throw new GatewayError('UNSUPPORTED', 'step: gates, routing and atoms are not served yet');
    }
    const need = pagesOf(segment);
    if (adapter.rank < 1 || need > pagesPerRowMax || adapter.pages.length < need) {
      throw new GatewayError(
        'SHAPE_MISMATCH',
        `step: rank ${adapter.rank} needs ${need} pages, got ${adapter.pages.length}`,
      );
    }
    pages = Math.max(pages, need);
  }
  const { segmentsMax, tokensMax } = limits;
  if (segments.length < 1 || Math.max(segments.length, outputs) > segmentsMax || rows > tokensMax) {
    throw new GatewayError(
      'SHAPE_MISMATCH',
      `step: ${segments.length} segments of ${rows} tokens with ${outputs} outputs, limits are ${segmentsMax} and ${tokensMax}`,
    );
  }
  return { rows, segments: segments.length, outputs, pages };
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
  return {
    rows: roundUpRows(batch.rows, limits.tokensMax),
    segments: roundUpPower(batch.segments, limits.segmentsMax),
    // Without drafts there are at most as many as segments: no program of its own for a batch that wants fewer.
    outputs: roundUpPower(Math.max(batch.segments, batch.outputs), limits.segmentsMax),
    pages: batch.pages === 0 ? 0 : roundUpPower(batch.pages, pagesPerRowMax),
  };
}

export interface PlacedSegment {
  /** Index in the caller's order. */
  readonly index: number;
  readonly segment: Segment;
  readonly rowStart: number;
}

function pagesOf({ adapter }: Segment): number {
  return adapter === null ? 0 : Math.ceil(adapter.rank / ranksPerPage);
}

/** Rows in the order of falling page counts, so that a row costs its own pages only (Ops.shrink). */
export function placeRows(segments: readonly Segment[]): readonly PlacedSegment[] {
  let rowStart = 0;
  return segments
    .map((segment, index) => ({ segment, index }))
    .sort((a, b) => pagesOf(b.segment) - pagesOf(a.segment))
    .map(({ segment, index }) => {
      const placed = { index, segment, rowStart };
      rowStart += segment.tokens.length;
      return placed;
    });
}

/** Fills the inputs; returns the first output row of each segment that wants logits, by the caller's index. */
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
  const active = new Float32Array(size.rows * size.pages * ranksPerPage);
  const outputs = new Map<number, number>();
  let outputCount = 0;
  for (const { index, segment, rowStart } of placed) {
    const { adapter, position, cellBase } = segment;
    for (let i = 0; i < segment.tokens.length; i++) {
      const row = rowStart + i;
      tokens[row] = segment.tokens[i]!;
      positions[row] = position + i;
      cells[row] = BigInt(cellBase + position + i);
      if (adapter === null) continue;
      pages.set(adapter.pages.slice(0, pagesOf(segment)), row * size.pages);
      const from = row * size.pages * ranksPerPage;
      active.fill(adapter.scale, from, from + adapter.rank);
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
    program.write('active', active);
    program.write(
      'uses',
      Int32Array.from({ length: size.rows }, (_, row) => row),
    );
  }
  return outputs;
}
