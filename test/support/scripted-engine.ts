import type { Generation } from '../../src/adapters/adapter.ts';
import type { Engine } from '../../src/engine/engine.ts';
import type {
  BaseInfo,
  EngineEvent,
  EngineStats,
  FinishReason,
  GeneratedToken,
  GenerateRequest,
} from '../../src/engine/messages.ts';
import { GatewayError } from '../../src/errors.ts';

export type Script = (request: GenerateRequest, signal: AbortSignal) => AsyncIterable<EngineEvent>;

const fakeBase: BaseInfo = {
  config: {
    family: 'llama',
    name: 'tiny',
    blocks: 2,
    width: 64,
    heads: 4,
    kvHeads: 2,
    headSize: 16,
    ffnWidth: 96,
    vocabSize: 300,
    contextLength: 4096,
    ropeSize: 16,
    ropeBase: 10_000,
    ropeStyle: 'norm',
    normEps: 1e-5,
    tiedEmbeddings: true,
  },
  hash: 'b'.repeat(64),
  contextMax: 4096,
  endTokens: [2],
  backend: 'scripted',
};

/** An engine whose answers a test writes down event by event; it only does what the contract asks of every engine:
 *  CANCELLED at an abort, and it counts what is alive. */
export class ScriptedEngine implements Engine {
  readonly base: BaseInfo = fakeBase;
  readonly requests: GenerateRequest[] = [];
  readonly unloaded: Generation[] = [];
  pinned: readonly Generation[] = [];
  script: Script;
  live = 0;
  ready = true;
  lastTokenMs: number | null = 1000;
  figures: Partial<EngineStats> = {};

  constructor(script: Script) {
    this.script = script;
  }

  submit(request: GenerateRequest, signal: AbortSignal): AsyncIterable<EngineEvent> {
    this.requests.push(request);
    return this.#run(request, signal);
  }

  async *#run(request: GenerateRequest, signal: AbortSignal): AsyncGenerator<EngineEvent> {
    this.live += 1;
    const { promise: aborted, stop } = whenAborted(signal);
    const events = this.script(request, signal)[Symbol.asyncIterator]();
    try {
      for (;;) {
        const next = await Promise.race([events.next(), aborted]);
        if (next.done === true) return;
        yield next.value;
      }
    } finally {
      this.live -= 1;
      stop();
      events.return?.()?.catch(() => {});
    }
  }

  unload(generation: Generation): void {
    this.unloaded.push(generation);
  }

  pin(generations: readonly Generation[]): void {
    this.pinned = generations;
  }

  prewarm(): void {}

  stats(): EngineStats {
    return {
      running: this.live,
      waiting: 0,
      kvCellsUsed: 0,
      kvCellsMax: 1024,
      residents: [],
      adapterSlotsMax: 8,
      preemptions: 0,
      prewarms: 0,
      prewarmsUsed: 0,
      threads: 2,
      steps: 0,
      tokensGenerated: 0,
      draftTokens: 0,
      draftTokensAccepted: 0,
      prefixTokensQueried: 0,
      prefixTokensHit: 0,
      ...this.figures,
    };
  }

  onStep(): () => void {
    return () => {};
  }

  isReady(): boolean {
    return this.ready;
  }

  lastTokenAtMs(): number | null {
    return this.lastTokenMs;
  }

  async close(): Promise<void> {}
}

function whenAborted(signal: AbortSignal): { promise: Promise<never>; stop: () => void } {
  let stop = (): void => {};
  const promise = new Promise<never>((_, reject) => {
    const onAbort = (): void => reject(new GatewayError('CANCELLED', 'aborted'));
    if (signal.aborted) onAbort();
    signal.addEventListener('abort', onAbort);
    stop = () => signal.removeEventListener('abort', onAbort);
  });
  promise.catch(() => {});
  return { promise, stop };
}

export function startEvent(cachedTokens = 0, queueMs = 3): EngineEvent {
  return { kind: 'start', queueMs, cachedTokens };
}

/** One token per character of `text`; −0.5 per token and one alternative, `?` at −1.5, when the request asks. */
export function pieceEvent(text: string, request?: GenerateRequest): EngineEvent {
  const hasLogprobs = request !== undefined && request.topLogprobs !== null;
  const tokens = Array.from(text, (character): GeneratedToken => {
    const bytes = Buffer.from(character);
    const alternatives = [
      { token: bytes[0]!, bytes, logprob: -0.5 },
      { token: 63, bytes: Buffer.from('?'), logprob: -1.5 },
    ];
    return {
      token: bytes[0]!,
      bytes,
      logprob: hasLogprobs ? -0.5 : Number.NaN,
      top: hasLogprobs ? alternatives.slice(0, request.topLogprobs!) : [],
    };
  });
  return { kind: 'piece', text, tokens };
}

export function endEvent(
  completionTokens: number,
  reason: FinishReason = 'stop',
  times: { readonly ttftMs: number; readonly totalMs: number } = { ttftMs: 5, totalMs: 9 },
): EngineEvent {
  return { kind: 'end', reason, stopString: null, completionTokens, rankMean: 0, ...times };
}

/** Answers every request at once: who answers (`base`, or each part's first digits of the generation, rank and weight), the seed, and the
 *  prompt's length; cut at tokensMax like a real engine. */
export const echoScript: Script = async function* echo(request) {
  const { adapter, tokens, tokensMax, sampling } = request;
  const parts = [...(adapter?.parts ?? []), ...(adapter?.system ? [adapter.system] : [])];
  const who = parts.map(
    ({ generation, rank, weight }) =>
      `${generation.slice(7, 11)} at ${rank}${weight === 1 ? '' : ` by ${weight}`}`,
  );
  const text = `${who.join(' + ') || 'base'} seed ${sampling.seed} prompt ${tokens.length}`;
  const shown = text.slice(0, tokensMax);
  yield startEvent(tokens.length > 16 ? 16 : 0);
  for (const word of shown.split(/(?<= )/)) yield pieceEvent(word, request);
  const end = endEvent(shown.length, shown.length < text.length ? 'length' : 'stop');
  const rankMean = Math.max(0, ...(adapter?.parts ?? []).map(({ rank }) => rank));
  yield { ...end, rankMean } as EngineEvent;
};

/** An answer that a test feeds from outside. */
export class EventFeed implements AsyncIterable<EngineEvent> {
  readonly #queue: Array<EngineEvent | Error> = [];
  #wake = (): void => {};

  push(...events: Array<EngineEvent | Error>): void {
    this.#queue.push(...events);
    this.#wake();
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<EngineEvent> {
    for (;;) {
      const next = this.#queue.shift();
      if (next === undefined) {
        await new Promise<void>((resolve) => {
          this.#wake = resolve;
        });
      } else if (next instanceof Error) {
        throw next;
      } else {
        yield next;
        if (next.kind === 'end') return;
      }
    }
  }
}
