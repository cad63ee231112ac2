// rankgate's engine loop in this process, as the gateway's engine process runs it: admission, loads from disk, scheduler
// and sampler, but no channel, text or HTTP. Tokens are timed where the loop hands them out.

import { systemClock } from '../src/engine/clock.ts';
import type { EngineLoop } from '../src/engine/engine-loop.ts';
import {
  type EngineEvent,
  type FromEngine,
  type GenerateRequest,
  noUrgency,
  type Sampling,
} from '../src/engine/messages.ts';
import { openLoop } from '../src/engine/open-loop.ts';
import { scrapCells } from '../src/model/step-inputs.ts';
import {
  type EngineSizes,
  type RawResult,
  type ServedRequest,
  type ServeJob,
  type Side,
  type SideOptions,
  sampled,
  unsupported,
  type VisitJob,
} from './job.ts';
import { isServed } from './rankgate-side.ts';

export async function openSide(options: SideOptions): Promise<Side> {
  const { engine, weights, threads } = options;
  if (engine === undefined) throw new Error('the engine side needs SideOptions.engine');
  if (!isServed(weights)) throw new Error(`weights: ${weights} is not there yet`);
  const host = new Host(engine);
  const loop = await openLoop(
    {
      modelPath: options.modelPath,
      modelHash: engine.modelHash,
      weights,
      backend: 'ggml',
      threads,
      device: 'cpu',
      libraryDirectory: null,
      cacheDirectory: null,
      blobDirectory: engine.blobDirectory,
      // Room for what runs and little more: no prompt of an earlier job is still there to be used again.
      cells: scrapCells + (options.streamsMax + 1) * options.streamTokensMax,
      pages: 1 + engine.pages,
      tokensMax: 512,
      segmentsMax: options.streamsMax,
      limits: {
        ...{ waitingMax: 64, waitingTokensMax: 65_536, waitingMsMax: 600_000 },
        prefillTokensMax: 512,
      },
      tenantShareMax: 1,
      speculation: 'off', // what a step costs: a guess that comes true hands out more tokens than one
    },
    systemClock,
    (message) => host.hear(message),
  );
  host.loop = loop;
  return {
    description: `rankgate's engine on ${loop.base.backend}, ${engine.pages} pages`,
    run(job) {
      if (job.kind === 'serve') return host.serve(job);
      if (job.kind === 'visit') return host.visit(job);
      throw unsupported('engine', job);
    },
    close: () => loop.stop(),
  };
}

/** Hears one sequence's events, and when they were handed out. */
type Listener = (event: EngineEvent, nowMs: number) => void;

const greedy: Omit<Sampling, 'logitBias'> = {
  temperature: 0,
  topP: 1,
  topK: 0,
  minP: 0,
  seed: 1,
  presencePenalty: 0,
  frequencyPenalty: 0,
  repetitionPenalty: 1,
};

class Host {
  loop: EngineLoop | null = null;
  readonly #engine: EngineSizes;
  readonly #listeners: Map<string, Listener> = new Map();
  #reject: (error: Error) => void = () => {};
  #onStep: () => void = () => {};
  #submitted = 0;

  constructor(engine: EngineSizes) {
    this.#engine = engine;
  }

  hear(message: FromEngine): void {
    if (message.kind === 'failed') this.#reject(new Error(`${message.code}: ${message.message}`));
    if (message.kind === 'step') this.#onStep();
    if (message.kind !== 'events') return;
    const nowMs = performance.now();
    for (const { id, event } of message.batch) {
      const listener = this.#listeners.get(id);
      if (event.kind === 'end') this.#listeners.delete(id);
      listener?.(event, nowMs);
    }
  }

  /** Between two steps, as a message from the gateway would come. */
  #submit({ adapter, prompt }: ServedRequest, tokensMax: number, listener: Listener): string {
    const { generations, rank } = this.#engine;
    const loop = this.loop!;
    this.#submitted += 1;
    const id = `request-${this.#submitted}`;
    this.#listeners.set(id, listener);
    const request: GenerateRequest = {
      id,
      tokens: Int32Array.from(prompt),
      tokensMax,
      // No end token: every answer has the length that it was asked for.
      sampling: { ...greedy, logitBias: loop.base.endTokens.map((token) => [token, -1e6]) },
      stop: [],
      topLogprobs: null,
      adapter: {
        parts: [{ generation: generations[adapter]!, rank, weight: 1 }],
        ...{ merge: 'linear', density: 1, flyTopK: null, prior: null, system: null },
      },
      tenant: 'bench',
      urgency: noUrgency,
    };
    setImmediate(() => loop.submit(request));
    return id;
  }

  serve({ streams, newTokens, requests }: ServeJob): Promise<RawResult> {
    return new Promise((resolve, reject) => {
      this.#reject = reject;
      const queueMs: number[] = [];
      const startMs = performance.now();
      let [next, running, tokens] = [0, 0, 0];
      let busy: RawResult['samples'] | null = null;
      const submitNext = (): void => {
        running += 1;
        const index = next++;
        this.#submit(requests[index]!, newTokens[index]!, (event, nowMs) => {
          if (event.kind === 'start') queueMs.push(event.queueMs);
          if (event.kind === 'piece') tokens += event.tokens.length;
          if (event.kind !== 'end') return;
          running -= 1;
          if (next < requests.length) submitNext();
          else busy ??= { tokens: [tokens], busyMs: [nowMs - startMs] };
          if (running > 0) return;
          resolve(sampled(nowMs - startMs, { ...busy, queueMs }));
        });
      };
      for (let stream = 0; stream < streams; stream++) submitNext();
    });
  }

  async visit(job: VisitJob): Promise<RawResult> {
    const { streams, visits, pauses, newTokens } = job;
    const startMs = performance.now();
    const gaps: Gap[] = [];
    const waits: Wait[] = [];
    const ids = await this.#startStreams(streams, newTokens, gaps);
    for (const [i, visit] of visits.entries()) {
      await this.#steps(pauses[i]!);
      waits.push(await this.#visitOnce(visit));
    }
    for (const id of ids) {
      this.#listeners.delete(id);
      this.loop!.cancel(id);
    }
    return sampled(performance.now() - startMs, sortGaps(gaps, waits));
  }

  /** Resolves when every stream has its first token. */
  #startStreams(
    streams: readonly ServedRequest[],
    newTokens: number,
    gaps: Gap[],
  ): Promise<string[]> {
    return new Promise((resolve, reject) => {
      this.#reject = reject;
      const ids: string[] = [];
      let started = 0;
      for (const stream of streams) {
        let lastMs: number | null = null;
        const listener: Listener = (event, nowMs) => {
          if (event.kind === 'end') this.#reject(new Error('a stream ended before the visits'));
          if (event.kind !== 'piece') return;
          if (lastMs !== null) gaps.push({ fromMs: lastMs, toMs: nowMs });
          else if (++started === streams.length) resolve(ids);
          lastMs = nowMs;
        };
        ids.push(this.#submit(stream, newTokens, listener));
      }
    });
  }

  #steps(count: number): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#reject = reject;
      let left = count;
      this.#onStep = () => {
        left -= 1;
        if (left > 0) return;
        this.#onStep = () => {};
        resolve();
      };
    });
  }

  #visitOnce(visit: ServedRequest): Promise<Wait> {
    return new Promise((resolve, reject) => {
      this.#reject = reject;
      const fromMs = performance.now();
      let [queueMs, useMs] = [0, 0];
      this.#submit(visit, 1, (event, nowMs) => {
        if (event.kind === 'start') [queueMs, useMs] = [event.queueMs, nowMs];
        if (event.kind === 'end') resolve({ queueMs, fromMs, useMs, endMs: nowMs });
      });
    });
  }
}

interface Gap {
  readonly fromMs: number;
  readonly toMs: number;
}

interface Wait {
  readonly queueMs: number;
  readonly fromMs: number;
  readonly useMs: number;
  readonly endMs: number;
}

/** What `visit` of job.ts promises. */
export function sortGaps(gaps: readonly Gap[], waits: readonly Wait[]): RawResult['samples'] {
  const gapMs: number[] = [];
  const quietGapMs: number[] = [];
  for (const { fromMs, toMs } of gaps) {
    const visits = waits.filter((wait) => fromMs < wait.endMs && toMs > wait.fromMs);
    if (visits.length === 0) quietGapMs.push(toMs - fromMs);
    else if (visits.some((wait) => fromMs < wait.useMs)) gapMs.push(toMs - fromMs);
  }
  return { queueMs: waits.map(({ queueMs }) => queueMs), gapMs, quietGapMs };
}
