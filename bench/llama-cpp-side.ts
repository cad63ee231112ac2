// llama.cpp by its C API (test/oracle/llama-cpp.ts), as the opponent at its best: no HTTP, no text, a persistent thread
// pool, every prompt in one batch, every stream in one batch, one graph-reusing context per LoRA set. What it cannot do is
// mix LoRA sets in a batch: adapters belong to the context. Streams with different sets are therefore served one after
// another (what llama-server does: a slot joins the batch only if its LoRA set equals the first slot's) or round robin.

import {
  type BatchToken,
  cpuName,
  LlamaContext,
  LlamaModel,
  LoraAdapter,
  libraryVersion,
  ThreadPool,
  writeF32Model,
} from '../test/oracle/llama-cpp.ts';
import {
  type AdapterUse,
  argmax,
  type GenerateJob,
  probeOf,
  type RawResult,
  type Side,
  type SideOptions,
  unsupported,
} from './job.ts';

/** The streams that share one LoRA set, and the context that serves them. */
interface Group {
  readonly context: LlamaContext;
  readonly streams: readonly number[];
}

export function openSide(options: SideOptions): Side {
  const { f32From, modelPath, threads } = options;
  if (f32From !== undefined) writeF32Model(f32From, modelPath, threads);
  const model = new LlamaModel(modelPath);
  const threadPool = new ThreadPool(options.threads);
  const adapters = options.adapters.map(({ ggufPath }) => new LoraAdapter(model, ggufPath));
  const contexts = new Map<string, LlamaContext>();

  /** One context per LoRA set, made at its first use: a warm-up run makes them all. */
  function contextOf(use: AdapterUse | null): LlamaContext {
    const key = use === null ? 'base' : String(use.adapter);
    const known = contexts.get(key);
    if (known !== undefined) return known;
    if (use !== null && use.rank !== options.adapters[use.adapter]!.rank) {
      throw new Error('llama.cpp cannot use fewer ranks than the file has');
    }
    const sequencesMax = use === null || options.adapters.length === 1 ? options.streamsMax : 1;
    const context = new LlamaContext(model, {
      contextTokens: sequencesMax * options.streamTokensMax,
      sequencesMax,
      threads: options.threads,
      threadPool,
      kvType: options.kvType ?? 'f16',
    });
    if (use !== null) context.setAdapters([{ adapter: adapters[use.adapter]!, scale: 1 }]);
    contexts.set(key, context);
    return context;
  }

  return {
    description: `llama.cpp ${libraryVersion()} by its C API, ${cpuName()}, ${options.threads} threads`,
    run(job) {
      if (job.kind === 'prefill') return prefill(contextOf(null), job.prompt);
      if (job.kind !== 'generate') throw unsupported('llama.cpp', job);
      return generate(groupStreams(job, contextOf), job);
    },
    windowLogits(tokens) {
      const context = contextOf(null);
      context.clear();
      context.decode(
        tokens.map((token, position) => ({ token, position, sequence: 0, wantsLogits: true })),
      );
      return tokens.map((_, index) => context.logits(index));
    },
    close() {
      for (const context of contexts.values()) context[Symbol.dispose]();
      for (const adapter of adapters) adapter[Symbol.dispose]();
      threadPool[Symbol.dispose]();
      model[Symbol.dispose]();
    },
  };
}

function groupStreams(
  job: GenerateJob,
  contextOf: (use: AdapterUse | null) => LlamaContext,
): Group[] {
  const groups = new Map<LlamaContext, number[]>();
  job.adapters.forEach((use, stream) => {
    const context = contextOf(use);
    groups.set(context, [...(groups.get(context) ?? []), stream]);
  });
  return [...groups].map(([context, streams]) => ({ context, streams }));
}

function prefill(context: LlamaContext, prompt: readonly number[]): RawResult {
  context.clear();
  const start = performance.now();
  const logits = context.append(prompt, 0);
  const totalMs = performance.now() - start;
  return {
    totalMs,
    decodeMs: 0,
    ttftMs: [totalMs],
    stepMs: [],
    ids: [[argmax(logits)]],
    probes: [probeOf(logits)],
    samples: {},
  };
}

function generate(groups: readonly Group[], job: GenerateJob): RawResult {
  for (const { context } of groups) context.clear();
  const start = performance.now();
  const ids: number[][] = job.prompts.map(() => []);
  const ttftMs: number[] = job.prompts.map(() => 0);
  const stepMs: number[] = [];
  const probes: number[][] = job.prompts.map(() => []);

  const admit = (group: Group): void => {
    const rows = step(group, promptBatch(group, job.prompts), ids);
    group.streams.forEach((stream, sequence) => {
      ttftMs[stream] = performance.now() - start;
      probes[stream] = probeOf(rows[sequence]!);
    });
  };
  const decode = (group: Group): void => {
    const batch = group.streams.map((stream, sequence) => ({
      token: ids[stream]!.at(-1)!,
      position: job.prompts[stream]!.length + ids[stream]!.length - 1,
      sequence,
      wantsLogits: true,
    }));
    step(group, batch, ids);
  };

  if (job.order === 'one-after-another' && groups.length > 1) {
    for (const group of groups) {
      admit(group);
      for (let i = 1; i < job.newTokens; i++) decode(group);
    }
  } else {
    for (const group of groups) admit(group);
    for (let i = 1; i < job.newTokens; i++) {
      const before = performance.now();
      for (const group of groups) decode(group);
      stepMs.push(performance.now() - before);
    }
  }
  const totalMs = performance.now() - start;
  const decodeMs = totalMs - Math.max(...ttftMs);
  return { totalMs, decodeMs, ttftMs, stepMs, ids, probes, samples: {} };
}

function promptBatch({ streams }: Group, prompts: GenerateJob['prompts']): BatchToken[] {
  return streams.flatMap((stream, sequence) => {
    const prompt = prompts[stream]!;
    return prompt.map((token, position) => ({
      token,
      position,
      sequence,
      wantsLogits: position === prompt.length - 1,
    }));
  });
}

/** Runs the batch, appends each stream's greedy token, and returns the rows of logits, valid until the next decode. */
function step(
  { context, streams }: Group,
  batch: readonly BatchToken[],
  ids: number[][],
): Float32Array[] {
  context.decode(batch);
  const rows: Float32Array[] = [];
  batch.forEach(({ wantsLogits, sequence }, index) => {
    if (!wantsLogits) return;
    const row = context.logits(index);
    ids[streams[sequence]!]!.push(argmax(row));
    rows.push(row);
  });
  return rows;
}
