import { describe, expect, it } from 'vitest';
import { judgeBaseName } from '../../../src/adapters/base-name.ts';
import { type PeftInput, readPeft } from '../../../src/adapters/peft.ts';
import { peftRowOrder } from '../../../src/adapters/peft-names.ts';
import {
  readSafetensors,
  type SafetensorsTensor,
  toFloat32,
  writeSafetensors,
} from '../../../src/model/safetensors.ts';
import { goldenConfig, goldenWeights, tinyBase } from '../../support/tiny-base.ts';

const name = 'plain-r4';

function input(changes: Partial<PeftInput> = {}): PeftInput {
  const files = { config: goldenConfig(name), weights: goldenWeights(name) };
  return { ...files, base: tinyBase, acceptBaseName: 'rankgate/tiny-random', ...changes };
}

/** The golden weights after `change` to their tensors. */
function weights(change: (tensors: Map<string, SafetensorsTensor>) => void): Uint8Array {
  const tensors = new Map(readSafetensors(goldenWeights(name)).tensors);
  change(tensors);
  return writeSafetensors(tensors);
}

function renamed(rename: (name: string) => string): Uint8Array {
  return weights((tensors) => {
    for (const [key, tensor] of [...tensors]) {
      tensors.delete(key);
      tensors.set(rename(key), tensor);
    }
  });
}

const first = 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight';
const firstB = first.replace('lora_A', 'lora_B');

describe('readPeft', () => {
  it('finds every module, in the order of the base', () => {
    const { modules, source, warnings } = readPeft(input());
    const wanted = ['attn_q', 'attn_k', 'attn_v', 'attn_output'];
    expect(modules).toEqual(
      [0, 1].flatMap((block) => wanted.map((projection) => ({ block, projection }))),
    );
    expect(source).toMatchObject({ rank: 4, alpha: 8, rslora: false });
    expect(warnings).toEqual([]);
  });

  it.each<[string, (name: string) => string]>([
    ['without PEFT’s prefix', (key) => key.replace('base_model.model.', '')],
    ['of the inner model', (key) => key.replace('base_model.model.model.', 'base_model.model.')],
    ['with the adapter’s name', (key) => key.replace('.weight', '.default.weight')],
  ])('reads tensor names %s', (_, rename) => {
    const { modules, read } = readPeft(input({ weights: renamed(rename) }));
    expect(modules).toHaveLength(8);
    expect(read(modules[0]!)).toEqual(readPeft(input()).read(modules[0]!));
  });

  it('moves the rows of q and k, and no others, to where the GGUF has them', () => {
    const { read } = readPeft(input());
    const tensors = readSafetensors(goldenWeights(name)).tensors;
    const theirs = toFloat32(tensors.get(firstB)!); // [64, 4]
    const ours = read({ block: 0, projection: 'attn_q' }).b;
    // Head 1 of 4, size 16: channel 3 pairs with channel 11.
    expect(ours.slice((16 + 6) * 4, (16 + 8) * 4)).toEqual(
      Float64Array.from([...theirs.slice(19 * 4, 20 * 4), ...theirs.slice(27 * 4, 28 * 4)]),
    );
    const v = firstB.replace('q_proj', 'v_proj');
    expect(read({ block: 0, projection: 'attn_v' }).b).toEqual(
      Float64Array.from(toFloat32(tensors.get(v)!)),
    );
    const neox = { ...tinyBase.config, ropeStyle: 'neox' } as const;
    expect(peftRowOrder(neox, 'attn_q')).toBeNull();
  });

  it.each<[string, Uint8Array, string]>([
    ['nothing of ours', renamed((key) => key.replace('layers', 'h')), '0 of 16 tensors matched'],
    ['another prefix', renamed((key) => `x.${key}`), '0 of 16 tensors matched'],
    ['one stranger', weights((t) => t.set('lm_head.weight', t.get(first)!)), '16 of 17 tensors'],
    [
      'DoRA magnitudes',
      weights((t) => t.set(first.replace('lora_A.weight', 'lora_magnitude_vector'), t.get(first)!)),
      '16 of 17 tensors',
    ],
    [
      'a module that the config does not target',
      renamed((key) => key.replace('self_attn.o_proj', 'mlp.up_proj')),
      '12 of 16 tensors matched',
    ],
    ['a block too far', renamed((key) => key.replace('layers.1', 'layers.2')), '8 of 16 tensors'],
    ['no tensor', weights((t) => t.clear()), '0 of 0 tensors matched'],
    ['no B', weights((t) => t.delete(firstB)), 'q_proj has no lora_B'],
    ['no A', weights((t) => t.delete(first)), 'q_proj has no lora_A'],
    [
      'a module twice',
      weights((t) => t.set(first.replace('base_model.model.', ''), t.get(first)!)),
      'lora_A is there twice',
    ],
    [
      'another shape',
      weights((t) => t.set(first, { ...t.get(first)!, shape: [64, 4] })),
      'is [64, 4], the base and the config want [4, 64]',
    ],
    [
      'whole numbers',
      weights((t) => t.set(first, { ...t.get(first)!, dtype: 'I32' })),
      'has dtype I32',
    ],
    ['a pickle', Uint8Array.of(0x80, 2, 0x63, 0, 0, 0, 0, 0x71, 1), 'safetensors only'],
    ['an archive', new TextEncoder().encode('PK\u0003\u0004 and more'), 'safetensors only'],
    ['half a file', goldenWeights(name).slice(0, 9000), 'safetensors'],
    ['an empty file', new Uint8Array(), 'safetensors'],
  ])('refuses %s', (_, bytes, message) => {
    expect(() => readPeft(input({ weights: bytes }))).toThrow(
      expect.objectContaining({
        code: 'INVALID_ADAPTER',
        message: expect.stringContaining(message),
      }),
    );
  });

  it('refuses tensors of another rank than the config says', () => {
    const config = JSON.stringify({ ...JSON.parse(goldenConfig(name)), r: 8 });
    expect(() => readPeft(input({ config }))).toThrow('want [8, 64]');
  });

  it.each([Number.NaN, Number.POSITIVE_INFINITY])('refuses a weight that is %s', (value) => {
    const bytes = weights((tensors) => {
      const values = toFloat32(tensors.get(first)!);
      values[7] = value;
      tensors.set(first, { ...tensors.get(first)!, data: new Uint8Array(values.buffer) });
    });
    const { modules, read } = readPeft(input({ weights: bytes }));
    expect(() => modules.map(read)).toThrow('q_proj.lora_A has a value that is not finite at 7');
  });

  it('says which targeted modules have no tensors', () => {
    const bytes = weights((tensors) => {
      for (const key of [...tensors.keys()]) if (key.includes('layers.1')) tensors.delete(key);
    });
    expect(readPeft(input({ weights: bytes })).warnings).toEqual([
      '4 targeted modules have no tensors and stay as in the base',
    ]);
  });
});

describe('the base that an adapter names', () => {
  function named(baseName: string | null, acceptBaseName: string | null = null) {
    const fields = { ...JSON.parse(goldenConfig(name)), base_model_name_or_path: baseName };
    return readPeft(input({ config: JSON.stringify(fields), acceptBaseName }));
  }

  it('may be ours, or nothing', () => {
    expect(named('someone/Rankgate_Tiny-GGUF').warnings).toEqual([]);
    expect(named(null).warnings).toEqual([]);
  });

  it('is only a warning when it is a path', () => {
    expect(named('/data/models/llama').warnings[0]).toContain('may be another model');
  });

  it('is refused when it is another model, unless the caller repeats its name', () => {
    expect(() => named('meta-llama/Llama-3.2-1B')).toThrow(
      expect.objectContaining({
        code: 'BASE_MISMATCH',
        message: expect.stringContaining('accept_base_name'),
      }),
    );
    expect(() => named('meta-llama/Llama-3.2-1B', 'meta-llama/Llama-3.2-3B')).toThrow();
    expect(named('meta-llama/Llama-3.2-1B', 'meta-llama/Llama-3.2-1B').warnings).toEqual([]);
  });

  const smol = ['Smollm2 135M 8k Lc100K Mix1 Ep2', 'SmolLM2-135M-Instruct.Q4_1.gguf'];
  it.each([
    ['HuggingFaceTB/SmolLM2-135M-Instruct', 'same'],
    ['bartowski/SmolLM2-135M-Instruct-GGUF', 'same'],
    ['unsloth/smollm2_135m_instruct', 'same'],
    ['someone/SmolLM2-135M-Instruct-Q4_K_M-GGUF', 'same'],
    ['HuggingFaceTB/SmolLM2-135M', 'unclear'],
    ['./outputs/checkpoint-100', 'unclear'],
    ['HuggingFaceTB/SmolLM2-360M-Instruct', 'other'],
    ['meta-llama/Llama-3.2-1B', 'other'],
  ] as const)('%s is %s', (theirs, wanted) => {
    expect(judgeBaseName(theirs, smol)).toBe(wanted);
  });
});
