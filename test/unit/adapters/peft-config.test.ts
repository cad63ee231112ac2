import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { parsePeftConfig } from '../../../src/adapters/peft-config.ts';
import { goldenAdapters, goldenConfig, goldenDirectory } from '../../support/tiny-base.ts';

const plain = {
  peft_type: 'LORA',
  task_type: 'CAUSAL_LM',
  r: 8,
  lora_alpha: 16,
  target_modules: ['q_proj', 'v_proj'],
};
const q = 'model.layers.0.self_attn.q_proj';

function parse(fields: Record<string, unknown>) {
  return parsePeftConfig(JSON.stringify({ ...plain, ...fields }));
}

describe('the scale of every module', () => {
  for (const name of goldenAdapters) {
    it(`is PEFT's own (${name})`, () => {
      const config = parsePeftConfig(goldenConfig(name));
      const text = readFileSync(join(goldenDirectory(name), 'logits.json'), 'utf8');
      const { scaling } = JSON.parse(text) as { scaling: Record<string, number> };
      expect(Object.keys(scaling).length).toBeGreaterThan(1);
      for (const [module, scale] of Object.entries(scaling)) {
        expect(config.targets(module)).toBe(true);
        expect(config.scaleOf(module)).toBe(scale);
      }
      expect(config.warnings).toEqual([]);
    });
  }

  it('takes the first pattern of the file that matches', () => {
    const { rankOf } = parse({ rank_pattern: { 'self_attn.q_proj': 2, q_proj: 4, '.*': 6 } });
    expect([q, 'model.layers.0.mlp.up_proj'].map(rankOf)).toEqual([2, 6]);
  });
});

describe('target modules', () => {
  it.each<[string, Record<string, unknown>, readonly [boolean, boolean, boolean]]>([
    ['names', {}, [true, true, false]],
    ['one whole name', { target_modules: [q] }, [true, false, false]],
    ['part of a name', { target_modules: ['proj'] }, [false, false, false]],
    ['a pattern', { target_modules: '.*layers\\.0\\..*' }, [true, false, true]],
    ['all', { target_modules: 'all-linear' }, [true, true, true]],
    ['but for', { exclude_modules: ['layers.0.self_attn.q_proj'] }, [false, true, false]],
    ['of layers', { layers_to_transform: [3] }, [false, true, false]],
    ['of one layer', { layers_to_transform: 0 }, [true, false, false]],
  ])('%s', (_, fields, wanted) => {
    const modules = [q, 'model.layers.3.self_attn.q_proj', 'model.layers.0.mlp.up_proj'];
    expect(modules.map(parse(fields).targets)).toEqual(wanted);
  });
});

describe('a config that asks for what is not served', () => {
  it.each<[string, unknown]>([
    ['r', 1024],
    ['r', 257],
    ['r', 0],
    ['r', -1],
    ['r', 1.5],
    ['r', '8'],
    ['r', null],
    ['r', undefined],
    ['lora_alpha', 0],
    ['lora_alpha', -2],
    ['lora_alpha', '16'],
    ['lora_alpha', null],
    ['lora_alpha', undefined],
    ['bias', 'all'],
    ['bias', 'lora_only'],
    ['use_dora', true],
    ['use_qalora', true],
    ['use_bdlora', { target_modules_bd_a: ['q_proj'] }],
    ['use_rslora', 'yes'],
    ['lora_bias', true],
    ['fan_in_fan_out', true],
    ['modules_to_save', ['lm_head']],
    ['layer_replication', [[0, 2]]],
    ['trainable_token_indices', [1]],
    ['target_parameters', ['experts.up']],
    ['alora_invocation_tokens', [5]],
    ['megatron_config', { a: 1 }],
    ['kasa_config', { a: 1 }],
    ['init_lora_weights', 'pissa'],
    ['init_lora_weights', 'pissa_niter_16'],
    ['init_lora_weights', 'olora'],
    ['init_lora_weights', 'corda'],
    ['init_lora_weights', 'loftq'],
    ['init_lora_weights', 'lora_ga'],
    ['peft_type', 'LOHA'],
    ['peft_type', undefined],
    ['task_type', 'SEQ_CLS'],
    ['target_modules', null],
    ['target_modules', []],
    ['target_modules', [1]],
    ['target_modules', { q_proj: true }],
    ['layers_pattern', 'h'],
    ['layers_to_transform', ['0']],
    ['rank_pattern', [1]],
    ['alpha_pattern', 'q_proj'],
    ['base_model_name_or_path', 5],
  ])('is refused naming %s = %j', (field, value) => {
    expect(() => parse({ [field]: value })).toThrow(
      expect.objectContaining({
        code: 'INVALID_ADAPTER',
        param: field,
        message: expect.stringContaining(`${field} is ${JSON.stringify(value) ?? 'missing'}`),
      }),
    );
  });

  const { configs } = JSON.parse(readFileSync(join(goldenDirectory('refused.json')), 'utf8')) as {
    configs: Record<string, object>;
  };
  it.each(Object.entries(configs))('is refused as PEFT itself wrote it: %s', (field, config) => {
    expect(() => parsePeftConfig(JSON.stringify(config))).toThrow(
      expect.objectContaining({ code: 'INVALID_ADAPTER', param: field }),
    );
  });

  it('is refused for one bad rank among the patterns', () => {
    expect(() => parse({ rank_pattern: { q_proj: 8, v_proj: 512 } })).toThrow(
      'rank_pattern["v_proj"] is 512',
    );
  });

  it.each([
    ['NaN', '{"lora_alpha": NaN}', 'not JSON'],
    ['nothing', '', 'not JSON'],
    ['a list', '[]', 'not a JSON object'],
    ['deep nesting', '['.repeat(100_000), 'nested deeper'],
  ])('is refused when it is %s', (_, text, message) => {
    expect(() => parsePeftConfig(text)).toThrow(message);
  });
});

describe('fields that are not known', () => {
  it('are reported and never read (peft#3085)', () => {
    const { warnings } = parse({
      auto_mapping: { parent_library: 'os', base_model_class: 'system' },
      megatron_core: 'evil',
      surprise: { nested: 'x'.repeat(500) },
      later_null: null,
    });
    expect(warnings).toHaveLength(1);
    expect(warnings[0]).toMatch(/unknown field "surprise" \(\{"nested":"x+…\)/);
    expect(warnings[0]!.length).toBeLessThan(250);
  });

  it('cannot reach a prototype', () => {
    const text = JSON.stringify(plain).replace('{', '{"__proto__": {"use_dora": true}, ');
    expect(parsePeftConfig(text).warnings).toHaveLength(1);
    expect(({} as { use_dora?: unknown }).use_dora).toBeUndefined();
  });
});
