import { expect, it } from 'vitest';
import { fixedRank } from '../../support/simulator/contestants.ts';
import { smallMachine } from '../../support/simulator/machine.ts';
import { simulate } from '../../support/simulator/simulation.ts';
import { createTraffic, smallTiers } from '../../support/simulator/traffic.ts';

// Admission looks at 64 a tick. More than that wait, for more adapters than there is room for: an adapter may be loaded for
// somebody who is beyond its reach when the load is done.
it('serves everybody of a queue that is longer than what admission looks at', async () => {
  const count = 320;
  const arrivals = createTraffic({
    ...{
      seed: 1,
      seconds: 400,
      perSecond: 2,
      shape: 'steady',
      adapters: 16,
      zipf: 1.1,
      tenants: 4,
    },
    ...{ tiers: smallTiers, promptTokens: [8, 128], tokensMax: [16, 32, 64], endsEarly: 0.3 },
  })
    .slice(0, count)
    .map((one) => ({ ...one, atMs: 0 }));
  const machine = { ...smallMachine, waitingMax: count, waitingTokensMax: 2 ** 24 };
  const { ended } = await simulate({ seed: 1, machine, arrivals }, fixedRank(64));
  expect(ended.filter(({ outcome }) => outcome !== 'answered')).toEqual([]);
});
