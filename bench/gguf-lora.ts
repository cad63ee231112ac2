// Writes a LoRA adapter as GGUF (version 3) for llama.cpp: general.type=adapter, adapter.type=lora, and per module
// `blk.N.PROJECTION.weight.lora_a` [in, r] and `.lora_b` [r, out] in ggml's order, f16. alpha = r, so the scale is 1.

import { closeSync, openSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { type AdapterModule, adapterModules } from './adapter-numbers.ts';
import type { AdapterSpec } from './job.ts';
import { readConfig } from './rankgate-side.ts';

const alignment = 32;
const typeF16 = 1; // enum ggml_type
const valueFloat32 = 6; // enum gguf_type
const valueString = 8;

class Bytes {
  readonly #parts: Buffer[] = [];
  length = 0;

  push(part: Buffer): this {
    this.#parts.push(part);
    this.length += part.length;
    return this;
  }

  u32(value: number): this {
    const part = Buffer.alloc(4);
    part.writeUInt32LE(value);
    return this.push(part);
  }

  u64(value: number): this {
    const part = Buffer.alloc(8);
    part.writeBigUInt64LE(BigInt(value));
    return this.push(part);
  }

  f32(value: number): this {
    const part = Buffer.alloc(4);
    part.writeFloatLE(value);
    return this.push(part);
  }

  text(value: string): this {
    const part = Buffer.from(value, 'utf8');
    return this.u64(part.length).push(part);
  }

  pad(): this {
    const rest = this.length % alignment;
    return rest === 0 ? this : this.push(Buffer.alloc(alignment - rest));
  }

  join(): Buffer {
    return Buffer.concat(this.#parts);
  }
}

interface Entry {
  readonly name: string;
  readonly shape: readonly [number, number]; // ggml's order: innermost first
  readonly data: Uint16Array;
}

function entriesOf(module: AdapterModule, rank: number): Entry[] {
  const name = `blk.${module.block}.${module.projection}.weight`;
  return [
    { name: `${name}.lora_a`, shape: [module.in, rank], data: module.a },
    { name: `${name}.lora_b`, shape: [rank, module.out], data: module.b },
  ];
}

/** Adapters of seeds 1 … count for the model, each in a file of the folder. */
export function writeAdapters(
  folder: string,
  modelPath: string,
  { count, rank }: { readonly count: number; readonly rank: number },
): AdapterSpec[] {
  const config = readConfig(modelPath);
  return Array.from({ length: count }, (_, index) => {
    const seed = index + 1;
    const ggufPath = join(folder, `adapter-${seed}.gguf`);
    writeGgufLora(ggufPath, rank, adapterModules(config, seed, rank));
    return { seed, rank, ggufPath };
  });
}

export function writeGgufLora(path: string, rank: number, modules: Iterable<AdapterModule>): void {
  const entries = [...modules].flatMap((module) => entriesOf(module, rank));
  const texts = {
    'general.type': 'adapter',
    'general.architecture': 'llama',
    'adapter.type': 'lora',
  };
  const head = new Bytes().push(Buffer.from('GGUF')).u32(3).u64(entries.length);
  head.u64(Object.keys(texts).length + 1);
  for (const [key, value] of Object.entries(texts)) head.text(key).u32(valueString).text(value);
  head.text('adapter.lora.alpha').u32(valueFloat32).f32(rank);
  const padded = (bytes: number): number => Math.ceil(bytes / alignment) * alignment;
  let offset = 0;
  for (const { name, shape, data } of entries) {
    head.text(name).u32(2).u64(shape[0]).u64(shape[1]).u32(typeF16).u64(offset);
    offset += padded(data.byteLength);
  }
  head.pad();
  const file = openSync(path, 'wx');
  try {
    writeSync(file, head.join());
    for (const { data } of entries) {
      const part = new Bytes()
        .push(Buffer.from(data.buffer, data.byteOffset, data.byteLength))
        .pad();
      writeSync(file, part.join());
    }
  } finally {
    closeSync(file);
  }
}
