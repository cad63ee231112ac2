// Captures llama.cpp's greedy continuations of llama-cpp-prompts.ts, under several settings of llama.cpp itself, so that a
// test knows which tokens are llama.cpp's answer and which are a coin that its own threads and kernels toss differently.
//
//   npx tsx test/oracle/llama-cpp-greedy.ts --model FILE.gguf [--weights file|f32] --out test/golden/llama-cpp
//
// `--weights file` runs the file as it is (q4_1, int8 activations): the oracle of `parity`. `--weights f32` first writes
// the same weights dequantised to f32 (llama_model_quantize, into a temporary folder) and runs those with an f32 KV cache
// and plain attention: the oracle of `faithful`. Writes greedy-NAME.json (the reference run) and greedy-NAME.raw.json
// (every run, whole).

import { createHash } from 'node:crypto';
import { createReadStream, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { cpus, tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { parseArgs } from 'node:util';
import { Template } from '@huggingface/jinja';
import {
  type ContextOptions,
  cpuName,
  LlamaContext,
  LlamaModel,
  libraryVersion,
  systemInfo,
  topLogprobs,
  topTwo,
  writeF32Model,
} from './llama-cpp.ts';
import { type OraclePrompt, oraclePrompts } from './llama-cpp-prompts.ts';

const tokensMax = 48;
const contextTokens = 2048;
const topCount = 20;
/** Steps whose twenty best log-probabilities are kept. */
const topSteps = [0, 7, 23];

interface Run {
  readonly ids: number[];
  /** Best minus second-best logit before each token, rounded to 1e-4. */
  readonly gaps: number[];
  readonly seconds: number[];
  readonly ended: boolean;
  readonly top: Record<string, Array<[id: number, logprob: number]>>;
}

interface Prompt {
  readonly name: string;
  readonly kind: 'chat' | 'raw';
  readonly text: string;
  readonly ids: number[];
}

type Setting = { readonly name: string } & ContextOptions;

function settingsOf(weights: 'file' | 'f32'): readonly Setting[] {
  if (weights === 'f32') {
    const common = { contextTokens, kvType: 'f32' } as const;
    return [
      { name: 'reference', ...common, threads: 1, flashAttention: 'off' },
      { name: 'flash', ...common, threads: 1, flashAttention: 'on' },
    ];
  }
  return [
    { name: 'reference', contextTokens, threads: 1, flashAttention: 'on' },
    { name: 'plain-attention', contextTokens, threads: 1, flashAttention: 'off' },
    { name: 'f32-cache', contextTokens, threads: 1, flashAttention: 'off', kvType: 'f32' },
    { name: 'small-batch', contextTokens, threads: 1, flashAttention: 'on', microBatchTokens: 16 },
    { name: 'two-threads', contextTokens, threads: 2, flashAttention: 'on' },
  ];
}

function render(model: LlamaModel, prompt: OraclePrompt): Prompt {
  const { name } = prompt;
  if (prompt.text !== undefined) {
    return { name, kind: 'raw', text: prompt.text, ids: model.tokenize(prompt.text, false) };
  }
  const messages = [
    ...(prompt.system === undefined ? [] : [{ role: 'system', content: prompt.system }]),
    { role: 'user', content: prompt.user },
  ];
  const text = new Template(model.chatTemplate()).render({ messages, add_generation_prompt: true });
  return { name, kind: 'chat', text, ids: encodeChat(model, messages, text) };
}

/** Special tokens come from the template only: each message's content is cut out of the rendered text and tokenised
 *  without them, which is what rankgate promises for user text. */
function encodeChat(
  model: LlamaModel,
  messages: ReadonlyArray<{ readonly content: string | undefined }>,
  text: string,
): number[] {
  const spelled = /<\|[a-z_]+\|>/.test(messages.map(({ content }) => content).join(''));
  if (!spelled) return model.tokenize(text, true);
  const ids: number[] = [];
  let from = 0;
  for (const content of messages.map((message) => message.content ?? '')) {
    const at = text.indexOf(content, from);
    ids.push(...model.tokenize(text.slice(from, at), true), ...model.tokenize(content, false));
    from = at + content.length;
  }
  return [...ids, ...model.tokenize(text.slice(from), true)];
}

function continueGreedily(
  model: LlamaModel,
  context: LlamaContext,
  prompt: readonly number[],
): Run {
  context.clear();
  const run: Run = { ids: [], gaps: [], seconds: [], ended: false, top: {} };
  let logits = context.append(prompt, 0);
  for (let step = 0; step < tokensMax; step++) {
    const { best, second, gap } = topTwo(logits);
    if (topSteps.includes(step)) {
      run.top[step] = topLogprobs(logits, topCount).map(([id, logprob]) => [id, round(logprob)]);
    }
    run.gaps.push(round(gap));
    run.seconds.push(second);
    if (model.isEnd(best)) return { ...run, ended: true, ids: [...run.ids, best] };
    run.ids.push(best);
    if (step + 1 < tokensMax) logits = context.append([best], prompt.length + step);
  }
  return run;
}

const round = (value: number): number => Math.round(value * 1e4) / 1e4;

/** First step at which the ids differ, null when they do not. */
function firstDifference(a: readonly number[], b: readonly number[]): number | null {
  const length = Math.max(a.length, b.length);
  for (let i = 0; i < length; i++) if (a[i] !== b[i]) return i;
  return null;
}

async function sha256(path: string): Promise<string> {
  const hash = createHash('sha256');
  for await (const chunk of createReadStream(path)) hash.update(chunk as Buffer);
  return hash.digest('hex');
}

function capture(
  path: string,
  settings: readonly Setting[],
): {
  prompts: Prompt[];
  runs: Map<string, Run[]>;
} {
  using model = new LlamaModel(path);
  const prompts = oraclePrompts.map((prompt) => render(model, prompt));
  const runs = new Map<string, Run[]>();
  for (const { name, ...options } of settings) {
    using context = new LlamaContext(model, options);
    runs.set(
      name,
      prompts.map(({ ids }) => continueGreedily(model, context, ids)),
    );
    process.stderr.write(`${name}: done\n`);
  }
  return { prompts, runs };
}

/** The reference run, with the first step at which another setting of llama.cpp leaves it, and the gap there. */
function compact(prompt: Prompt, runs: ReadonlyMap<string, Run[]>, index: number): object {
  const reference = runs.get('reference')![index]!;
  const unstable: Record<string, { step: number; gap: number }> = {};
  for (const [name, all] of runs) {
    const step = firstDifference(reference.ids, all[index]!.ids);
    if (step !== null) unstable[name] = { step, gap: reference.gaps[step]! };
  }
  return {
    name: prompt.name,
    kind: prompt.kind,
    promptIds: prompt.ids,
    ids: reference.ids,
    gaps: reference.gaps,
    ended: reference.ended,
    unstable,
    top: reference.top,
  };
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      model: { type: 'string' },
      weights: { type: 'string', default: 'file' },
      out: { type: 'string', default: 'test/golden/llama-cpp' },
    },
  });
  if (values.model === undefined || !['file', 'f32'].includes(values.weights)) {
    throw new Error(
      'usage: llama-cpp-greedy.ts --model FILE.gguf [--weights file|f32] [--out DIR]',
    );
  }
  const weights = values.weights as 'file' | 'f32';
  const settings = settingsOf(weights);
  const folder = mkdtempSync(join(tmpdir(), 'rankgate-oracle-'));
  try {
    const path = weights === 'file' ? values.model : join(folder, 'f32.gguf');
    if (weights === 'f32') writeF32Model(values.model, path, 2);
    const { prompts, runs } = capture(path, settings);
    const packageJson = join(import.meta.dirname, '../../node_modules/@node-llama-cpp');
    const platform = `${process.platform}-${process.arch}`;
    const library = JSON.parse(readFileSync(join(packageJson, platform, 'package.json'), 'utf8'));
    const header = {
      oracle: `llama.cpp ${libraryVersion()} (npm @node-llama-cpp/${platform} ${library.version})`,
      command: `npx tsx test/oracle/llama-cpp-greedy.ts --model ${basename(values.model)} --weights ${weights}`,
      model: { file: basename(values.model), sha256: await sha256(values.model) },
      weights: weights === 'file' ? 'as in the file' : 'dequantised to f32 by llama_model_quantize',
      machine: { cpu: cpus()[0]?.model ?? cpuName(), cores: cpus().length, features: systemInfo() },
      node: process.version,
      tokensMax,
      batchTokens: 2048,
      settings,
    };
    const name = weights === 'file' ? 'q4_1' : 'f32';
    const records = prompts.map((prompt, index) => compact(prompt, runs, index));
    write(join(values.out, `greedy-${name}.json`), { ...header, prompts: records });
    write(join(values.out, `greedy-${name}.raw.json`), {
      ...header,
      prompts: prompts.map((prompt, index) => ({
        ...prompt,
        runs: Object.fromEntries([...runs].map(([key, all]) => [key, all[index]])),
      })),
    });
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

/** One prompt a line: readable diffs without a line per number. */
function write(
  path: string,
  { prompts, ...header }: { prompts: object[]; [key: string]: unknown },
): void {
  const head = JSON.stringify(header, null, 1).slice(0, -2);
  const lines = prompts.map((prompt) => `  ${JSON.stringify(prompt)}`).join(',\n');
  writeFileSync(path, `${head},\n "prompts": [\n${lines}\n ]\n}\n`);
}

await main();
