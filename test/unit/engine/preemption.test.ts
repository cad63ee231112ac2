import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { type Holder, planPreemption } from '../../../src/engine/preemption.ts';

interface Cells extends Holder {
  readonly id: string;
  readonly blocks: number;
}

function holder(id: string, over: Partial<Cells> = {}): Cells {
  return { id, tenant: 't', priority: 5, arrival: 0, preemptions: 0, blocks: 1, ...over };
}

function victims(
  candidate: Pick<Holder, 'tenant' | 'priority'>,
  holders: readonly Cells[],
  blocks: number,
): string[] {
  const held = (tenant: string): number => holders.filter((one) => one.tenant === tenant).length;
  const fits = (gone: readonly Cells[]): boolean =>
    gone.reduce((sum, one) => sum + one.blocks, 0) >= blocks;
  return planPreemption(candidate, holders, held, fits).map(({ id }) => id);
}

describe('planPreemption', () => {
  it('takes the lowest priority, then the youngest, and no more than are in the way', () => {
    const holders = [
      holder('old', { priority: 2, arrival: 1 }),
      holder('young', { priority: 2, arrival: 9 }),
      holder('large', { priority: 3, arrival: 3, blocks: 4 }),
      holder('equal', { priority: 8, arrival: 20, blocks: 9 }),
    ];
    const urgent = { tenant: 't', priority: 8 };
    expect(victims(urgent, holders, 1)).toEqual(['young']);
    expect(victims(urgent, holders, 2)).toEqual(['young', 'old']);
    expect(victims(urgent, holders, 4)).toEqual(['large']);
    expect(victims(urgent, holders, 7)).toEqual([]); // nobody goes in vain, and nobody of its own priority
    expect(victims({ tenant: 't', priority: 2 }, holders, 1)).toEqual([]);
  });

  it('crosses tenants only towards whoever holds less', () => {
    const flood = Array.from({ length: 4 }, (_, i) => holder(`f${i}`, { tenant: 'f', arrival: i }));
    expect(victims({ tenant: 'new', priority: 5 }, flood, 1)).toEqual(['f3']);
    expect(victims({ tenant: 'new', priority: 4 }, flood, 1)).toEqual([]);
    const both = [...flood, holder('own', { tenant: 'new' })];
    expect(victims({ tenant: 'new', priority: 5 }, both, 1)).toEqual(['f3']); // 4 of 2
    const more = [...both, holder('own2', { tenant: 'new' })];
    expect(victims({ tenant: 'new', priority: 5 }, more, 1)).toEqual([]); // 4 of 3
    expect(victims({ tenant: 'new', priority: 6 }, more, 1)).toEqual(['f3']);
  });

  it('leaves alone whoever has been displaced twice', () => {
    const tired = [holder('a', { priority: 1, preemptions: 2 })];
    expect(victims({ tenant: 't', priority: 9 }, tired, 1)).toEqual([]);
  });

  it('never lets two displace each other in turn', () => {
    const holders = fc.array(
      fc.record({
        tenant: fc.constantFrom('a', 'b', 'c'),
        priority: fc.integer({ min: 0, max: 9 }),
        arrival: fc.nat(100),
      }),
      { minLength: 1, maxLength: 12 },
    );
    const candidate = fc.record({
      tenant: fc.constantFrom('a', 'b', 'c'),
      priority: fc.integer({ min: 0, max: 9 }),
    });
    fc.assert(
      fc.property(holders, candidate, (list, wanting) => {
        const all = list.map((over, i) => holder(`h${i}`, over));
        const [victim] = victims(wanting, all, 1);
        if (victim === undefined) return;
        const gone = all.find(({ id }) => id === victim)!;
        const after = [...all.filter((one) => one !== gone), holder('c', wanting)];
        // What it wanted it has; whoever gave it up for it does not get it back from it.
        const only = after.filter(({ id }) => id === 'c');
        const held = (tenant: string): number =>
          after.filter((one) => one.tenant === tenant).length;
        expect(planPreemption(gone, only, held, () => true)).toEqual([]);
      }),
    );
  });
});
