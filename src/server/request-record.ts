// What is remembered of one HTTP request until it is over: then one JSON line in the log and one event on the channel, no
// more, whichever of success, failure, cut-off and disconnect comes first. Nothing a client wrote freely is logged.

import { type InferenceReport, publish, type RequestEnd } from '../channels.ts';
import type { ServerDeps } from './deps.ts';
import { problemOf } from './problem.ts';

export class RequestRecord {
  readonly id: string;
  readonly method: string;
  readonly receivedMs: number;
  route = 'unknown';
  tenant: string | null = null;
  tier: string | null = null;
  /** True once the answer is a stream, whose end is not the handler's return. */
  isStream = false;
  /** Asked at the end, when the figures are complete. */
  report: (() => InferenceReport) | null = null;
  readonly #deps: Pick<ServerDeps, 'clock' | 'log'>;
  #isFinished = false;
  #thrown: unknown = null;

  constructor(id: string, method: string, deps: Pick<ServerDeps, 'clock' | 'log'>) {
    this.id = id;
    this.method = method;
    this.receivedMs = deps.clock.nowMs();
    this.#deps = deps;
  }

  fail(thrown: unknown): void {
    this.#thrown ??= thrown;
  }

  finish(status: number): void {
    if (this.#isFinished) return;
    this.#isFinished = true;
    const end: RequestEnd = {
      requestId: this.id,
      method: this.method,
      route: this.route,
      status,
      code: this.#thrown === null ? null : problemOf(this.#thrown).error.code,
      stream: this.isStream,
      tenant: this.tenant,
      durationMs: this.#deps.clock.nowMs() - this.receivedMs,
      tier: this.tier,
      inference: this.report?.() ?? null,
    };
    publish('request-end', end);
    this.#deps.log(JSON.stringify(this.#line(end)));
  }

  #line(end: RequestEnd): object {
    const { inference, ...rest } = end;
    const isOurs = end.status >= 500 && this.#thrown !== null;
    return {
      time: new Date(this.#deps.clock.unixMs()).toISOString(),
      level: end.status >= 500 ? 'error' : 'info',
      event: 'request-end',
      ...rest,
      ...inference,
      // The operator's copy of what the client is not told.
      ...(isOurs ? { cause: causeOf(this.#thrown) } : {}),
    };
  }
}

function causeOf(thrown: unknown): string {
  const parts: string[] = [];
  let error: unknown = thrown;
  for (let depth = 0; error instanceof Error && depth < 4; depth++) {
    parts.push(error.stack ?? `${error.name}: ${error.message}`);
    error = error.cause;
  }
  return parts.join('\ncaused by ').slice(0, 4096);
}
