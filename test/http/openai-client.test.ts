import { afterAll, beforeAll } from 'vitest';
import { type Listening, listen } from '../../src/server/listen.ts';
import { FakeEngine } from '../support/fake-engine.ts';
import { createHarness, type Harness } from '../support/http-harness.ts';
import { runOpenAiSuite } from '../support/openai-suite.ts';

let harness: Harness;
let listening: Listening;
beforeAll(async () => {
  harness = createHarness();
  // This one generates by itself: end of length, stop strings and log-probabilities as the contract has them.
  const engine = new FakeEngine();
  harness.engine.script = (request, signal) => engine.submit(request, signal);
  listening = await listen(harness.app, harness.lifecycle, {
    host: '127.0.0.1',
    port: 0,
    connectionsMax: 64,
    keepAliveMs: 5000,
    requestMsMax: 60_000,
  });
});
afterAll(async () => {
  await listening.close(0);
  harness.close();
});

runOpenAiSuite({
  baseUrl: () => `http://127.0.0.1:${listening.port}/v1`,
  apiKey: 'unused',
  models: { base: 'tiny-base', adapter: 'support' },
});
