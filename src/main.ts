// Composition root: configuration and a verified model file → registry, engine process, text thread, router, HTTP server,
// in that order; and the drain, in the reverse order. Every other file gets what it needs as arguments; this one knows
// which implementation stands behind each contract.

import { randomInt, randomUUID } from 'node:crypto';
import { mkdirSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { baseNamesOf } from './adapters/base-name.ts';
import { createBlobStore } from './adapters/blobs.ts';
import { createImporter } from './adapters/importer.ts';
import type { Importer, Registry } from './adapters/registry.ts';
import { openSqlRegistry } from './adapters/sql-registry.ts';
import { publish } from './channels.ts';
import { backendEnvironment, type Config, childEnvironment } from './config.ts';
import { systemClock } from './engine/clock.ts';
import { contextMaxOf } from './engine/kv-pool.ts';
import type { EngineConfig } from './engine/open-loop.ts';
import { Supervisor } from './engine/supervisor.ts';
import type { TextService } from './engine/text.ts';
import { createTextService } from './engine/text-service.ts';
import { openArchive } from './kept-archive.ts';
import { readDecoderConfig } from './model/decoder-config.ts';
import { writeFileDurably } from './model/file-hash.ts';
import { openGguf } from './model/gguf.ts';
import { type ModelFile, modelNameOf } from './model/model-source.ts';
import { entryExecArgv, entryUrl } from './model/spawn-entry.ts';
import { startPrewarming } from './prewarm.ts';
import { createPolicy } from './router/create-policy.ts';
import { Router } from './router/router.ts';
import { createApp } from './server/app.ts';
import type { ArchiveDeps } from './server/archive.ts';
import type { Clock } from './server/deps.ts';
import { probeEngine } from './server/health.ts';
import { InFlight } from './server/in-flight.ts';
import { createLifecycle, type Listening, listen } from './server/listen.ts';
import { createMetrics } from './server/metrics.ts';
import { type OpenedTraining, openTraining } from './training.ts';

export interface Gateway {
  readonly url: string;
  readonly modelName: string;
  /** For tests: the engine's process id, undefined while it restarts. */
  enginePid(): number | undefined;
  /** Drains within the configured grace, then ends the engine. Idempotent. */
  close(): Promise<void>;
}

// Guesses, generous for slow disks and machines: a start must not be taken for a hang.
const readyMsMax = 180_000;
const silenceMsMax = 60_000;
const flightsMax = 4096;
const eventsMax = 4096;
const saveMs = 60_000;
/** Between two times that the engine is told what steps cost. */
const costsMs = 1000;
/** glibc stops giving large blocks back once one was freed, and then keeps what loading leaves behind: 40 MB (measured).
 *  Named, the limit stays where it starts. Other C libraries do not read this.
 *  The engine makes few objects: V8's own limit for young ones (3 × 16 MB) costs 16 MB more, and no less time (measured). */
const mallocSettings = { MALLOC_MMAP_THRESHOLD_: '131072' };
/** Idle prefix-cache cells that one tenant may hold. */
const tenantShareMax = 0.5;

interface Paths {
  readonly uploads: string;
  readonly blobs: string;
  readonly cache: string;
  readonly registry: string;
  readonly latency: string;
  readonly archive: string;
}

function makePaths(config: Config): Paths {
  const at = (name: string): string => join(config.dataDir, name);
  mkdirSync(config.adaptersRoot, { recursive: true });
  mkdirSync(at('blobs'), { recursive: true });
  return {
    uploads: at('uploads'),
    blobs: at('blobs'),
    cache: at('cache'),
    registry: at('registry.sqlite'),
    latency: at('latency.json'),
    archive: at('archive.json'),
  };
}

async function startEngine(config: Config, model: ModelFile, paths: Paths): Promise<Supervisor> {
  const engineConfig: EngineConfig = {
    modelPath: model.path,
    modelHash: model.sha256,
    weights: config.weights,
    backend: config.backend,
    threads: config.threads,
    device: config.device,
    libraryDirectory: null,
    cacheDirectory: paths.cache,
    blobDirectory: paths.blobs,
    cells: config.kvCells,
    pages: config.adapterPages,
    hostBytesMax: config.hostBytesMax,
    tokensMax: config.stepTokensMax,
    segmentsMax: config.stepRowsMax,
    limits: {
      waitingMax: config.queueRequestsMax,
      waitingTokensMax: config.queuePromptTokensMax,
      waitingMsMax: config.queueMsMax,
      prefillTokensMax: config.prefillTokensMax,
    },
    tenantShareMax,
    speculation: config.speculation,
  };
  const supervisor = new Supervisor({
    entry: entryUrl(import.meta.url, './engine/engine-process'),
    execArgv: ['--max-semi-space-size=2', ...entryExecArgv(import.meta.url)],
    argument: JSON.stringify(engineConfig),
    environment: {
      ...mallocSettings,
      ...backendEnvironment(config.backend, config.threads),
      ...childEnvironment(),
    },
    clock: systemClock,
    readyMsMax,
    silenceMsMax,
    backoffMsMin: 100,
    backoffMsMax: 10_000,
    flightsMax,
    eventsMax,
    drainMsMax: config.drainGraceMs,
    onDeath: (why) =>
      publish('engine-restart', { reason: why.startsWith('silent') ? 'hang' : why }),
  });
  await supervisor.start();
  return supervisor;
}

/** The names that an adapter's config may call this base by, and what the text thread must know before the engine is up. */
function readBase(model: ModelFile, cells: number): { names: string[]; contextMax: number } {
  using file = openGguf(model.path);
  const { metadata } = file;
  const names = baseNamesOf(model.label, metadata);
  return { names, contextMax: contextMaxOf(readDecoderConfig(file).contextLength, cells) };
}

function readIfThere(path: string): string | null {
  try {
    return readFileSync(path, 'utf8');
  } catch {
    return null;
  }
}

/** `isNew`: nothing was kept of what an earlier run learned. */
function startRouter(
  config: Config,
  engine: Supervisor,
  path: string,
): { router: Router; isNew: boolean } {
  const { hash: baseHash, backend } = engine.base;
  const identity = { baseHash, backend, threads: config.threads };
  const { prefillTokensMax, stepRowsMax: rowsMax } = config;
  const policy = createPolicy(config.rankPolicy);
  const draw = (): number => randomInt(2 ** 32) / 2 ** 32;
  const router = new Router({ identity, rowsMax, prefillTokensMax, policy, draw });
  const saved = readIfThere(path);
  const isNew = saved === null || !router.restore(saved);
  let sentMs = Number.NEGATIVE_INFINITY;
  engine.onStep((report) => {
    router.observe(report);
    const nowMs = systemClock.nowMs();
    if (nowMs - sentMs < costsMs) return;
    const { costs } = router;
    if (costs === null) return;
    sentMs = nowMs;
    engine.setCosts(costs);
  });
  return { router, isNew };
}

/** What cannot be kept is learned again: a full disk is no reason to stop serving or to close by halves. */
async function saveLatency(router: Router, path: string): Promise<void> {
  await writeFileDurably(path, router.save()).catch(() => {}); // the next save may have room
}

/** A first answer that nobody asked for: it records the programs that serving needs first and gives the latency model
 *  enough steps to predict by. Its failure is no reason not to serve. */
async function warmUp(engine: Supervisor): Promise<void> {
  const tokens = Int32Array.from({ length: 32 }, (_, i) => i % engine.base.config.vocabSize);
  await probeEngine(engine, { id: 'warm-up', tokens, tokensMax: 12 }, new AbortController().signal);
}

/** Goes on serving when whoever read the log has gone. */
function logToStdout(): (line: string) => void {
  process.stdout.on('error', () => {});
  return (line) => void process.stdout.write(`${line}\n`);
}

function logFailure({ log }: Config): (error: unknown) => void {
  const write = log === 'json' ? logToStdout() : () => {};
  return (error) => {
    const time = new Date().toISOString();
    const cause = error instanceof Error ? (error.stack ?? error.message) : String(error);
    write(JSON.stringify({ time, level: 'error', event: 'training-failure', cause }));
  };
}

interface Parts {
  readonly config: Config;
  readonly modelName: string;
  readonly engine: Supervisor;
  readonly text: TextService;
  readonly registry: Registry;
  readonly importer: Importer;
  readonly router: Router;
  readonly archive: ArchiveDeps;
  readonly uploadRoot: string;
  readonly training: OpenedTraining | null;
}

async function startServer(parts: Parts): Promise<{ listening: Listening; stop: () => void }> {
  const { config, modelName, engine, registry, router, archive } = parts;
  const clock: Clock = { ...systemClock, unixMs: () => Date.now() };
  const startedS = Math.floor(clock.unixMs() / 1000);
  const lifecycle = createLifecycle();
  const inFlight = new InFlight();
  const training = parts.training?.training ?? null;
  const metrics = createMetrics({ engine, registry, inFlight, clock, modelName, training });
  const app = createApp({
    engine,
    registry,
    inFlight,
    training,
    lifecycle,
    clock,
    text: parts.text,
    importer: parts.importer,
    router,
    archive,
    config: { ...config, modelName, startedS, uploadRoot: parts.uploadRoot },
    random: { id: () => randomUUID(), seed: () => randomInt(2 ** 32) },
    metrics: (sees) => metrics.render(sees),
    log: config.log === 'json' ? logToStdout() : () => {},
  });
  const { host, port, connectionsMax, keepAliveMs, uploadMsMax: requestMsMax } = config;
  const options = { host, port, connectionsMax, keepAliveMs, requestMsMax };
  const listening = await listen(app, lifecycle, options);
  const stopPrewarming =
    config.prefetch === 'off' ? null : startPrewarming({ engine, registry, inFlight, clock });
  const stop = (): void => {
    stopPrewarming?.();
    metrics.close();
  };
  return { listening, stop };
}

/** Resolves when requests are answered. Rejects, with everything stopped again, when a part cannot start. */
export async function startGateway(config: Config, model: ModelFile): Promise<Gateway> {
  const paths = makePaths(config);
  const closers: Array<() => Promise<void> | void> = [];
  const closeAll = async (): Promise<void> => {
    const failures: unknown[] = [];
    for (const close of closers.splice(0).reverse()) {
      try {
        await close();
      } catch (error) {
        failures.push(error); // The others hold processes and locks: they are closed all the same.
      }
    }
    if (failures.length > 0) throw failures[0];
  };
  try {
    const blobs = createBlobStore(paths.blobs);
    const nowS = (): number => Math.floor(Date.now() / 1000);
    const registry = openSqlRegistry({ path: paths.registry, blobs, nowS });
    closers.push(() => registry.close());
    // The registry is locked, so these are a crash's and nobody's.
    rmSync(paths.uploads, { recursive: true, force: true });
    const { names, contextMax } = readBase(model, config.kvCells);
    // Beside the engine's start: on its own it would take a third as long again.
    const textStart = createTextService({ modelPath: model.path, contextMax });
    const closeText = textStart.then((text) => () => text.close()).catch(() => () => {});
    closers.push(async () => (await closeText)());
    const engine = await startEngine(config, model, paths);
    closers.push(() => engine.close());
    engine.pin(registry.pinned());
    const text = await textStart;
    const { config: decoderConfig, hash } = engine.base;
    const base = { config: decoderConfig, hash, names };
    const importer = createImporter({
      base,
      registry,
      blobs,
      blobDirectory: paths.blobs,
      modelPath: model.path,
    });
    closers.push(() => importer.close());
    const { router, isNew } = startRouter(config, engine, paths.latency);
    const archive = openArchive(paths.archive, (message) => process.emitWarning(message));
    const saveArchive = (): Promise<void> => archive.save().catch(() => {}); // the next save may have room
    const saving = setInterval(() => {
      void saveLatency(router, paths.latency);
      void saveArchive();
    }, saveMs);
    saving.unref();
    closers.push(async () => {
      clearInterval(saving);
      await saveLatency(router, paths.latency);
      await saveArchive();
    });
    const warm = warmUp(engine);
    if (isNew) await warm; // what was learned before predicts well enough meanwhile
    const modelName = config.modelName ?? modelNameOf(model.label);
    const training =
      config.trainersMax === 0
        ? null
        : openTraining({
            config,
            model,
            engine,
            registry,
            importer,
            cacheDirectory: paths.cache,
            blobDirectory: paths.blobs,
            onFailure: logFailure(config),
          });
    closers.push(() => training?.close());
    const uploadRoot = paths.uploads;
    const parts = {
      ...{ config, modelName, engine, text, registry, importer, router, archive, uploadRoot },
    };
    const { listening, stop } = await startServer({ ...parts, training });
    closers.push(stop, () => listening.close(config.drainGraceMs));
    // Beside the drain: both take seconds.
    closers.push(() => void training?.close().catch(() => {}));
    const host = config.host.includes(':') ? `[${config.host}]` : config.host;
    const url = `http://${host === '0.0.0.0' ? '127.0.0.1' : host}:${listening.port}`;
    return { url, modelName, enginePid: () => engine.pid, close: closeAll };
  } catch (error) {
    await closeAll();
    throw error;
  }
}

/** The first signal drains, a second one ends the process at once. */
export function closeOnSignals(gateway: Gateway, onClosed: () => void): void {
  let isClosing = false;
  const stop = (): void => {
    if (isClosing) process.exit(1);
    isClosing = true;
    gateway.close().then(onClosed, () => process.exit(1));
  };
  process.on('SIGTERM', stop).on('SIGINT', stop);
}
