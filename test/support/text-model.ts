// A GGUF with a vocabulary and a chat template and no tensors: what the text worker reads of a model file.

import { writeFileSync } from 'node:fs';
import { byteCharacters } from '../../src/model/bpe.ts';

export interface TextModel {
  readonly template?: string;
  readonly pre?: string;
  readonly addBos?: boolean;
}

/** The special tokens of the vocabulary; the other tokens are the 256 bytes and `ab`. */
const textModelSpecials = ['<s>', '<|im_end|>'] as const;

export function writeTextModel(path: string, model: TextModel = {}): void {
  const tokens = [...textModelSpecials, ...byteCharacters, 'ab'];
  const types = tokens.map((_, token) => (token < textModelSpecials.length ? 3 : 1));
  const entries: [key: string, type: number, value: Buffer][] = [
    ['general.architecture', 8, text('llama')],
    ['tokenizer.ggml.model', 8, text('gpt2')],
    ['tokenizer.ggml.pre', 8, text(model.pre ?? 'gpt-2')],
    ['tokenizer.ggml.tokens', 9, list(8, tokens.map(text))],
    ['tokenizer.ggml.token_type', 9, list(5, types.map(u32))],
    ['tokenizer.ggml.merges', 9, list(8, ['a b'].map(text))],
    ['tokenizer.ggml.bos_token_id', 4, u32(0)],
    ['tokenizer.ggml.eos_token_id', 4, u32(1)],
  ];
  if (model.addBos !== undefined) {
    entries.push(['tokenizer.ggml.add_bos_token', 7, Buffer.of(model.addBos ? 1 : 0)]);
  }
  if (model.template !== undefined) {
    entries.push(['tokenizer.chat_template', 8, text(model.template)]);
  }
  const parts = entries.flatMap(([key, type, value]) => [text(key), u32(type), value]);
  const head = [Buffer.from('GGUF'), u32(3), u64(0), u64(entries.length)];
  writeFileSync(path, Buffer.concat([...head, ...parts]));
}

function u32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value);
  return bytes;
}

function u64(value: number): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(BigInt(value));
  return bytes;
}

const text = (value: string): Buffer => {
  const bytes = Buffer.from(value);
  return Buffer.concat([u64(bytes.length), bytes]);
};

const list = (type: number, items: readonly Buffer[]): Buffer =>
  Buffer.concat([u32(type), u64(items.length), ...items]);
