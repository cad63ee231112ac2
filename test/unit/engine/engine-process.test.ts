import { createHash } from 'node:crypto';
import {
  copyFileSync,
  mkdtempSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { systemClock } from '../../../src/engine/clock.ts';
import type { EngineEvent, GenerateRequest } from '../../../src/engine/messages.ts';
import { type EngineConfig, openLoop } from '../../../src/engine/open-loop.ts';
import { Supervisor } from '../../../src/engine/supervisor.ts';
import { entryExecArgv, entryUrl } from '../../../src/model/spawn-entry.ts';
import { useOf } from '../../support/adapter-use.ts';
import { createLocalEngine } from '../../support/local-engine.ts';
import { makeRequest } from '../../support/loop-harness.ts';
import { tinyPath } from '../../support/open-test-decoder.ts';

// The production entry over real tensors (the tiny random Llama of test/golden/tiny, f32): what a reader gets from the
// engine process is what transformers computed for the same prompts, also across a kill -9.

interface Golden {
  readonly runs: ReadonlyArray<{
    readonly ids: readonly number[];
    readonly greedy: readonly number[];
  }>;
}
const golden = JSON.parse(
  readFileSync(join(import.meta.dirname, '../../golden/tiny/greedy.json'), 'utf8'),
) as Golden;

const config: EngineConfig = {
  modelPath: tinyPath,
  modelHash: createHash('sha256').update(readFileSync(tinyPath)).digest('hex'),
  weights: 'exact',
  backend: 'ggml',
  threads: 1,
  device: 'cpu',
  libraryDirectory: null,
  cacheDirectory: null,
  blobDirectory: join(import.meta.dirname, 'no-such-directory'),
  cells: 1024,
  pages: 8,
  tokensMax: 64,
  segmentsMax: 8,
  limits: { waitingMax: 50, waitingTokensMax: 10_000, waitingMsMax: 60_000, prefillTokensMax: 48 },
  tenantShareMax: 0.5,
};
const never = new AbortController().signal;

/** The golden run up to an end token, which transformers ran on past. */
function wanted(greedy: readonly number[], ends: readonly number[]): readonly number[] {
  const end = greedy.findIndex((token) => ends.includes(token));
  return end < 0 ? greedy : greedy.slice(0, end);
}

function requests(): GenerateRequest[] {
  return golden.runs.map(({ ids, greedy }, i) =>
    makeRequest({ id: `g${i}`, tokens: Int32Array.from(ids), tokensMax: greedy.length }),
  );
}

async function idsOf(
  stream: AsyncIterable<EngineEvent>,
  onPiece: (count: number) => void = () => {},
): Promise<number[]> {
  const ids: number[] = [];
  for await (const event of stream) {
    if (event.kind !== 'piece') continue;
    ids.push(...event.tokens.map((one) => one.token));
    onPiece(ids.length);
  }
  return ids;
}

function start(changes: Partial<EngineConfig> = {}): Supervisor {
  return new Supervisor({
    entry: entryUrl(import.meta.url, '../../../src/engine/engine-process'),
    execArgv: entryExecArgv(import.meta.url),
    argument: JSON.stringify({ ...config, ...changes }),
    environment: {},
    clock: systemClock,
    readyMsMax: 60_000,
    silenceMsMax: 30_000,
    backoffMsMin: 1,
    backoffMsMax: 100,
    flightsMax: 50,
    eventsMax: 1000,
    drainMsMax: 5000,
  });
}

it('serves nothing from a model file that was replaced while it ran', async () => {
  const directory = mkdtempSync(join(tmpdir(), 'rankgate-engine-'));
  const modelPath = join(directory, 'model.gguf');
  copyFileSync(tinyPath, modelPath);
  const engine = start({ modelPath, cacheDirectory: join(directory, 'cache') });
  await engine.start();
  const bytes = readFileSync(tinyPath);
  bytes[bytes.length - 1]! ^= 1; // as valid as before
  writeFileSync(`${modelPath}.new`, bytes);
  renameSync(`${modelPath}.new`, modelPath);
  process.kill(engine.pid!, 'SIGKILL');
  const answer = idsOf(engine.submit(requests()[0]!, never));
  await expect(answer).rejects.toMatchObject({ code: 'NO_CAPACITY' });
  await engine.close();
  rmSync(directory, { recursive: true });
}, 60_000);

describe('engine process over real tensors', () => {
  let engine: Supervisor;
  beforeAll(async () => {
    engine = start();
    await engine.start();
  });
  afterAll(() => engine.close());

  it('says what it serves', () => {
    expect(engine.base.config.vocabSize).toBeGreaterThan(256);
    expect(engine.base.contextMax).toBeLessThanOrEqual(1008);
    expect(engine.base.backend).toContain('ggml');
    expect(engine.isReady()).toBe(true);
  });

  it('continues all golden prompts in one batch as transformers does', async () => {
    const answers = await Promise.all(requests().map((one) => idsOf(engine.submit(one, never))));
    golden.runs.forEach(({ greedy }, i) => {
      expect(answers[i]).toEqual(wanted(greedy, engine.base.endTokens));
    });
    const again = await Promise.all(requests().map((one) => idsOf(engine.submit(one, never))));
    expect(again).toEqual(answers); // from cached prefixes
    expect(engine.stats().prefixTokensHit).toBeGreaterThan(0);
  });

  it('goes on across a kill -9 in the middle', async () => {
    let isKilled = false;
    const answers = await Promise.all(
      requests().map((one) =>
        idsOf(engine.submit(one, never), (count) => {
          if (isKilled || count < 3) return;
          isKilled = true;
          process.kill(engine.pid!, 'SIGKILL');
        }),
      ),
    );
    expect(engine.restarts).toBe(1);
    golden.runs.forEach(({ greedy }, i) => {
      expect(answers[i]).toEqual(wanted(greedy, engine.base.endTokens));
    });
  });

  it('an adapter that is not stored fails its own request only', async () => {
    const generation = `sha256:${'0'.repeat(64)}` as const;
    const [lost, fine] = requests();
    const failing = idsOf(engine.submit({ ...lost!, adapter: useOf(generation, 4) }, never));
    const going = idsOf(engine.submit(fine!, never));
    await expect(failing).rejects.toMatchObject({ code: 'ADAPTER_NOT_FOUND' });
    expect(await going).toEqual(wanted(golden.runs[1]!.greedy, engine.base.endTokens));
  });

  it('the same loop inside this process answers the same', async () => {
    const local = await createLocalEngine(
      (emit) => openLoop({ ...config, backend: 'reference' }, systemClock, emit),
      () => performance.now(),
    );
    const answers = await Promise.all(requests().map((one) => idsOf(local.submit(one, never))));
    golden.runs.forEach(({ greedy }, i) => {
      expect(answers[i]).toEqual(wanted(greedy, local.base.endTokens));
    });
    await local.close();
    await expect(idsOf(local.submit(requests()[0]!, never))).rejects.toMatchObject({
      code: 'NO_CAPACITY',
    });
  });
});
