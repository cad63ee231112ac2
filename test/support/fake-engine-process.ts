// A real engine process over the fake stepper, with deaths on order. Its argument says when; a file per death in
// `scratchDir` makes it die so only once.

import { existsSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { createHostTier } from '../../src/adapters/host-tier.ts';
import { createResidency } from '../../src/adapters/residency.ts';
import { systemClock } from '../../src/engine/clock.ts';
import { EngineLoop } from '../../src/engine/engine-loop.ts';
import { KvPool } from '../../src/engine/kv-pool.ts';
import { PrefixCache } from '../../src/engine/prefix-cache.ts';
import { serveLoop } from '../../src/engine/serve-loop.ts';
import { GatewayError } from '../../src/errors.ts';
import type { Segment } from '../../src/model/stepper.ts';
import {
  FakeStepper,
  fakeBaseHash,
  fakeBaseInfo,
  fakeBytesOf,
  fakePacked,
} from './fake-stepper.ts';
import { fakeRankOf } from './loop-harness.ts';

export interface FakeProcessOptions {
  readonly scratchDir: string;
  /** Dies once at each of these steps of a life: a life goes on to the next when its file exists. */
  readonly dieAtSteps?: ReadonlyArray<{ readonly step: number; readonly signal: NodeJS.Signals }>;
  /** Any segment with this token kills, always. */
  readonly poisonToken?: number;
  readonly refuse?: boolean;
  readonly neverReady?: boolean;
  readonly stopWhenReady?: boolean;
}

const options = JSON.parse(process.argv[2]!) as FakeProcessOptions;

function dieOnce(name: string, signal: NodeJS.Signals): void {
  const file = join(options.scratchDir, name);
  if (existsSync(file)) return;
  writeFileSync(file, '');
  process.kill(process.pid, signal);
  // SIGSTOP takes effect at the next system call at the latest; nothing is computed before it.
  if (signal === 'SIGSTOP') for (let i = 0; i < 3; i++) existsSync(file);
}

function onStep(segments: readonly Segment[], step: number): void {
  for (const one of options.dieAtSteps ?? []) {
    if (one.step === step) dieOnce(`${one.signal}-${one.step}`, one.signal);
  }
  const { poisonToken } = options;
  if (poisonToken === undefined) return;
  if (segments.some((segment) => segment.tokens.includes(poisonToken))) {
    process.kill(process.pid, 'SIGKILL');
  }
}

if (options.neverReady === true) setInterval(() => {}, 1000);
else {
  await serveLoop((emit) => {
    if (options.refuse === true) {
      return Promise.reject(new GatewayError('INVALID_MODEL_FILE', 'planted'));
    }
    const stepper = new FakeStepper({ cells: 64 * 16, pages: 12, onStep });
    const host = createHostTier({
      bytesMax: 1e8,
      read: (key) => Promise.resolve(fakePacked(key, fakeRankOf(key))),
    });
    return Promise.resolve(
      new EngineLoop({
        base: fakeBaseInfo(),
        stepper,
        residency: createResidency({
          stepper,
          baseHash: fakeBaseHash,
          open: (key) => host.open(key),
        }),
        cache: new PrefixCache({ pool: new KvPool(stepper.cells), tenantShareMax: 0.5 }),
        limits: {
          waitingMax: 100,
          waitingTokensMax: 100_000,
          waitingMsMax: 60_000,
          prefillTokensMax: 32,
        },
        bytesOf: fakeBytesOf,
        clock: systemClock,
        watch: { threads: 1, begin() {}, end() {} },
        emit,
        hosted: () => host.changed(),
      }),
    );
  });
  if (options.stopWhenReady === true) process.kill(process.pid, 'SIGSTOP');
}
