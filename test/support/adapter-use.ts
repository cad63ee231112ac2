import type { Generation } from '../../src/adapters/adapter.ts';
import type { AdapterUse } from '../../src/engine/messages.ts';

/** What a request that names one adapter makes of it. */
export function useOf(generation: Generation, rank: number): AdapterUse {
  return blendOf([[generation, rank, 1]]);
}

export function blendOf(
  parts: ReadonlyArray<readonly [generation: Generation, rank: number, weight: number]>,
  over: Partial<AdapterUse> = {},
): AdapterUse {
  return {
    parts: parts.map(([generation, rank, weight]) => ({ generation, rank, weight })),
    merge: 'linear',
    density: 1,
    flyTopK: null,
    prior: null,
    system: null,
    ...over,
  };
}
