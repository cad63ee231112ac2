import { readFileSync } from 'node:fs';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import {
  Archive,
  archiveFigures,
  type Elite,
  ownerRowsMax,
  rowsMax,
} from '../../../src/router/archive.ts';

interface Golden {
  readonly streams: ReadonlyArray<{
    readonly cells: number;
    readonly candidates: ReadonlyArray<readonly [domain: number, ms: number, objective: number]>;
    /** By domain × cells + cell: which candidate, and its objective. */
    readonly elites: Readonly<Record<string, readonly [candidate: number, objective: number]>>;
    readonly coverage: number;
    readonly qdScore: number;
  }>;
}

const golden = JSON.parse(
  readFileSync(new URL('../../golden/archive/ribs.json', import.meta.url), 'utf8'),
) as Golden;

const always = (): boolean => true;
const candidate = (objective: number, latencyMs: number, adapter = 'a'): Elite => ({
  adapter,
  generation: `sha256:${'a'.repeat(64)}`,
  kind: 'lora',
  rank: 8,
  objective,
  latencyMs,
});

describe('Archive', () => {
  it.each(golden.streams.map((stream) => [stream.cells, stream] as const))(
    'keeps of a stream what GridArchive of ribs 0.12 keeps, cell for cell, with %i cells',
    (cells, { candidates, elites, coverage, qdScore }) => {
      const archive = new Archive(cells);
      for (const [i, [domain, ms, objective]] of candidates.entries()) {
        archive.offer(String(domain), candidate(objective, ms, String(i)), always);
      }
      const kept = Object.fromEntries(
        archive
          .rows()
          .flatMap(([domain, row]) =>
            row.flatMap((elite, cell) =>
              elite === null
                ? []
                : [[Number(domain) * cells + cell, [Number(elite.adapter), elite.objective]]],
            ),
          ),
      );
      expect(kept).toEqual(elites);
      const figures = archiveFigures(archive.rows());
      expect(figures.coverage).toBe(coverage);
      expect(figures.qdScore).toBeCloseTo(qdScore, 9);
    },
  );

  it('never lets the objective of a cell fall, whatever is offered', () => {
    const offers = fc.array(
      fc.record({
        domain: fc.constantFrom('law', 'code'),
        objective: fc.double({ min: 0, max: 1, noNaN: true }),
        latencyMs: fc.double({ min: 1, max: 100_000, noNaN: true }),
      }),
      { maxLength: 200 },
    );
    fc.assert(
      fc.property(offers, (stream) => {
        const archive = new Archive();
        const best = new Map<string, number>();
        for (const { domain, objective, latencyMs } of stream) {
          const key = `${domain}/${archive.cellOf(latencyMs)}`;
          archive.offer(domain, candidate(objective, latencyMs), always);
          best.set(key, Math.max(best.get(key) ?? 0, objective));
        }
        const kept = archive
          .rows()
          .flatMap(([domain, row]) =>
            row.flatMap((elite, cell) =>
              elite === null ? [] : [[`${domain}/${cell}`, elite.objective] as const],
            ),
          );
        expect(new Map(kept)).toEqual(best);
      }),
    );
  });

  it('reads the nearest filled cell, the faster of two as near, and without a budget the best', () => {
    const archive = new Archive();
    archive.offer('law', candidate(0.5, 100, 'fast'), always); // cell 2: 64 to 128 ms
    archive.offer('law', candidate(0.9, 2000, 'slow'), always); // cell 6: 1 to 2 s
    const read = (ms: number | null): unknown[] => {
      const found = archive.read('law', ms, always)!;
      return [found.elite.adapter, found.match];
    };
    expect(read(70)).toEqual(['fast', 'exact']);
    expect(read(20)).toEqual(['fast', 'nearest']);
    expect(read(300)).toEqual(['fast', 'nearest']); // cell 4: two from both
    expect(read(600)).toEqual(['slow', 'nearest']);
    expect(read(1_000_000)).toEqual(['slow', 'nearest']);
    expect(read(null)).toEqual(['slow', 'exact']);
    expect(archive.read('code', 70, always)).toBeNull();
  });

  it('passes over an elite that is not current, and lets a worse one take its cell', () => {
    const archive = new Archive();
    const isCurrent = ({ adapter }: Elite): boolean => adapter !== 'gone';
    archive.offer('law', candidate(0.9, 100, 'gone'), always);
    archive.offer('law', candidate(0.2, 400, 'here'), always);
    expect(archive.read('law', 100, isCurrent)).toMatchObject({ cell: 4, match: 'nearest' });
    expect(archive.read('law', null, isCurrent)!.elite.adapter).toBe('here');
    expect(archive.offer('law', candidate(0.1, 100, 'next'), isCurrent)).toBe('improved');
    expect(archive.read('law', 100, isCurrent)!.elite.adapter).toBe('next');
  });

  it('has room for so many rows, and so many of one owner, and again after one is removed', () => {
    const archive = new Archive();
    const status = (row: string, objective = 0.5): string =>
      archive.offer(row, candidate(objective, 100), always);
    for (let i = 0; i < ownerRowsMax; i++) expect(status(`acme/d${i}`)).toBe('new');
    expect(status('acme/more')).toBe('no-room');
    expect(status('acme/d0', 0.6)).toBe('improved');
    for (let i = ownerRowsMax; i < rowsMax; i++) expect(status(`t${i}/d`)).toBe('new');
    expect(status('/law')).toBe('no-room');
    expect([archive.remove('acme/d0'), archive.remove('acme/d0')]).toEqual([true, false]);
    expect(status('/law')).toBe('new');
  });

  it('comes back from its text, and refuses what is none', () => {
    const archive = new Archive();
    archive.offer('law', candidate(0.5, 100), always);
    archive.offer('code', { ...candidate(0.9, 9), adapter: null, generation: null }, always);
    const text = archive.save();
    const again = new Archive();
    expect(again.restore(text)).toBe(true);
    expect(again.rows()).toEqual(archive.rows());
    expect(again.save()).toBe(text);
    const mutilated = [
      '',
      'null',
      text.slice(1),
      text.replace('/1', '/2'),
      text.replace('"rank":8', '"rank":-8'),
      text.replace('null,', ''),
    ];
    for (const bad of mutilated) expect([bad, again.restore(bad)]).toEqual([bad, false]);
    expect(new Archive(6).restore(text)).toBe(false);
    expect(again.save()).toBe(text);
  });
});
