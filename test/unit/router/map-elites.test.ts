import { readFileSync } from 'node:fs';
import { expect, it } from 'vitest';
import { Archive, archiveFigures, type Elite } from '../../../src/router/archive.ts';
import { createRng, type Rng } from '../../support/random.ts';

// The archive as the store of a whole MAP-Elites run, on the benchmark of test/oracle/ribs-sphere.py: what it keeps is what the next
// candidates are made of, so a cell that lost its elite, or kept the worse one, costs coverage.

interface Golden {
  readonly dim: number;
  readonly box: number;
  readonly shift: number;
  readonly cells: number;
  readonly batch: number;
  readonly batches: number;
  readonly iso: number;
  readonly line: number;
  readonly runs: ReadonlyArray<{ readonly coverage: number; readonly qdScore: number }>;
}

const golden = JSON.parse(
  readFileSync(new URL('../../golden/archive/ribs-sphere.json', import.meta.url), 'utf8'),
) as Golden;
const { dim, box, shift, cells, batch, batches, iso, line } = golden;

type Solution = readonly number[];
const sum = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0);
const mean = (values: readonly number[]): number => sum(values) / values.length;

/** In 0…1: the objective, and where the measures lie in their range. */
function judge(x: Solution): { readonly objective: number; readonly measures: readonly number[] } {
  const worst = dim * (box + shift) ** 2;
  const clipped = x.map((value) => (Math.abs(value) <= box ? value : box / value));
  const halves = [clipped.slice(0, dim / 2), clipped.slice(dim / 2)];
  return {
    objective: 1 - sum(x.map((value) => (value - shift) ** 2)) / worst,
    measures: halves.map((half) => (sum(half) / (box * (dim / 2)) + 1) / 2),
  };
}

/** Between elites, and a little beside the line (Vassiliades & Mouret 2018). */
function vary(parent: Solution, other: Solution, rng: Rng): Solution {
  const along = line * rng.normal();
  return parent.map((value, i) => value + iso * rng.normal() + along * (other[i]! - value));
}

function fill(seed: number): ReturnType<typeof archiveFigures> {
  const rng = createRng(seed);
  const archive = new Archive(cells);
  const solutions: Solution[] = [];
  const add = (x: Solution): void => {
    const { objective, measures } = judge(x);
    const [domain, latency] = measures as [number, number];
    const row = String(Math.min(cells - 1, Math.floor(cells * domain)));
    const elite: Elite = {
      adapter: String(solutions.push(x) - 1),
      generation: null,
      kind: 'lora',
      rank: 8,
      objective,
      latencyMs: 2 ** (4 + 10 * latency), // the archive's axis from end to end
    };
    archive.offer(row, elite, () => true);
  };
  for (let i = 0; i < batch; i++) {
    add(Array.from({ length: dim }, () => box * (2 * rng.next() - 1)));
  }
  for (let i = 1; i < batches; i++) {
    const elites = archive
      .rows()
      .flatMap(([, row]) => row.flatMap((elite) => (elite === null ? [] : [elite])));
    const draw = (): Solution => solutions[Number(elites[rng.below(elites.length)]!.adapter)]!;
    const varied = Array.from({ length: batch }, () => vary(draw(), draw(), rng));
    for (const x of varied) add(x);
  }
  // Of the whole grid, also of rows that nothing fell into.
  const { elites, qdScore } = archiveFigures(archive.rows());
  return { elites, qdScore, coverage: elites / cells ** 2 };
}

it('fills as much of the sphere’s grid as ribs with the same budget, less two points', () => {
  const runs = Array.from({ length: 12 }, (_, i) => fill(100 + i));
  const coverage = mean(runs.map((run) => run.coverage));
  expect(coverage).toBeGreaterThanOrEqual(mean(golden.runs.map((run) => run.coverage)) - 0.02);
  const qdScore = mean(runs.map((run) => run.qdScore));
  expect(qdScore / mean(golden.runs.map((run) => run.qdScore))).toBeGreaterThanOrEqual(0.95);
});
