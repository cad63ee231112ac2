import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { adapterModules } from '../../bench/adapter-numbers.ts';
import { writeGgufLora } from '../../bench/gguf-lora.ts';
import { readConfig } from '../../bench/rankgate-side.ts';
import { baseModelPath } from '../support/base-model.ts';
import { LlamaContext, LlamaModel, LoraAdapter, topLogprobs, topTwo } from './llama-cpp.ts';
import { oraclePrompts } from './llama-cpp-prompts.ts';

// The oracle itself, held to its own capture and to what LoRA means. This file loads libllama only: src's ggml stays in
// other files' processes.

interface Golden {
  readonly prompts: ReadonlyArray<{
    readonly name: string;
    readonly kind: 'chat' | 'raw';
    readonly promptIds: number[];
    readonly ids: number[];
    readonly gaps: number[];
    readonly unstable: Record<string, { readonly step: number; readonly gap: number }>;
    readonly top: Record<string, ReadonlyArray<readonly [id: number, logprob: number]>>;
  }>;
}

function readGolden(name: string): Golden {
  return JSON.parse(
    readFileSync(join(import.meta.dirname, `../golden/llama-cpp/${name}.json`), 'utf8'),
  ) as Golden;
}

describe('the llama.cpp oracle', () => {
  const folder: string = mkdtempSync(join(tmpdir(), 'rankgate-oracle-'));
  let path: string;
  let model: LlamaModel;
  let context: LlamaContext;

  beforeAll(async () => {
    path = await baseModelPath();
    model = new LlamaModel(path);
    context = new LlamaContext(model, { contextTokens: 1024, threads: 1, flashAttention: 'on' });
  });

  afterAll(() => {
    context[Symbol.dispose]();
    model[Symbol.dispose]();
    rmSync(folder, { recursive: true, force: true });
  });

  it('has a capture for every prompt, with the gap before every token', () => {
    for (const name of ['greedy-q4_1', 'greedy-f32']) {
      const { prompts } = readGolden(name);
      expect(prompts.map((prompt) => prompt.name)).toEqual(oraclePrompts.map(({ name }) => name));
      for (const prompt of prompts) {
        expect(prompt.gaps).toHaveLength(prompt.ids.length);
        expect(Math.min(...prompt.gaps)).toBeGreaterThanOrEqual(0);
      }
    }
  });

  it('tokenises the raw prompts as captured', () => {
    const { prompts } = readGolden('greedy-q4_1');
    for (const prompt of oraclePrompts.filter(({ text }) => text !== undefined)) {
      const captured = prompts.find(({ name }) => name === prompt.name)!;
      expect(model.tokenize(prompt.text!, false)).toEqual(captured.promptIds);
    }
  });

  it('continues as captured, as far as it is sure of itself on any CPU', () => {
    // With int8 activations llama.cpp's own settings part at gaps of up to 0.7 logits (greedy-q4_1.json, `unstable`), and
    // another CPU variant is another setting. raw-count never comes closer than 1.7.
    const { promptIds, ids } = readGolden('greedy-q4_1').prompts.find(
      ({ name }) => name === 'raw-count',
    )!;
    context.clear();
    const got: number[] = [];
    let logits = context.append(promptIds, 0);
    for (let i = 0; i < 12; i++) {
      got.push(topTwo(logits).best);
      logits = context.append([got.at(-1)!], promptIds.length + i);
    }
    expect(got).toEqual(ids.slice(0, 12));
  });

  it('finds captured logprobs again, within what int8 activations leave open', () => {
    const { promptIds, top } = readGolden('greedy-q4_1').prompts.find(
      ({ name }) => name === 'raw-count',
    )!;
    context.clear();
    const got = topLogprobs(context.append(promptIds, 0), 5);
    const captured = top['0']!.slice(0, 5);
    expect(got[0]![0]).toBe(captured[0]![0]);
    expect(Math.abs(got[0]![1] - captured[0]![1])).toBeLessThan(0.2);
  });

  it('applies a GGUF adapter that bench/ wrote: scale 0 is the base, scale 1 another answer', () => {
    const config = readConfig(path);
    const file = join(folder, 'adapter.gguf');
    writeGgufLora(file, 4, adapterModules(config, 7, 4));
    const { promptIds } = readGolden('greedy-q4_1').prompts.find(
      ({ name }) => name === 'raw-once',
    )!;
    const logitsAt = (scale: number | null): Float32Array => {
      context.clear();
      context.setAdapters(scale === null ? [] : [{ adapter, scale }]);
      return Float32Array.from(context.append(promptIds, 0));
    };
    const adapter = new LoraAdapter(model, file);
    const base = logitsAt(null);
    const zero = logitsAt(0);
    const full = logitsAt(1);
    context.setAdapters([]);
    adapter[Symbol.dispose]();
    const distance = (a: Float32Array, b: Float32Array): number =>
      a.reduce((most, value, i) => Math.max(most, Math.abs(value - b[i]!)), 0);
    expect(distance(base, zero)).toBeLessThan(1e-6);
    expect(distance(base, full)).toBeGreaterThan(0.5);
  });

  it('refuses a batch that is larger than its memory instead of writing past it', () => {
    const token = { token: 1, position: 0, sequence: 0, wantsLogits: true };
    expect(() => context.decode(Array.from({ length: 2049 }, () => token))).toThrow('at most 2048');
    expect(() => context.decode([])).toThrow('0 tokens');
  });
});
