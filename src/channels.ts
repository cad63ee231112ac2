// The only instrumentation that core code does: plain objects published on node:diagnostics_channel. Who listens
// (metrics, later an OpenTelemetry exporter) is not the publisher's business. Payloads carry no prompt text and no keys.

import { channel, subscribe, unsubscribe } from 'node:diagnostics_channel';

/** How one answer was planned and what became of it. Milliseconds are the gateway's, from the arrival of the request. */
export interface InferenceReport {
  /** The adapter's name, null for the base model. */
  readonly adapter: string | null;
  readonly generation: string | null;
  readonly rank: number;
  readonly rankMax: number;
  /** Over the tokens that were made; null until a sequence has ended. */
  readonly rankMean: number | null;
  readonly reason: string;
  /** Predicted total time from the moment of the plan; null while nothing was learned. */
  readonly predictedMs: number | null;
  /** What that prediction is to be compared with; null when the answer is not complete. */
  readonly plannedToEndMs: number | null;
  /** null when no time was stated, or the answer was given up before it could be late. */
  readonly budgetMet: boolean | null;
  readonly promptTokens: number;
  readonly completionTokens: number;
  readonly cachedTokens: number;
  readonly queueMs: number | null;
  readonly ttftMs: number | null;
  readonly totalMs: number | null;
  /** How often the governor lowered and raised the rank of a sequence. */
  readonly rankFalls: number;
  readonly rankRises: number;
  /** One per finished sequence. */
  readonly finishReasons: readonly string[];
}

/** One HTTP request, after its last byte was handed over or its client has gone. */
export interface RequestEnd {
  readonly requestId: string;
  readonly method: string;
  /** The route's pattern, never the raw path. */
  readonly route: string;
  /** 499 when the client went away. A stream that failed half-way keeps its 200 and has a code. */
  readonly status: number;
  readonly code: string | null;
  readonly stream: boolean;
  readonly tenant: string | null;
  readonly durationMs: number;
  /** Whose budget it has; null: no tier was named. */
  readonly tier: string | null;
  readonly inference: InferenceReport | null;
}

/** The engine process died and was started again. */
export interface EngineRestart {
  /** `hang`, or how the process ended: few distinct texts, so it may be a metric's label. */
  readonly reason: string;
}

/** A fine-tuning job that had been worked on is over. */
export interface JobEnd {
  readonly state: string;
  readonly code: string | null;
}

/** A refresh of an adapter is over, or what it had promoted is put back. */
export interface RefreshEnded {
  readonly outcome: string;
}

/** Something was offered to the archive: an evaluation, or what scores of answers came to. */
export interface ArchiveOffered {
  readonly from: 'evaluation' | 'feedback';
  readonly status: string;
}

/** A request read its cell of the archive. */
export interface ArchiveRead {
  readonly match: 'exact' | 'nearest' | 'none';
}

export interface Events {
  readonly 'request-end': RequestEnd;
  readonly 'engine-restart': EngineRestart;
  readonly 'job-end': JobEnd;
  readonly 'refresh-end': RefreshEnded;
  readonly 'archive-offer': ArchiveOffered;
  readonly 'archive-read': ArchiveRead;
}

const channels = {
  'request-end': channel('rankgate:request-end'),
  'engine-restart': channel('rankgate:engine-restart'),
  'job-end': channel('rankgate:job-end'),
  'refresh-end': channel('rankgate:refresh-end'),
  'archive-offer': channel('rankgate:archive-offer'),
  'archive-read': channel('rankgate:archive-read'),
} as const;

export function publish<K extends keyof Events>(event: K, payload: Events[K]): void {
  channels[event].publish(payload);
}

/** Returns the function that stops it. */
export function onEvent<K extends keyof Events>(
  event: K,
  listener: (payload: Events[K]) => void,
): () => void {
  // A channel carries what `publish` above put there: nobody else knows its payload type.
  const receive = (message: unknown): void => listener(message as Events[K]);
  const { name } = channels[event];
  subscribe(name, receive);
  return () => void unsubscribe(name, receive);
}
