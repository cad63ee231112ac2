import { fork } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { systemClock } from '../../../src/engine/clock.ts';
import type { EngineEvent, GenerateRequest } from '../../../src/engine/messages.ts';
import { Supervisor, type SupervisorOptions } from '../../../src/engine/supervisor.ts';
import { GatewayError } from '../../../src/errors.ts';
import { entryExecArgv, entryUrl } from '../../../src/model/spawn-entry.ts';
import { blendOf, useOf } from '../../support/adapter-use.ts';
import type { FakeProcessOptions } from '../../support/fake-engine-process.ts';
import { fakeGeneration } from '../../support/fake-stepper.ts';
import { idleAnswer } from '../../support/idle-answer.ts';
import { fakeRankOf, greedy, makeRequest, nextTick } from '../../support/loop-harness.ts';

// A real child process over the fake stepper (test/support/fake-engine-process.ts), which dies where it is told to. What
// a reader gets must equal what the model alone answers, whatever happened in between.

const open: Supervisor[] = [];
const scratchDir = mkdtempSync(join(tmpdir(), 'rankgate-supervisor-'));
let lives = 0;

async function start(
  child: Omit<FakeProcessOptions, 'scratchDir'> = {},
  over: Partial<SupervisorOptions> = {},
): Promise<Supervisor> {
  lives += 1;
  const scratch = mkdtempSync(join(scratchDir, `${lives}-`));
  const engine = new Supervisor({
    entry: entryUrl(import.meta.url, '../../support/fake-engine-process'),
    execArgv: entryExecArgv(import.meta.url),
    argument: JSON.stringify({ scratchDir: scratch, ...child }),
    environment: {},
    clock: systemClock,
    readyMsMax: 30_000,
    silenceMsMax: 20_000,
    backoffMsMin: 1,
    backoffMsMax: 50,
    flightsMax: 100,
    eventsMax: 4096,
    drainMsMax: 5000,
    ...over,
  });
  open.push(engine);
  await engine.start();
  return engine;
}

async function closeAll(): Promise<void> {
  await Promise.all(open.splice(0).map((engine) => engine.close()));
}

afterAll(async () => {
  await closeAll();
  rmSync(scratchDir, { recursive: true, force: true });
});

async function until(condition: () => boolean, what: string): Promise<void> {
  const deadline = performance.now() + 20_000;
  while (!condition()) {
    if (performance.now() > deadline) throw new Error(`never came: ${what}`);
    await nextTick();
  }
}

const never = new AbortController().signal;

interface Answer {
  readonly events: readonly EngineEvent[];
  readonly text: string;
  readonly ids: readonly number[];
  readonly code: string | null;
}

async function read(
  stream: AsyncIterable<EngineEvent>,
  onEvent: (event: EngineEvent, index: number) => void = () => {},
): Promise<Answer> {
  const events: EngineEvent[] = [];
  let code: string | null = null;
  try {
    for await (const event of stream) {
      events.push(event);
      onEvent(event, events.length);
    }
  } catch (error) {
    code = error instanceof GatewayError ? error.code : String(error);
  }
  const pieces = events.flatMap((event) => (event.kind === 'piece' ? [event] : []));
  return {
    events,
    text: pieces.map((one) => one.text).join(''),
    ids: pieces.flatMap((one) => one.tokens.map(({ token }) => token)),
    code,
  };
}

function expectUndisturbed(answer: Answer, request: GenerateRequest): void {
  const want = idleAnswer(request, fakeRankOf, []);
  expect(answer.code, request.id).toBeNull();
  expect(answer.text, request.id).toBe(want.text);
  expect(answer.ids, request.id).toEqual(want.tokens);
  const kinds = answer.events.map((event) => event.kind);
  expect(kinds.filter((kind) => kind === 'start')).toHaveLength(1);
  expect(kinds.filter((kind) => kind === 'end')).toHaveLength(1);
  expect(answer.events.at(-1)).toMatchObject({
    kind: 'end',
    reason: want.reason,
    completionTokens: want.tokens.length,
  });
}

const range = (length: number, from: number): Int32Array =>
  Int32Array.from({ length }, (_, i) => (from + i * 7) % 62);
/** Never makes token 63, which is the poison. */
const mild = { ...greedy, logitBias: [[63, -100] as const] };

const mixed: GenerateRequest[] = [
  makeRequest({ id: 'base', tokens: range(40, 0), tokensMax: 90, sampling: mild }),
  makeRequest({
    id: 'adapter',
    tokens: range(20, 3),
    tokensMax: 70,
    sampling: mild,
    adapter: useOf(fakeGeneration(3), 9),
  }),
  makeRequest({
    id: 'warm',
    tokens: range(33, 5),
    tokensMax: 80,
    adapter: useOf(fakeGeneration(4), 5),
    sampling: {
      ...mild,
      temperature: 0.9,
      seed: 4242,
      repetitionPenalty: 1.2,
      frequencyPenalty: 0.3,
    },
  }),
  makeRequest({
    id: 'stopped',
    tokens: range(12, 9),
    tokensMax: 85,
    sampling: mild,
    stop: ['éé', 'q'],
  }),
];

describe('Supervisor: deaths', () => {
  afterEach(closeAll);

  it('two kills in the middle of four streams: every text goes on as if nothing had happened', async () => {
    const deaths: string[] = [];
    const engine = await start(
      {
        dieAtSteps: [
          { step: 9, signal: 'SIGKILL' },
          { step: 45, signal: 'SIGABRT' },
        ],
      },
      { onDeath: (why) => deaths.push(why) },
    );
    const answers = await Promise.all(mixed.map((one) => read(engine.submit(one, never))));
    for (const [i, request] of mixed.entries()) expectUndisturbed(answers[i]!, request);
    expect(deaths).toEqual(['signal SIGKILL', 'signal SIGABRT']);
    expect(engine.restarts).toBe(2);
    const end = answers[0]!.events.at(-1);
    if (end?.kind !== 'end') throw new Error('no end');
    expect(end.ttftMs).toBeLessThan(end.totalMs); // of all lives together, not of the last
    expect(end.totalMs).toBeGreaterThan(100); // a process was started in between
  });

  it('kill -9 from outside while a stream runs: a pause, and the adapter is loaded again', async () => {
    const engine = await start();
    const request = makeRequest({
      id: 'long',
      tokens: range(20, 1),
      tokensMax: 700,
      adapter: useOf(fakeGeneration(3), 9),
    });
    let runningAtKill = 0;
    const answer = await read(engine.submit(request, never), (_event, index) => {
      if (index !== 4) return;
      runningAtKill = engine.stats().running;
      process.kill(engine.pid!, 'SIGKILL');
    });
    expect(runningAtKill).toBe(1);
    expect(engine.restarts).toBe(1);
    expectUndisturbed(answer, request);
    expect(engine.stats().residents.map((one) => one.generation)).toEqual([fakeGeneration(3)]);
  });

  it('a blend goes on after a death with all its parts, and pins are told to every life', async () => {
    const engine = await start();
    engine.pin([fakeGeneration(2)]);
    const request = makeRequest({
      id: 'blend',
      tokens: range(20, 1),
      tokensMax: 400,
      adapter: blendOf(
        [
          [fakeGeneration(3), 9, 0.5],
          [fakeGeneration(2), 15, -1],
        ],
        { system: { generation: fakeGeneration(1), rank: 4, weight: 1 } },
      ),
    });
    const answer = await read(engine.submit(request, never), (_event, index) => {
      if (index === 4) process.kill(engine.pid!, 'SIGKILL');
    });
    expect(engine.restarts).toBe(1);
    expectUndisturbed(answer, request);
    const resident = () => engine.stats().residents.map((one) => one.generation);
    expect(new Set(resident())).toEqual(new Set([1, 2, 3].map(fakeGeneration)));
    // Eleven pages: the next two take nine of them, and only what is pinned stays beside.
    for (const n of [5, 10]) {
      const whole = useOf(fakeGeneration(n), fakeRankOf(fakeGeneration(n)));
      await read(engine.submit(makeRequest({ id: `takes ${n}`, adapter: whole }), never));
    }
    expect(new Set(resident())).toEqual(new Set([2, 5, 10].map(fakeGeneration)));
  });

  it('a poison request is refused after its second death; those beside it go on', async () => {
    const engine = await start({ poisonToken: 63 });
    const poison = makeRequest({
      id: 'poison',
      tokens: Int32Array.of(1, 2, 63, 4),
      sampling: mild,
    });
    const streams = [...mixed.slice(0, 2), poison, ...mixed.slice(2)].map((one) =>
      read(engine.submit(one, never)),
    );
    const [first, second, poisoned, third, fourth] = await Promise.all(streams);
    expect(poisoned).toMatchObject({ code: 'ENGINE_POISONED', ids: [] });
    for (const [i, answer] of [first!, second!, third!, fourth!].entries()) {
      expectUndisturbed(answer, mixed[i]!);
    }
    expect(engine.restarts).toBe(2);
  });

  it('a hang is a death: the stopped process is killed and the stream goes on', async () => {
    const deaths: string[] = [];
    const engine = await start(
      { dieAtSteps: [{ step: 7, signal: 'SIGSTOP' }] },
      { silenceMsMax: 1500, onDeath: (why) => deaths.push(why) },
    );
    expectUndisturbed(await read(engine.submit(mixed[1]!, never)), mixed[1]!);
    expect(deaths).toHaveLength(1);
    expect(deaths[0]).toMatch(/^silent for \d+ ms$/);
  });

  it('only deaths and nothing produced: down, refusing, and back when it works again', async () => {
    const engine = await start({ poisonToken: 63 }, { backoffMsMax: 400 });
    const codes: Array<string | null> = [];
    for (const id of ['a', 'b', 'c']) {
      const tokens = Int32Array.of(1, 63);
      codes.push((await read(engine.submit(makeRequest({ id, tokens }), never))).code);
    }
    // Two deaths each for the first two, and the fifth death is a loop.
    expect(codes).toEqual(['ENGINE_POISONED', 'ENGINE_POISONED', 'NO_CAPACITY']);
    expect(engine.isReady()).toBe(false);
    expect((await read(engine.submit(mixed[0]!, never))).code).toBe('NO_CAPACITY');
    await until(() => engine.isReady(), 'ready again');
    expectUndisturbed(await read(engine.submit(mixed[0]!, never)), mixed[0]!);
  });

  it('an engine that refuses its configuration fails the start with its reason', async () => {
    await expect(start({ refuse: true })).rejects.toMatchObject({ code: 'INVALID_MODEL_FILE' });
  });

  it('an engine that never becomes ready is killed', async () => {
    const deaths: string[] = [];
    const starting = start(
      { neverReady: true },
      {
        readyMsMax: 300,
        backoffMsMin: 60_000,
        backoffMsMax: 60_000,
        onDeath: (why) => deaths.push(why),
      },
    );
    const failed = expect(starting).rejects.toMatchObject({ code: 'NO_CAPACITY' });
    await until(() => deaths.length > 0, 'a death');
    expect(deaths).toEqual(['not ready within 300 ms']);
    await closeAll();
    await failed;
  });

  it('an engine that becomes ready and stops while the gateway closes is killed', async () => {
    const clock = {
      ...systemClock,
      after: (ms: number, callback: () => void) => systemClock.after(ms / 2, callback),
    };
    const starting = start({ stopWhenReady: true }, { clock, readyMsMax: 1e6, silenceMsMax: 1e9 });
    const failed = expect(starting).rejects.toMatchObject({ code: 'NO_CAPACITY' });
    await closeAll();
    await failed;
  });

  it('a gateway that is killed takes its engine with it', async () => {
    const parent = fork(fileURLToPath(entryUrl(import.meta.url, '../../support/orphan-parent')), {
      execArgv: entryExecArgv(import.meta.url),
    });
    const pid = await new Promise<number>((resolve) =>
      parent.once('message', (m) => resolve(Number(m))),
    );
    expect(process.kill(pid, 0)).toBe(true);
    parent.kill('SIGKILL');
    const isAlive = (): boolean => {
      try {
        return process.kill(pid, 0);
      } catch {
        return false;
      }
    };
    await until(() => !isAlive(), 'the end of the engine');
  });
});

describe('Supervisor: a living engine', () => {
  let engine: Supervisor;
  beforeAll(async () => {
    // More than one read of the channel brings at once: no reader could keep up with less.
    engine = await start({}, { eventsMax: 400 });
  });

  const isIdle = (): boolean => {
    const { running, waiting, kvCellsUsed, residents } = engine.stats();
    return running + waiting + kvCellsUsed === 0 && residents.every((one) => one.uses === 0);
  };

  it('unloads', async () => {
    const adapter = useOf(fakeGeneration(5), 1);
    await read(engine.submit(makeRequest({ id: 'loads', adapter }), never));
    await until(() => engine.stats().residents.length === 1, 'residency in the figures');
    engine.unload(fakeGeneration(5));
    await until(() => engine.stats().residents.length === 0, 'unloaded');
    // Its file stays in the engine's memory, which the engine says once.
    expect(engine.stats().hosted).toContain(fakeGeneration(5));
  });

  it('aborts before the first token, during prefill and during decode; all is given back', async () => {
    const request = makeRequest({
      id: 'gone',
      tokens: range(300, 2),
      tokensMax: 600,
      adapter: useOf(fakeGeneration(3), 9),
    });
    for (const after of [0, 1, 2, 20]) {
      const controller = new AbortController();
      const stream = engine.submit(request, controller.signal);
      if (after === 0) controller.abort();
      const answer = await read(stream, (_event, index) => {
        if (index === after) controller.abort();
      });
      expect(answer.code).toBe('CANCELLED');
      expect(answer.events).toHaveLength(after);
      await until(isIdle, `idle after an abort at event ${after}`);
    }
    const early = new AbortController();
    early.abort();
    expect((await read(engine.submit(request, early.signal))).code).toBe('CANCELLED');
    expect(isIdle()).toBe(true);
  });

  it('a reader that leaves by break cancels', async () => {
    const request = makeRequest({ id: 'left', tokens: range(10, 2), tokensMax: 900 });
    for await (const event of engine.submit(request, never)) if (event.kind === 'piece') break;
    await until(isIdle, 'idle after a break');
  });

  it('a reader that stops reading loses its stream, and nobody else theirs', async () => {
    const stalled = engine.submit(makeRequest({ id: 'stalled', tokensMax: 900 }), never);
    const beside = makeRequest({ id: 'beside', tokens: range(30, 4), tokensMax: 200 });
    expectUndisturbed(await read(engine.submit(beside, never)), beside);
    await until(isIdle, 'the stalled one is cancelled');
    expect(await read(stalled)).toMatchObject({ code: 'CANCELLED', events: [] });
  });

  it('an id used again at once is another request', async () => {
    for (let i = 0; i < 5; i++) {
      const request = makeRequest({ id: 'same', tokens: range(20, i), tokensMax: 60 });
      for await (const event of engine.submit(request, never)) if (event.kind === 'piece') break;
    }
    const request = makeRequest({ id: 'same', tokens: range(20, 5), tokensMax: 60 });
    expectUndisturbed(await read(engine.submit(request, never)), request);
  });

  it('passes the engine’s refusals on', async () => {
    const long = makeRequest({ id: 'long', tokens: range(500, 0), tokensMax: 600 });
    expect((await read(engine.submit(long, never))).code).toBe('CONTEXT_LENGTH_EXCEEDED');
  });

  it('reports steps and the time of the last token', async () => {
    let rows = 0;
    const stop = engine.onStep((report) => {
      rows += report.decodeRows;
    });
    await read(engine.submit(makeRequest({ id: 'r', tokensMax: 10 }), never));
    await until(() => rows === 9, 'nine decode rows: the first token is the prompt’s');
    stop();
    expect(performance.now() - engine.lastTokenAtMs()!).toBeLessThan(20_000);
  });

  it('close lets what runs finish and takes nothing new', async () => {
    const request = makeRequest({ id: 'last', tokens: range(10, 8), tokensMax: 50 });
    const answer = read(engine.submit(request, never));
    const { pid } = engine;
    const closing = engine.close();
    expect((await read(engine.submit(makeRequest({ id: 'late' }), never))).code).toBe(
      'NO_CAPACITY',
    );
    expectUndisturbed(await answer, request);
    await closing;
    expect(engine.isReady()).toBe(false);
    expect(() => process.kill(pid!, 0)).toThrow();
  });
});
