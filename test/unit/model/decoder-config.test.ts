import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { GatewayError } from '../../../src/errors.ts';
import { memorySource } from '../../../src/model/byte-source.ts';
import {
  type DecoderConfig,
  expectedTensors,
  readDecoderConfig,
} from '../../../src/model/decoder-config.ts';
import { openGguf, readGguf } from '../../../src/model/gguf.ts';
import { buildTinyLlama, type LlamaSpec } from '../../support/gguf-builder.ts';

const read = (change: Partial<LlamaSpec> = {}): DecoderConfig =>
  readDecoderConfig(readGguf(memorySource(buildTinyLlama(change), 'INVALID_MODEL_FILE')));

function errorOf(change: Partial<LlamaSpec>): { code: string; message: string } {
  try {
    read(change);
  } catch (error) {
    if (error instanceof GatewayError) return { code: error.code, message: error.message };
    throw error;
  }
  throw new Error('it was accepted');
}

const u32 = (value: number) => ({ type: 'u32', value }) as const;
const f32 = (value: number) => ({ type: 'f32', value }) as const;
const text = (value: string) => ({ type: 'string', value }) as const;

describe('readDecoderConfig', () => {
  it('reads every number, with the defaults of the format', () => {
    const wanted: DecoderConfig = {
      family: 'llama',
      name: 'tiny',
      blocks: 1,
      width: 8,
      heads: 2,
      kvHeads: 1,
      headSize: 4,
      ffnWidth: 12,
      vocabSize: 16,
      contextLength: 64,
      ropeSize: 4,
      ropeBase: 10_000,
      ropeStyle: 'norm',
      normEps: Math.fround(1e-5),
      tiedEmbeddings: true,
    };
    expect(read()).toEqual(wanted);
    const absent = { 'llama.rope.freq_base': null, 'llama.rope.dimension_count': null };
    expect(read({ keys: { ...absent, 'general.name': null } })).toEqual({
      ...wanted,
      name: 'llama',
    });
    const whole = { 'llama.attention.key_length': u32(4), 'llama.attention.value_length': u32(4) };
    expect(read({ keys: { ...whole, 'llama.rope.scaling.type': text('none') } })).toEqual(wanted);
    expect(read({ shapes: { 'output.weight': [8, 16] } }).tiedEmbeddings).toBe(false);
    const half = read({ keys: { 'llama.rope.dimension_count': u32(2) } });
    expect(half.ropeSize).toBe(2);
  });

  it('has no key heads of its own where the file has none: as many as heads', () => {
    const shapes = { 'blk.0.attn_k.weight': [8, 8], 'blk.0.attn_v.weight': [8, 8] };
    expect(read({ keys: { 'llama.attention.head_count_kv': null }, shapes }).kvHeads).toBe(2);
  });

  it.each<[string, LlamaSpec['keys'], RegExp]>([
    ['another architecture', { 'general.architecture': text('qwen2') }, /"qwen2" \(llama is\)/],
    ['a mixture of experts', { 'llama.expert_count': u32(8) }, /mixture of experts/],
    ['a split model', { 'split.count': { type: 'u16', value: 3 } }, /split\.count/],
    ['linear RoPE scaling', { 'llama.rope.scaling.type': text('linear') }, /scaling "linear"/],
    ['YaRN', { 'llama.rope.scaling.type': text('yarn') }, /scaling "yarn"/],
    ['a scale without a type', { 'llama.rope.scaling.factor': f32(4) }, /scaling by 4/],
    ["an old file's scale", { 'llama.rope.scale_linear': f32(2) }, /scale_linear/],
    ['long keys', { 'llama.attention.key_length': u32(8) }, /key_length 8 beside a head size of 4/],
    ['long values', { 'llama.attention.value_length': u32(2) }, /value_length 2/],
  ])('refuses %s as UNSUPPORTED, naming it', (_, keys, message) => {
    const error = errorOf({ keys });
    expect(error.code).toBe('UNSUPPORTED');
    expect(error.message).toMatch(message);
  });

  it.each([
    ['rope_freqs.weight', /frequency factors/],
    ['blk.0.attn_q.bias', /"blk\.0\.attn_q\.bias"/],
    ['blk.0.attn_q_norm.weight', /no use for/],
    ['blk.1.attn_norm.weight', /no use for/],
  ])('refuses the tensor %s as UNSUPPORTED', (name, message) => {
    const error = errorOf({ shapes: { [name]: [8] } });
    expect(error.code).toBe('UNSUPPORTED');
    expect(error.message).toMatch(message);
  });

  it.each<[string, LlamaSpec['keys'], RegExp]>([
    ['no architecture', { 'general.architecture': null }, /general\.architecture/],
    ['no blocks', { 'llama.block_count': u32(0) }, /block_count is 0/],
    ['too many blocks', { 'llama.block_count': u32(4_294_967_295) }, /block_count is 4294967295/],
    ['no width', { 'llama.embedding_length': null }, /embedding_length/],
    [
      'a width that heads do not divide',
      { 'llama.embedding_length': u32(9) },
      /multiple of 2 heads/,
    ],
    ['no heads', { 'llama.attention.head_count': u32(0) }, /head_count is 0/],
    [
      'key heads that do not divide',
      { 'llama.attention.head_count': u32(8), 'llama.attention.head_count_kv': u32(3) },
      /multiple of 3 key heads/,
    ],
    ['a negative size', { 'llama.context_length': { type: 'i32', value: -1 } }, /context_length/],
    ['a size as text', { 'llama.context_length': text('64') }, /context_length/],
    [
      'a list of sizes',
      { 'llama.attention.head_count_kv': { type: 'array', of: 'u32', values: [1] } },
      /head_count_kv/,
    ],
    ['an odd rotation', { 'llama.rope.dimension_count': u32(3) }, /3 is odd/],
    [
      'a rotation wider than the head',
      { 'llama.rope.dimension_count': u32(6) },
      /dimension_count is 6/,
    ],
    ['a base of 0', { 'llama.rope.freq_base': f32(0) }, /freq_base is 0/],
    ['an infinite base', { 'llama.rope.freq_base': f32(Number.POSITIVE_INFINITY) }, /freq_base/],
    ['no epsilon', { 'llama.attention.layer_norm_rms_epsilon': null }, /rms_epsilon/],
    [
      'an epsilon of NaN',
      { 'llama.attention.layer_norm_rms_epsilon': f32(Number.NaN) },
      /rms_epsilon/,
    ],
    ['an epsilon of 2', { 'llama.attention.layer_norm_rms_epsilon': f32(2) }, /rms_epsilon is 2/],
  ])('refuses %s as INVALID_MODEL_FILE, naming it', (_, keys, message) => {
    const error = errorOf({ keys });
    expect(error.code).toBe('INVALID_MODEL_FILE');
    expect(error.message).toMatch(message);
  });

  it('refuses each tensor that is missing or misshapen, with what was got and wanted', () => {
    for (const [name, shape] of expectedTensors(read())) {
      const missing = errorOf({ shapes: { [name]: null } });
      expect(missing.code).toBe('INVALID_MODEL_FILE');
      expect(missing.message).toContain(name);
      // One row more; for token_embd that is another vocabulary, so its other axis.
      const wrong = name === 'token_embd.weight' ? [9, 16] : shape.with(-1, shape.at(-1)! + 1);
      const misshapen = errorOf({ shapes: { [name]: wrong } });
      expect(misshapen.code).toBe('INVALID_MODEL_FILE');
      expect(misshapen.message).toContain(`${name} is ${wrong.join('×')}, want ${shape.join('×')}`);
    }
  });

  it('ignores trailing axes of size 1, as the format does', () => {
    expect(read({ shapes: { 'output_norm.weight': [8, 1, 1] } }).width).toBe(8);
  });

  it('reads a file that gguf-py wrote', () => {
    using file = openGguf(join(import.meta.dirname, '../../golden/tiny/tiny-f32.gguf'));
    const config = readDecoderConfig(file);
    expect(config).toMatchObject({ blocks: 2, width: 64, heads: 4, kvHeads: 2, headSize: 16 });
    expect(config).toMatchObject({ ffnWidth: 96, vocabSize: 320 });
  });
});
