// Probes and the metrics page. /livez says that the event loop turns. /readyz says that a request sent now would be
// answered: nothing is draining, the registry reads, the engine gave a token lately, and what lies under every request, the
// system adapter, can be used. When the last token is old and nothing runs, one is made to find out (at most one such try at
// a time, and none while requests prove it).

import type { Context } from 'hono';
import type { Generation } from '../adapters/adapter.ts';
import type { AdapterRecord } from '../adapters/registry.ts';
import type { Engine } from '../engine/engine.ts';
import { type AdapterUse, noUrgency, type Sampling } from '../engine/messages.ts';
import { asGatewayError } from '../errors.ts';
import { systemRecord } from './blend.ts';
import type { ServerDeps } from './deps.ts';
import type { Env, Handle } from './env.ts';
import { isVisible } from './tenancy.ts';

/** How long the self-made token may take before the answer is "not ready": probes give up after seconds. A guess. */
const selfCheckMsMax = 2000;

export function livez(c: Context<Env>): Response {
  return c.json({ status: 'ok' });
}

export function metricsPage(c: Context<Env>, deps: ServerDeps): Response {
  c.header('content-type', 'text/plain; version=0.0.4; charset=utf-8');
  const caller = c.get('caller');
  return c.body(deps.metrics((name) => isVisible(name, caller)));
}

export function createReadyz(): Handle {
  let check: Promise<boolean> | null = null;
  const systemReason = createSystemCheck();
  return async function readyz(c, deps) {
    let reason = reasonNotReady(deps);
    // While requests are in the engine, their tokens are the proof or its absence; one more would only queue behind them.
    if (reason === 'engine stalled' && deps.inFlight.count === 0) {
      check ??= makeToken(deps).finally(() => {
        check = null;
      });
      if (await check) reason = null;
    }
    reason ??= systemReason(deps);
    if (reason === null) return c.json({ status: 'ready' });
    c.header('retry-after', '1');
    return c.json({ status: 'not ready', reason }, 503);
  };
}

function reasonNotReady(deps: ServerDeps): string | null {
  const { engine, clock, config } = deps;
  if (deps.lifecycle.isDraining) return 'draining';
  if (!engine.isReady()) return 'engine not ready';
  try {
    deps.registry.list();
  } catch {
    return 'registry closed';
  }
  const lastMs = engine.lastTokenAtMs() ?? Number.NEGATIVE_INFINITY;
  return clock.nowMs() - lastMs <= config.tokenAgeMsMax ? null : 'engine stalled';
}

/** Why the configured system adapter would fail requests. What its name points at is proved by a token of the base under it; a
 *  look at what is not proved yet starts a try, one at a time. Until another generation has failed, the proof of the one
 *  before it counts: a swap is no reason to send requests elsewhere. */
function createSystemCheck(): (deps: ServerDeps) => string | null {
  let proved: Generation | null = null;
  let failure: string | null = null;
  let isTrying = false;
  const prove = async (deps: ServerDeps, record: AdapterRecord): Promise<void> => {
    try {
      await makeSystemToken(deps, record);
      proved = record.generation;
      failure = null;
    } catch (error) {
      const { code } = asGatewayError(error);
      const isBusy = code === 'CONTENDED' || code === 'NO_CAPACITY';
      if (!isBusy) failure = `system adapter cannot be used: ${code}`;
    } finally {
      isTrying = false;
    }
  };
  return (deps) => {
    const { systemAdapter } = deps.config;
    if (systemAdapter === null) return null;
    const record = systemRecord(systemAdapter, deps.registry);
    if (record === null) return 'system adapter missing';
    if (record.generation === proved) return null;
    if (!isTrying) {
      isTrying = true;
      void prove(deps, record);
    }
    return failure ?? (proved === null ? 'system adapter loading' : null);
  };
}

async function makeSystemToken(
  { engine, registry, random }: ServerDeps,
  { name, generation, manifest }: AdapterRecord,
): Promise<void> {
  using lease = registry.lease(`${name}@${generation}`);
  const system = { generation: lease.generation, rank: manifest.rankMax, weight: 1 };
  const rest = { merge: 'linear', density: 1, flyTopK: null, prior: null } as const;
  const probe = { id: `ready-${random.id()}`, tokens: probeTokens(engine), tokensMax: 1 };
  await generate(engine, { ...probe, adapter: { parts: [], ...rest, system } });
}

const probeTokens = ({ base }: Engine): Int32Array => Int32Array.of(base.endTokens[0] ?? 0);

async function makeToken({ engine, clock, random }: ServerDeps): Promise<boolean> {
  const controller = new AbortController();
  const cancel = clock.after(selfCheckMsMax, () => controller.abort());
  const probe = { id: `ready-${random.id()}`, tokens: probeTokens(engine), tokensMax: 1 };
  try {
    return await probeEngine(engine, probe, controller.signal);
  } finally {
    cancel();
  }
}

/** One answer that nobody asked for, on the base model. False when it failed. */
export async function probeEngine(
  engine: Engine,
  probe: Probe,
  signal: AbortSignal,
): Promise<boolean> {
  try {
    return await generate(engine, { ...probe, adapter: null }, signal);
  } catch {
    // The supervisor has restarted the engine or says so to the next request.
    return false;
  }
}

interface Probe {
  readonly id: string;
  readonly tokens: Int32Array;
  readonly tokensMax: number;
}

/** Whether the answer came to its end. Throws what the engine does. */
async function generate(
  engine: Engine,
  probe: Probe & { readonly adapter: AdapterUse | null },
  signal: AbortSignal = new AbortController().signal,
): Promise<boolean> {
  const rest = {
    ...{ sampling: greedy, stop: [], topLogprobs: null },
    ...{ tenant: 'probe', urgency: noUrgency },
  };
  for await (const event of engine.submit({ ...probe, ...rest }, signal)) {
    if (event.kind === 'end') return true;
  }
  return false;
}

const greedy: Sampling = {
  temperature: 0,
  topP: 1,
  topK: 0,
  minP: 0,
  seed: 0,
  presencePenalty: 0,
  frequencyPenalty: 0,
  repetitionPenalty: 1,
  logitBias: [],
};
