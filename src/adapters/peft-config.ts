// adapter_config.json of PEFT (0.21.2 is what the goldens were made with) → what import needs. Every field that changes
// what an adapter computes is either honoured or refused by name; a field that is not known is reported, never read.

import { GatewayError } from '../errors.ts';
import { rankMaxLimit } from './adapter.ts';
import { type ModulePattern, parseModulePattern, parseSuffixPattern } from './module-pattern.ts';

export interface PeftConfig {
  readonly rank: number;
  readonly alpha: number;
  readonly rslora: boolean;
  /** As the file has them: names, or one regular expression. */
  readonly targetModules: readonly string[];
  readonly baseName: string | null;
  readonly warnings: readonly string[];
  /** `module` is the base's name of it, e.g. model.layers.0.self_attn.q_proj. */
  targets(module: string): boolean;
  rankOf(module: string): number;
  /** alpha / r, or alpha / √r with rsLoRA, after the patterns. */
  scaleOf(module: string): number;
}

export const configBytesMax: number = 1024 * 1024;
const depthMax = 32;
const patternsMax = 2_000;

type Fields = ReadonlyMap<string, unknown>;

// What these ask for is not what `y += scale·B·A·x` computes, or lies in other tensors than lora_A and lora_B.
const mustBeOff = [
  'alora_invocation_tokens',
  'arrow_config',
  'ensure_weight_tying',
  'fan_in_fan_out',
  'kasa_config',
  'layer_replication',
  'lora_bias',
  'megatron_config',
  'modules_to_save',
  'monteclora_config',
  'target_parameters',
  'trainable_token_indices',
  'use_bdlora',
  'use_dora',
  'use_qalora',
  'velora_config',
] as const;

// Of training, of the tool that wrote the file, or inert unless a field of the list above is on.
const withoutEffect = [
  'auto_mapping',
  'corda_config',
  'eva_config',
  'inference_mode',
  'loftq_config',
  'lora_dropout',
  'lora_ga_config',
  'megatron_core',
  'peft_version',
  'qalora_group_size',
  'revision',
  'runtime_config',
] as const;

const interpreted = [
  'alpha_pattern',
  'base_model_name_or_path',
  'bias',
  'exclude_modules',
  'init_lora_weights',
  'layers_pattern',
  'layers_to_transform',
  'lora_alpha',
  'peft_type',
  'r',
  'rank_pattern',
  'target_modules',
  'task_type',
  'use_rslora',
] as const;

const known: ReadonlySet<string> = new Set([...mustBeOff, ...withoutEffect, ...interpreted]);

// The other initialisations (pissa, olora, corda, loftq, lora_ga) also change the base's weights, which are not here.
const plainInits: ReadonlySet<unknown> = new Set([
  undefined,
  null,
  true,
  false,
  'gaussian',
  'eva',
  'orthogonal',
]);

/** Throws INVALID_ADAPTER naming the field and its value. */
export function parsePeftConfig(text: string): PeftConfig {
  const fields = parseFields(text);
  requireValue(fields, 'peft_type', ['LORA']);
  requireValue(fields, 'task_type', [undefined, null, 'CAUSAL_LM']);
  requireValue(fields, 'bias', [undefined, null, 'none']);
  requireValue(fields, 'layers_pattern', [undefined, null, '', 'layers']);
  const init = fields.get('init_lora_weights');
  if (!plainInits.has(init))
    refuse('init_lora_weights', init, 'the base would have to be changed too');
  for (const name of mustBeOff) if (!isOff(fields.get(name))) refuse(name, fields.get(name));

  const rank = rankField('r', fields.get('r'));
  const alpha = alphaField('lora_alpha', fields.get('lora_alpha'));
  const rslora = booleanField(fields, 'use_rslora');
  const ranks = patternField(fields, 'rank_pattern', rankField);
  const alphas = patternField(fields, 'alpha_pattern', alphaField);
  const rankOf = (module: string): number => firstMatch(ranks, module) ?? rank;
  return {
    rank,
    alpha,
    rslora,
    targetModules: [fields.get('target_modules')].flat().map(String),
    baseName: stringOrNull(fields, 'base_model_name_or_path'),
    warnings: [...fields].filter(([name, value]) => !known.has(name) && !isOff(value)).map(warn),
    targets: targetsOf(fields),
    rankOf,
    scaleOf(module) {
      const r = rankOf(module);
      return (firstMatch(alphas, module) ?? alpha) / (rslora ? Math.sqrt(r) : r);
    },
  };
}

function parseFields(text: string): Fields {
  if (depthOf(text) > depthMax) {
    throw new GatewayError(
      'INVALID_ADAPTER',
      `adapter_config.json is nested deeper than ${depthMax}`,
    );
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw new GatewayError('INVALID_ADAPTER', 'adapter_config.json is not JSON', { cause });
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw new GatewayError('INVALID_ADAPTER', 'adapter_config.json is not a JSON object');
  }
  return new Map(Object.entries(value));
}

/** Deepest nesting, before any parser recurses into it. */
function depthOf(text: string): number {
  let depth = 0;
  let deepest = 0;
  for (const [token] of text.matchAll(/"(?:[^"\\]|\\.)*"|[[\]{}]/gsu)) {
    if (token === '[' || token === '{') deepest = Math.max(deepest, ++depth);
    else if (token === ']' || token === '}') depth--;
  }
  return deepest;
}

function show(value: unknown): string {
  if (value === undefined) return 'missing';
  const text = JSON.stringify(value);
  return text.length > 100 ? `${text.slice(0, 100)}…` : text;
}

function refuse(field: string, value: unknown, why = 'not supported'): never {
  throw new GatewayError('INVALID_ADAPTER', `${field} is ${show(value)}: ${why}`, { param: field });
}

function warn([name, value]: readonly [string, unknown]): string {
  return `adapter_config.json: unknown field ${show(name)} (${show(value)}) has no effect`;
}

function isOff(value: unknown): boolean {
  if (value === undefined || value === null || value === false) return true;
  return typeof value === 'object' && Object.keys(value).length === 0;
}

function requireValue(fields: Fields, field: string, wanted: readonly unknown[]): void {
  const value = fields.get(field);
  if (!wanted.includes(value)) refuse(field, value, `supported: ${show(wanted.at(-1))}`);
}

function rankField(field: string, value: unknown): number {
  const isRank = typeof value === 'number' && Number.isInteger(value) && value >= 1;
  if (!isRank || value > rankMaxLimit) refuse(field, value, `a rank is 1 … ${rankMaxLimit}`);
  return value;
}

function alphaField(field: string, value: unknown): number {
  if (typeof value !== 'number' || !Number.isFinite(value) || value <= 0) {
    refuse(field, value, 'an alpha is a number above 0');
  }
  return value;
}

function booleanField(fields: Fields, field: string): boolean {
  const value = fields.get(field) ?? false;
  if (typeof value !== 'boolean') refuse(field, value, 'true or false');
  return value;
}

function stringOrNull(fields: Fields, field: string): string | null {
  const value = fields.get(field) ?? null;
  if (value !== null && (typeof value !== 'string' || value.length > 1_000)) {
    refuse(field, value, 'a text of at most 1000 characters');
  }
  return value;
}

type Patterns = readonly (readonly [ModulePattern, number])[];

function patternField(
  fields: Fields,
  field: string,
  parse: (field: string, value: unknown) => number,
): Patterns {
  const value = fields.get(field) ?? {};
  if (typeof value !== 'object' || Array.isArray(value)) refuse(field, value, 'an object');
  const entries = Object.entries(value);
  if (entries.length > patternsMax) refuse(field, entries.length, `at most ${patternsMax} entries`);
  return entries.map(([pattern, number]) => [
    parseSuffixPattern(pattern),
    parse(`${field}[${show(pattern)}]`, number),
  ]);
}

/** The first pattern in the file's order wins, as in PEFT's get_pattern_key. */
function firstMatch(patterns: Patterns, module: string): number | undefined {
  return patterns.find(([matches]) => matches(module))?.[1];
}

function targetsOf(fields: Fields): (module: string) => boolean {
  const included = moduleSet(fields, 'target_modules');
  if (included === null) refuse('target_modules', fields.get('target_modules'), 'names are needed');
  const excluded = moduleSet(fields, 'exclude_modules') ?? (() => false);
  const layers = layerSet(fields);
  return (module) => included(module) && !excluded(module) && layers(module);
}

/** Names (whole, or behind a dot), or one expression for the whole name. */
function moduleSet(fields: Fields, field: string): ModulePattern | null {
  const value = fields.get(field) ?? null;
  if (isOff(value)) return null;
  if (value === 'all-linear' && field === 'target_modules') return () => true;
  if (typeof value === 'string') return parseModulePattern(value);
  const isNames = Array.isArray(value) && value.every((name) => typeof name === 'string');
  if (!isNames || value.length > patternsMax) refuse(field, value, 'names or a pattern');
  const names = new Set<string>(value);
  return (module) => suffixesOf(module).some((suffix) => names.has(suffix));
}

function suffixesOf(module: string): string[] {
  const parts = module.split('.');
  return parts.map((_, i) => parts.slice(i).join('.'));
}

function layerSet(fields: Fields): ModulePattern {
  const value = fields.get('layers_to_transform') ?? null;
  const list = [value ?? []].flat();
  if (!list.every((layer) => Number.isSafeInteger(layer))) {
    refuse('layers_to_transform', value, 'whole numbers');
  }
  if (list.length === 0) return () => true;
  const layers = new Set(list);
  return (module) => layers.has(Number(/\.layers\.(\d+)\./.exec(module)?.[1]));
}
