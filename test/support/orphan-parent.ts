// A gateway in miniature: supervises a fake engine, says its pid, and waits to be killed.

import { systemClock } from '../../src/engine/clock.ts';
import { Supervisor } from '../../src/engine/supervisor.ts';
import { entryExecArgv, entryUrl } from '../../src/model/spawn-entry.ts';

const engine = new Supervisor({
  entry: entryUrl(import.meta.url, './fake-engine-process'),
  execArgv: entryExecArgv(import.meta.url),
  argument: JSON.stringify({ scratchDir: '.' }),
  environment: {},
  clock: systemClock,
  readyMsMax: 20_000,
  silenceMsMax: 20_000,
  backoffMsMin: 10,
  backoffMsMax: 100,
  flightsMax: 10,
  eventsMax: 100,
  drainMsMax: 100,
});
await engine.start();
process.send?.(engine.pid);
