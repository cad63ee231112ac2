// Entry of the engine process. Its only argument is the EngineConfig as JSON, written by the gateway that forks it.

import { systemClock } from './clock.ts';
import { type EngineConfig, openLoop } from './open-loop.ts';
import { serveLoop } from './serve-loop.ts';

await serveLoop((emit) => {
  const config = JSON.parse(process.argv[2] ?? 'null') as EngineConfig;
  return openLoop(config, systemClock, emit);
});
