// Probes and the metrics page. /livez says that the event loop turns. /readyz says that a request sent now would be
// answered: nothing is draining, the registry reads, and the engine gave a token lately; when the last one is old and
// nothing runs, one token is made to find out (at most one such try at a time, and none while requests prove it).

import type { Context } from 'hono';
import type { Engine } from '../engine/engine.ts';
import { noUrgency, type Sampling } from '../engine/messages.ts';
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
  return async function readyz(c, deps) {
    let reason = reasonNotReady(deps);
    // While requests are in the engine, their tokens are the proof or its absence; one more would only queue behind them.
    if (reason === 'engine stalled' && deps.inFlight.count === 0) {
      check ??= makeToken(deps).finally(() => {
        check = null;
      });
      if (await check) reason = null;
    }
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

async function makeToken({ engine, clock, random }: ServerDeps): Promise<boolean> {
  const controller = new AbortController();
  const cancel = clock.after(selfCheckMsMax, () => controller.abort());
  const tokens = Int32Array.of(engine.base.endTokens[0] ?? 0);
  const probe = { id: `ready-${random.id()}`, tokens, tokensMax: 1 };
  try {
    return await probeEngine(engine, probe, controller.signal);
  } finally {
    cancel();
  }
}

/** One answer that nobody asked for, on the base model. False when it failed. */
export async function probeEngine(
  engine: Engine,
  probe: { readonly id: string; readonly tokens: Int32Array; readonly tokensMax: number },
  signal: AbortSignal,
): Promise<boolean> {
  const rest = {
    ...{ sampling: greedy, stop: [], topLogprobs: null, adapter: null },
    ...{ tenant: 'probe', urgency: noUrgency },
  };
  try {
    for await (const event of engine.submit({ ...probe, ...rest }, signal)) {
      if (event.kind === 'end') return true;
    }
  } catch {
    // The supervisor has restarted the engine or says so to the next request.
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
