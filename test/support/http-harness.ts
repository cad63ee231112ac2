import { deepStrictEqual } from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { getEventListeners } from 'node:events';
import type { Generation } from '../../src/adapters/adapter.ts';
import { GatewayError } from '../../src/errors.ts';
import { Archive } from '../../src/router/archive.ts';
import { ArchiveScores } from '../../src/router/archive-scores.ts';
import type { FinishedAnswer } from '../../src/router/latency-model.ts';
import type { Outcome, Plan, RouteInput } from '../../src/router/policy.ts';
import { type App, createApp } from '../../src/server/app.ts';
import type { ArchiveDeps } from '../../src/server/archive.ts';
import type { ApiKey } from '../../src/server/auth.ts';
import type { ServerConfig, Training } from '../../src/server/deps.ts';
import { InFlight } from '../../src/server/in-flight.ts';
import { createLifecycle, type SettableLifecycle } from '../../src/server/listen.ts';
import { createMetrics } from '../../src/server/metrics.ts';
import { FakeImporter, FakeRegistry, fakeGeneration, fakeManifest } from './fake-registry.ts';
import { FakeText } from './fake-text.ts';
import { createManualClock, type ManualClock } from './manual-clock.ts';
import { echoScript, ScriptedEngine } from './scripted-engine.ts';

export const generationA: Generation = fakeGeneration('a1');
export const generationB: Generation = fakeGeneration('b2');

export const keyPlain = { inference: 'sk-inference', admin: 'sk-admin' } as const;
const keyOf = (text: string, access: ApiKey['access'], tenant: string | null): ApiKey => ({
  digest: createHash('sha256').update(text).digest(),
  access,
  tenant,
});
export const apiKeys: readonly ApiKey[] = [
  keyOf(keyPlain.inference, 'inference', null),
  keyOf(keyPlain.admin, 'admin', null),
];

/** The operator's and two tenants', each by the name that it is given as. */
export const tenantKeys: readonly ApiKey[] = [
  keyOf('operator', 'admin', null),
  keyOf('plain', 'inference', null),
  keyOf('acme-admin', 'admin', 'acme'),
  keyOf('acme-use', 'inference', 'acme'),
  keyOf('rival-admin', 'admin', 'rival'),
];

const noTimes = { totalMs: null, ttftMs: null, perTokenMs: null };

const configDefault: ServerConfig = {
  modelName: 'tiny-base',
  tiers: {
    instant: { ...noTimes, totalMs: 300, strict: false, rankMin: 0, priority: 8 },
    quality: { ...noTimes, strict: false, rankMin: 0, priority: 2 },
  },
  latencyDefaults: { ...noTimes, strict: false, rankMin: 0, priority: 5 },
  startedS: 1_700_000_000,
  apiKeys: [],
  metricsPublic: false,
  hostsAllowed: [],
  bodyBytesMax: 256 * 1024,
  uploadBytesMax: 64 * 1024,
  uploadMsMax: 60_000,
  uploadsMax: 4,
  fileBytesMax: 64 * 1024,
  queueRequestsMax: 256,
  hubUrl: null,
  hubToken: null,
  uploadRoot: '/nowhere/uploads',
  chatTokensDefault: 512,
  completionTokensDefault: 16,
  pingMs: 5000,
  stallMsMax: 30_000,
  tokenAgeMsMax: 60_000,
  adaptersRoot: '/nowhere/at/all',
  runtimeLoraUpdating: false,
  systemAdapter: null,
};

export interface Harness {
  readonly app: App;
  readonly engine: ScriptedEngine;
  readonly registry: FakeRegistry;
  readonly importer: FakeImporter;
  readonly text: FakeText;
  readonly clock: ManualClock;
  readonly lifecycle: SettableLifecycle;
  readonly inFlight: InFlight;
  readonly logs: string[];
  readonly outcomes: FinishedAnswer[];
  readonly routed: RouteInput[];
  readonly judged: Outcome[];
  /** `failure`: what its next saves reject with. */
  readonly archive: ArchiveDeps & { saves: number; failure: GatewayError | null };
  fetch(method: string, path: string, options?: FetchOptions): Promise<Response>;
  /** With the key `who`. */
  call(who: string, method: string, path: string, sending?: Sending): Promise<Answer>;
  post(path: string, body: unknown, headers?: Record<string, string>): Promise<Response>;
  leftovers(): object;
  /** Throws when anything of a request is left behind. */
  close(): void;
}

export interface FetchOptions {
  readonly headers?: Record<string, string>;
  readonly body?: string | Uint8Array | ReadableStream;
  readonly signal?: AbortSignal;
  /** The socket's peer; a loopback address unless told. null: no socket at all. */
  readonly peer?: string | null;
}

export interface Sending {
  /** A form and a text as they are, anything else as JSON. */
  readonly body?: unknown;
  readonly headers?: Record<string, string>;
}

export interface Answer {
  readonly status: number;
  readonly headers: Headers;
  /** Parsed where it is JSON, else the text. */
  readonly body: Json;
}

/** The real app over fakes. The policy is a table: rank 4 with a total budget, every rank without, or the fixed one. */
export function createHarness(
  config: Partial<ServerConfig> = {},
  training: (Training & { readonly registry: FakeRegistry }) | null = null,
): Harness {
  const clock = createManualClock();
  const registry = training?.registry ?? new FakeRegistry();
  registry.store(generationA, fakeManifest(16), 1234);
  registry.store(generationB, fakeManifest(8), 999);
  registry.create('support', generationA);
  const importer = new FakeImporter(registry, {
    generation: generationB,
    manifest: fakeManifest(8),
    bytes: 999,
    warnings: [],
  });
  const engine = new ScriptedEngine(echoScript);
  const text = new FakeText();
  const lifecycle = createLifecycle();
  const inFlight = new InFlight();
  const logs: string[] = [];
  const outcomes: FinishedAnswer[] = [];
  const routed: RouteInput[] = [];
  const judged: Outcome[] = [];
  const archive: Harness['archive'] = {
    map: new Archive(),
    scores: new ArchiveScores(),
    saves: 0,
    failure: null,
    async save() {
      if (archive.failure !== null) throw archive.failure;
      archive.saves += 1;
    },
  };
  let ids = 0;
  const whole: ServerConfig = { ...configDefault, ...config };
  const { modelName } = whole;
  const metrics = createMetrics({ engine, registry, inFlight, clock, modelName, training });
  const app = createApp({
    engine,
    text,
    registry,
    importer,
    router: {
      route(input) {
        routed.push(input);
        return tablePlan(input);
      },
      settle: (outcome) => void outcomes.push(outcome),
      judge: (outcome) => void judged.push(outcome),
      retryAfterS: ({ waiting }) => 3 + waiting,
      tokensLikely: ({ tokensMax }) => tokensMax,
    },
    inFlight,
    archive,
    training,
    config: whole,
    clock,
    random: { id: () => `id${++ids}`, seed: () => 77 },
    lifecycle,
    metrics: (sees) => metrics.render(sees),
    log: (line) => void logs.push(line),
  });
  const fetch: Harness['fetch'] = async (method, path, options = {}) => {
    const peer = options.peer === undefined ? '127.0.0.1' : options.peer;
    const init: RequestInit = { method, duplex: 'half' };
    if (options.headers !== undefined) init.headers = options.headers;
    if (options.body !== undefined) init.body = options.body;
    if (options.signal !== undefined) init.signal = options.signal;
    const bindings = peer === null ? {} : { incoming: { socket: { remoteAddress: peer } } };
    return app.hono.request(new URL(path, 'http://localhost').href, init, bindings as never);
  };
  const leftovers = (): object => ({
    live: engine.live,
    leases: registry.leasesOpen,
    flying: inFlight.count,
    timers: clock.pending(),
    listeners: getEventListeners(lifecycle.cutOff, 'abort').length,
  });
  return {
    app,
    engine,
    registry,
    importer,
    text,
    clock,
    lifecycle,
    inFlight,
    logs,
    outcomes,
    routed,
    judged,
    archive,
    fetch,
    call: async (who, method, path, { body, headers = {} } = {}) => {
      const sent = await encode(body);
      const response = await fetch(method, path, {
        headers: { authorization: `Bearer ${who}`, 'content-type': sent.type, ...headers },
        ...(sent.bytes === null ? {} : { body: sent.bytes }),
      });
      const text = await response.text();
      const isJson = /^application\/json(?:;|$)/.test(response.headers.get('content-type') ?? '');
      const { status } = response;
      return { status, headers: response.headers, body: isJson ? JSON.parse(text) : text };
    },
    post: (path, body, headers = {}) =>
      fetch('POST', path, {
        headers: { 'content-type': 'application/json', ...headers },
        body: typeof body === 'string' ? body : JSON.stringify(body),
      }),
    leftovers,
    close() {
      metrics.close();
      deepStrictEqual(leftovers(), nothingLeft);
    },
  };
}

async function encode(body: unknown): Promise<{ type: string; bytes: Uint8Array | null }> {
  const isRaw = typeof body === 'string' || body instanceof FormData;
  if (body === undefined) return { type: 'application/json', bytes: null };
  const encoded = isRaw ? new Response(body) : Response.json(body);
  const bytes = new Uint8Array(await encoded.arrayBuffer());
  return { type: encoded.headers.get('content-type')!, bytes };
}

export const nothingLeft = { live: 0, leases: 0, flying: 0, timers: 0, listeners: 0 };

function tablePlan({ budget, adapter, system }: RouteInput): Plan {
  const rankMax = adapter?.rankMax ?? 0;
  const prediction = {
    totalMs: 120.5,
    sigmaMs: 2,
    ttftMs: 20,
    ttftSigmaMs: 1,
    perTokenMs: 10,
    perTokenSigmaMs: 1,
  };
  const at = (rank: number, hasSystem: boolean) => {
    const ranks = (adapter?.ranks[rank - 1] ?? 0) + (hasSystem ? (system?.ranks ?? 0) : 0);
    return { rank, rankMax, hasSystem, ranks, prediction };
  };
  const hasSystem = system !== null;
  if (adapter === null) return { ...at(0, hasSystem), reason: 'base' };
  if (budget.rank !== null) return { ...at(budget.rank, hasSystem), reason: 'fixed' };
  if (budget.totalMs === null) return { ...at(rankMax, hasSystem), reason: 'full' };
  if (budget.strict && budget.totalMs < 10) {
    throw new GatewayError('DEADLINE_TOO_SHORT', 'even rank 0 takes longer');
  }
  return { ...at(4, false), reason: 'reduced' };
}

/** Bodies are probed by path: a wrong path gives undefined, which no expectation accepts. */
// biome-ignore lint/suspicious/noExplicitAny: a parsed body has no type but the one that the test asserts.
export type Json = any;

/** The frames of an SSE body: `data:` payloads parsed as JSON where they are, comments as `:text`. */
export function parseFrames(body: string): Json[] {
  return body
    .split('\n\n')
    .filter((frame) => frame !== '')
    .map((frame) => {
      if (frame.startsWith(':')) return frame;
      const payload = frame.replace(/^data: /, '');
      return payload === '[DONE]' ? payload : JSON.parse(payload);
    });
}

/** Lets everything that is ready run: microtasks and one turn of the loop, several times. Not a wait for time. */
export async function settleTasks(): Promise<void> {
  for (let i = 0; i < 20; i++) await new Promise((resolve) => setImmediate(resolve));
}
