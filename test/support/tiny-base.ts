// The tiny model of test/golden/tiny as import sees it, and its golden PEFT adapters (test/oracle/peft-golden.py).

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { AdapterBase } from '../../src/adapters/peft.ts';

export const tinyBase: AdapterBase = {
  config: {
    family: 'llama',
    name: 'Rankgate Tiny Random',
    blocks: 2,
    width: 64,
    heads: 4,
    kvHeads: 2,
    headSize: 16,
    ffnWidth: 96,
    vocabSize: 320,
    contextLength: 2048,
    ropeSize: 16,
    ropeBase: 10_000,
    ropeStyle: 'norm',
    normEps: 1e-5,
    tiedEmbeddings: true,
  },
  hash: 'ab'.repeat(32),
  names: ['Rankgate Tiny Random', 'rankgate-tiny', 'tiny-f32.gguf'],
};

export const goldenAdapters: readonly string[] = [
  'plain-r4',
  'rslora-r8',
  'patterns-r16',
  'qv-r8',
  'bf16-r8',
  'bf16-r256',
  'regex-r64',
];

export function goldenDirectory(name: string): string {
  return join(import.meta.dirname, '../golden/adapters', name);
}

export function goldenConfig(name: string): string {
  return readFileSync(join(goldenDirectory(name), 'adapter_config.json'), 'utf8');
}

export function goldenWeights(name: string): Uint8Array {
  return new Uint8Array(readFileSync(join(goldenDirectory(name), 'adapter_model.safetensors')));
}
