// A PEFT LoRA (adapter_config.json and adapter_model.safetensors) → checked modules on our base. Nothing is applied in
// part: every tensor must belong to a module of the base that the config targets, with the shape the config says, or
// the adapter is refused (faults.md B29, B30; peers.md 2.C).

import { GatewayError } from '../errors.ts';
import { type DecoderConfig, projectionShape, projections } from '../model/decoder-config.ts';
import { readSafetensors, type SafetensorsTensor, toFloat32 } from '../model/safetensors.ts';
import type { ModuleRef } from '../model/stepper.ts';
import type { AdapterManifest } from './adapter.ts';
import { judgeBaseName } from './base-name.ts';
import { type PeftConfig, parsePeftConfig } from './peft-config.ts';
import { type Factor, moduleName, parseTensorName, peftRowOrder } from './peft-names.ts';
import type { LoraModule } from './squeeze.ts';

/** What an adapter is checked against. Plain data: it crosses to the import worker. */
export interface AdapterBase {
  readonly config: DecoderConfig;
  /** SHA-256 of the model file, hex. */
  readonly hash: string;
  /** Names under which the base is known: general.name, general.basename, its file's name. */
  readonly names: readonly string[];
}

export interface PeftInput {
  readonly config: string;
  readonly weights: Uint8Array;
  readonly base: AdapterBase;
  /** base_model_name_or_path that is accepted whatever the base's names are. */
  readonly acceptBaseName: string | null;
}

export interface PeftAdapter {
  /** In the base's order: by block, then by projection. */
  readonly modules: readonly ModuleRef[];
  readonly source: AdapterManifest['source'];
  readonly warnings: readonly string[];
  /** The factors in f64, rows in the base's order. Throws INVALID_ADAPTER for a value that is not finite. */
  read(module: ModuleRef): LoraModule;
}

/** Throws INVALID_ADAPTER or BASE_MISMATCH. Borrows `weights`: `read` looks into it. */
export function readPeft(input: PeftInput): PeftAdapter {
  const config = parsePeftConfig(input.config);
  const warnings = [...config.warnings, ...checkBaseName(config, input)];
  refusePickle(input.weights);
  const { tensors } = readSafetensors(input.weights);
  const pairs = matchTensors(tensors, config, input.base.config);
  const modules = modulesOf(input.base.config).filter((module) => pairs.has(moduleName(module)));
  const targeted = modulesOf(input.base.config).filter((m) => config.targets(moduleName(m)));
  if (targeted.length > modules.length) {
    const count = targeted.length - modules.length;
    warnings.push(`${count} targeted modules have no tensors and stay as in the base`);
  }
  const { rank, alpha, rslora, targetModules, baseName } = config;
  return {
    modules,
    source: { format: 'peft', rank, alpha, rslora, targetModules, baseName },
    warnings,
    read(module) {
      const name = moduleName(module);
      const scale = config.scaleOf(name);
      return readModule(module, { pair: pairs.get(name)!, scale, base: input.base.config });
    },
  };
}

function checkBaseName({ baseName }: PeftConfig, { base, acceptBaseName }: PeftInput): string[] {
  if (baseName === null || baseName === '' || baseName === acceptBaseName) return [];
  const theirs = JSON.stringify(baseName.slice(0, 200));
  const ours = base.names.map((name) => JSON.stringify(name)).join(', ');
  switch (judgeBaseName(baseName, base.names)) {
    case 'same':
      return [];
    case 'unclear':
      return [`base_model_name_or_path ${theirs} may be another model than this base (${ours})`];
    case 'other':
      throw new GatewayError(
        'BASE_MISMATCH',
        `base_model_name_or_path is ${theirs}, this base is ${ours}; ` +
          `to import it all the same, repeat the name as accept_base_name`,
        { param: 'base_model_name_or_path' },
      );
  }
}

/** torch.save writes a zip or a bare pickle. Neither can be a safetensors file: as header lengths they are too large. */
function refusePickle(bytes: Uint8Array): void {
  const isZip = bytes[0] === 0x50 && bytes[1] === 0x4b;
  const isPickle = bytes[0] === 0x80 && bytes[1]! >= 2 && bytes[1]! <= 5 && bytes[7] !== 0;
  if (!isZip && !isPickle) return;
  const kind = isZip ? 'an archive' : 'a pickle';
  throw new GatewayError('INVALID_ADAPTER', `the weights are ${kind}: safetensors only`);
}

function modulesOf({ blocks }: DecoderConfig): ModuleRef[] {
  return Array.from({ length: blocks }, (_, block) =>
    projections.map((projection) => ({ block, projection })),
  ).flat();
}

interface Pair {
  A?: SafetensorsTensor;
  B?: SafetensorsTensor;
}

function matchTensors(
  tensors: ReadonlyMap<string, SafetensorsTensor>,
  config: PeftConfig,
  base: DecoderConfig,
): ReadonlyMap<string, Required<Pair>> {
  const pairs = new Map<string, Pair>();
  const strangers: string[] = [];
  for (const [name, tensor] of tensors) {
    const parsed = parseTensorName(name);
    if (parsed === null || parsed.block >= base.blocks || !config.targets(moduleName(parsed))) {
      strangers.push(name);
      continue;
    }
    const module = moduleName(parsed);
    const pair = pairs.get(module) ?? {};
    if (pair[parsed.factor] !== undefined)
      refuse(`${module}.lora_${parsed.factor}`, 'is there twice');
    checkShape(parsed, { tensor, rank: config.rankOf(module), base });
    pair[parsed.factor] = tensor;
    pairs.set(module, pair);
  }
  if (strangers.length > 0 || tensors.size === 0) refuseStrangers(strangers, tensors.size);
  for (const [module, { A, B }] of pairs) {
    if (A === undefined || B === undefined) refuse(module, `has no lora_${A ? 'B' : 'A'}`);
  }
  return pairs as ReadonlyMap<string, Required<Pair>>;
}

function refuse(name: string, what: string): never {
  throw new GatewayError('INVALID_ADAPTER', `${name} ${what}`);
}

function refuseStrangers(names: readonly string[], count: number): never {
  const shown = names.slice(0, 3).map((name) => JSON.stringify(name.slice(0, 120)));
  const rest = names.length > 3 ? ` and ${names.length - 3} more` : '';
  refuse(
    `${count - names.length} of ${count} tensors`,
    count === 0
      ? 'matched: the file is empty'
      : `matched modules that the base has and target_modules names; not ${shown.join(', ')}${rest}`,
  );
}

interface ShapeCheck {
  readonly tensor: SafetensorsTensor;
  readonly rank: number;
  readonly base: DecoderConfig;
}

function checkShape(
  module: ModuleRef & { readonly factor: Factor },
  { tensor, rank, base }: ShapeCheck,
): void {
  const name = `${moduleName(module)}.lora_${module.factor}`;
  const sizes = projectionShape(base, module.projection);
  const want = module.factor === 'A' ? [rank, sizes.in] : [sizes.out, rank];
  const got = tensor.shape.join(', ');
  if (got !== want.join(', '))
    refuse(name, `is [${got}], the base and the config want [${want.join(', ')}]`);
  const isFloat = ['F64', 'F32', 'F16', 'BF16'].includes(tensor.dtype);
  if (!isFloat) refuse(name, `has dtype ${tensor.dtype}, not one of floats`);
}

interface ModuleInput {
  readonly pair: Required<Pair>;
  readonly scale: number;
  readonly base: DecoderConfig;
}

function readModule(module: ModuleRef, { pair, scale, base }: ModuleInput): LoraModule {
  const sizes = projectionShape(base, module.projection);
  const rank = pair.A.shape[0]!;
  const a = finiteValues(pair.A, `${moduleName(module)}.lora_A`); // [rank, in]
  const theirs = finiteValues(pair.B, `${moduleName(module)}.lora_B`); // [out, rank]
  const order = peftRowOrder(base, module.projection);
  if (order === null) return { ...sizes, rank, scale, a, b: theirs };
  const b = new Float64Array(theirs.length);
  order.forEach((from, to) => {
    b.set(theirs.subarray(from * rank, (from + 1) * rank), to * rank);
  });
  return { ...sizes, rank, scale, a, b };
}

function finiteValues(tensor: SafetensorsTensor, name: string): Float64Array {
  const values = Float64Array.from(toFloat32(tensor));
  const bad = values.findIndex((value) => !Number.isFinite(value));
  if (bad >= 0) refuse(name, `has a value that is not finite at ${bad}`);
  return values;
}
