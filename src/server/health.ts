// Probes and the metrics page. /livez says that the event loop turns. /readyz says that a request sent now would be
// answered: nothing is draining, the registry reads, and the engine gave a token lately; when the last one is old and
// nothing runs, one token is made to find out (at most one such try at a time, and none while requests prove it).

import type { ServerDeps } from './deps.ts';
import type { Route } from './env.ts';

/** How long the self-made token may take before the answer is "not ready": probes give up after seconds. A guess. */
const selfCheckMsMax = 2000;

export function healthRoutes(deps: ServerDeps): readonly Route[] {
  const readiness = new Readiness(deps);
  return [
    {
      method: 'GET',
      path: '/livez',
      access: 'public',
      handle: (c) => c.json({ status: 'ok' }),
    },
    {
      method: 'GET',
      path: '/readyz',
      access: 'public',
      async handle(c) {
        const reason = await readiness.reasonNotReady();
        if (reason === null) return c.json({ status: 'ready' });
        c.header('retry-after', '1');
        return c.json({ status: 'not ready', reason }, 503);
      },
    },
    {
      method: 'GET',
      path: '/metrics',
      access: deps.config.metricsPublic ? 'public' : 'inference',
      handle(c) {
        c.header('content-type', 'text/plain; version=0.0.4; charset=utf-8');
        return c.body(deps.metrics());
      },
    },
  ];
}

type NotReady = 'draining' | 'engine not ready' | 'registry closed' | 'engine stalled';

class Readiness {
  readonly #deps: ServerDeps;
  #check: Promise<boolean> | null = null;

  constructor(deps: ServerDeps) {
    this.#deps = deps;
  }

  async reasonNotReady(): Promise<NotReady | null> {
    const deps = this.#deps;
    if (deps.lifecycle.isDraining) return 'draining';
    if (!deps.engine.isReady()) return 'engine not ready';
    try {
      deps.registry.list();
    } catch {
      return 'registry closed';
    }
    if (this.#hasFreshToken()) return null;
    // While requests are in the engine, their tokens are the proof or its absence; one more would only queue behind them.
    if (deps.inFlight.count > 0) return 'engine stalled';
    this.#check ??= this.#makeToken().finally(() => {
      this.#check = null;
    });
    return (await this.#check) ? null : 'engine stalled';
  }

  #hasFreshToken(): boolean {
    const deps = this.#deps;
    const lastMs = deps.engine.lastTokenAtMs();
    return lastMs !== null && deps.clock.nowMs() - lastMs <= deps.config.tokenAgeMsMax;
  }

  async #makeToken(): Promise<boolean> {
    const { engine, clock, random, config } = this.#deps;
    const controller = new AbortController();
    const cancel = clock.after(selfCheckMsMax, () => controller.abort());
    const request = {
      id: `ready-${random.id()}`,
      tokens: Int32Array.of(engine.base.endTokens[0] ?? 0),
      tokensMax: 1,
      sampling: greedy,
      stop: [],
      topLogprobs: null,
      adapter: null,
      tenant: `self-check/${config.modelName}`,
    };
    try {
      for await (const event of engine.submit(request, controller.signal)) {
        if (event.kind === 'end') return true;
      }
      return false;
    } catch {
      return false;
    } finally {
      cancel();
    }
  }
}

const greedy = {
  temperature: 0,
  topP: 1,
  topK: 0,
  minP: 0,
  seed: 0,
  presencePenalty: 0,
  frequencyPenalty: 0,
  repetitionPenalty: 1,
  logitBias: [],
} as const;
