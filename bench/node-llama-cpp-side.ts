// llama.cpp as a Node program meets it: node-llama-cpp 3.21.1, installed in bench/ only, over the same shared objects. It
// runs on a native worker and batches the sequences of one context. No adapters: it sets them per context, which
// llama-cpp-side.ts measures with less overhead.

import {
  type GenerateJob,
  type RawResult,
  type Side,
  type SideOptions,
  unsupported,
} from './job.ts';

// The part of node-llama-cpp's types that is used: the package is not installed when the repository is type-checked.
interface LlamaSequence {
  readonly contextTokens: readonly number[];
  clearHistory(): Promise<void>;
  evaluate(tokens: number[], options: object): AsyncGenerator<number>;
  evaluateWithoutGeneratingNewTokens(tokens: number[]): Promise<void>;
}
interface LlamaContextHandle {
  getSequence(): LlamaSequence;
}
interface LlamaModelHandle {
  createContext(options: object): Promise<LlamaContextHandle>;
}
interface Llama {
  loadModel(options: { modelPath: string }): Promise<LlamaModelHandle>;
  dispose(): Promise<void>;
}
interface NodeLlamaCpp {
  getLlama(options: object): Promise<Llama>;
}

const greedy = { temperature: 0, yieldEogToken: true };

export async function openSide(options: SideOptions): Promise<Side> {
  const name = 'node-llama-cpp';
  const { getLlama } = (await import(name)) as NodeLlamaCpp;
  const llama = await getLlama({ build: 'never', gpu: false, maxThreads: options.threads });
  const model = await llama.loadModel({ modelPath: options.modelPath });
  const context = await model.createContext({
    contextSize: options.streamTokensMax,
    sequences: options.streamsMax,
    batchSize: 2048,
    threads: options.threads,
    flashAttention: 'auto',
  });
  const sequences = Array.from({ length: options.streamsMax }, () => context.getSequence());
  return {
    description: `node-llama-cpp 3.21.1, ${options.threads} threads`,
    async run(job) {
      for (const sequence of sequences) await sequence.clearHistory();
      if (job.kind === 'prefill') return prefill(sequences[0]!, job.prompt);
      if (job.kind === 'generate') return generate(sequences, job);
      throw unsupported(name, job);
    },
    close: () => llama.dispose(),
  };
}

async function prefill(sequence: LlamaSequence, prompt: readonly number[]): Promise<RawResult> {
  const start = performance.now();
  const ids: number[] = [];
  for await (const token of sequence.evaluate([...prompt], greedy)) {
    ids.push(token);
    break;
  }
  const totalMs = performance.now() - start;
  const ttftMs = [totalMs];
  return { totalMs, decodeMs: 0, ttftMs, stepMs: [], ids: [ids], probes: [], samples: {} };
}

async function generate(sequences: readonly LlamaSequence[], job: GenerateJob): Promise<RawResult> {
  if (job.adapters.some((use) => use !== null)) throw new Error('node-llama-cpp side: no adapters');
  const start = performance.now();
  const ttftMs: number[] = [];
  const ids = await Promise.all(
    job.prompts.map(async (prompt, stream) => {
      const own: number[] = [];
      for await (const token of sequences[stream]!.evaluate([...prompt], greedy)) {
        if (own.length === 0) ttftMs[stream] = performance.now() - start;
        own.push(token);
        if (own.length === job.newTokens) break;
      }
      return own;
    }),
  );
  const totalMs = performance.now() - start;
  const decodeMs = totalMs - Math.max(...ttftMs);
  return { totalMs, decodeMs, ttftMs, stepMs: [], ids, probes: [], samples: {} };
}
