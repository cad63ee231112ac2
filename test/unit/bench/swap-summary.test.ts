import { expect, it } from 'vitest';
import { type Phase, summariseSwap } from '../../../bench/swap.ts';

it('swap: p99 gaps of the rounds, streams beyond the bound, swaps and tokens a second', () => {
  const heard = (tokens: number) => ({
    ...{ generation: null, rank: 4, prompt: [1] },
    tokens: Array.from({ length: tokens }, () => Buffer.from('a')),
  });
  const phase = (part: Partial<Phase>): Phase => ({
    ...{ gapsMs: [10, 10, 20], heard: [heard(8), heard(12)], failures: [], swaps: 0, ms: 2000 },
    ...part,
  });
  const quiet = [phase({}), phase({ gapsMs: [10, 24] }), phase({ gapsMs: [8] })]; // p99 20, 24, 8
  const swapped = [
    phase({ gapsMs: [10, 30], swaps: 150, heard: [heard(10)] }),
    phase({ gapsMs: [25], swaps: 200, heard: [heard(10)], failures: ['500: no'] }),
    phase({ gapsMs: [50], swaps: 190, heard: [heard(10)] }),
  ];
  const { figures } = summariseSwap({ quiet, swapped }, [[0, 0.26], [0.1], [0.25]]);
  expect(figures).toEqual({
    swaps_per_second: 95, // of 75, 100 and 95
    gap_p99_ratio: 1.5, // 30 / 20
    throughput_ratio: 0.5, // 5 / 10 tokens a second
    failures: 1,
    mismatches: 1,
    streams_checked: 4,
    worst_gap_nats: 0.26,
  });
});
