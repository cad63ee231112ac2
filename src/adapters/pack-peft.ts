// PEFT files → the packed, rank-ordered file; and a prefix of a packed file → PEFT files again. Pure: bytes in, bytes out.

import { GatewayError } from '../errors.ts';
import { type DecoderConfig, projections } from '../model/decoder-config.ts';
import { type SafetensorsTensor, writeSafetensors } from '../model/safetensors.ts';
import type { AdaptedModule, AdapterManifest } from './adapter.ts';
import { pairKinds } from './manifest.ts';
import type { PackedAdapter } from './pack.ts';
import { type LevelRule, packPairs, prefixOf, ranksAt } from './pack-pairs.ts';
import { type PeftInput, readPeft } from './peft.ts';
import { formatTensorName, moduleName, peftRowOrder, targetName } from './peft-names.ts';
import type { ExportedFiles } from './registry.ts';
import { squeezeModule } from './squeeze.ts';

export interface PackedPeft {
  readonly manifest: AdapterManifest;
  readonly bytes: Uint8Array;
  readonly warnings: readonly string[];
}

/** Throws INVALID_ADAPTER or BASE_MISMATCH. Seconds of compute for large ranks: not for an event loop. */
export function packPeft(input: PeftInput, levels: LevelRule = 'uniform'): PackedPeft {
  const adapter = readPeft(input);
  const { isZero, ...packed } = packPairs(
    adapter.modules.map((module) => ({
      module,
      squeeze: () => squeezeModule(adapter.read(module)),
    })),
    {
      kind: 'lora',
      describe: 'low-rank pairs, ranks ordered by singular value',
      baseHash: input.base.hash,
      source: adapter.source,
      levels,
    },
  );
  const zero = isZero ? ['every B·A is zero: the adapter changes nothing'] : [];
  return { ...packed, warnings: [...adapter.warnings, ...zero] };
}

/** The ranks of level `rank`, in f32 values that equal the served f16 ones. alpha = r, so that PEFT's scale is 1.
 *  Throws UNSUPPORTED for kinds that are no pairs, INVALID_REQUEST for a rank that is not there. */
export function unpackPeft(
  packed: PackedAdapter,
  rank: number,
  base: DecoderConfig,
): ExportedFiles {
  const { manifest } = packed;
  if (!pairKinds.includes(manifest.kind)) {
    const message = `a ${manifest.kind} adapter is more than low-rank pairs: PEFT would compute something else`;
    throw new GatewayError('UNSUPPORTED', message);
  }
  if (!Number.isInteger(rank) || rank < 1 || rank > manifest.rankMax) {
    const message = `rank is ${rank}, the adapter has 1 … ${manifest.rankMax}`;
    throw new GatewayError('INVALID_REQUEST', message, { param: 'rank' });
  }
  const tensors = new Map<string, SafetensorsTensor>();
  const served = manifest.modules
    .map((module, i) => ({ ...module, rank: ranksAt(manifest, i, rank) }))
    .filter((module) => module.rank > 0);
  for (const module of served) {
    const { a, b } = prefixOf(packed, module, module.rank);
    const order = peftRowOrder(base, module.projection);
    const rows = order === null ? b : unpermuted(b, module.rank, order);
    tensors.set(formatTensorName(module, 'A'), f32Tensor(a, [module.rank, module.in]));
    tensors.set(formatTensorName(module, 'B'), f32Tensor(rows, [module.out, module.rank]));
  }
  return {
    configName: 'adapter_config.json',
    config: `${JSON.stringify(exportedConfig({ ...manifest, modules: served }, base), null, 2)}\n`,
    weights: writeSafetensors(tensors, new Map([['format', 'pt']])),
  };
}

function unpermuted(b: Float64Array, kept: number, order: Int32Array): Float64Array {
  const rows = new Float64Array(b.length);
  order.forEach((to, from) => {
    rows.set(b.subarray(from * kept, (from + 1) * kept), to * kept);
  });
  return rows;
}

function f32Tensor(values: Float64Array, shape: readonly number[]): SafetensorsTensor {
  return { dtype: 'F32', shape, data: new Uint8Array(Float32Array.from(values).buffer) };
}

/** Modules of fewer ranks than the widest get them by pattern, and the alpha that keeps their scale at 1. */
function exportedConfig({ modules, source }: AdapterManifest, base: DecoderConfig): unknown {
  const rank = Math.max(...modules.map((module) => module.rank));
  const narrow = modules.filter((module) => module.rank < rank);
  const pattern = Object.fromEntries(
    narrow.map((module) => [moduleName(module).replaceAll('.', '\\.'), module.rank]),
  );
  return {
    peft_type: 'LORA',
    task_type: 'CAUSAL_LM',
    base_model_name_or_path: source.format === 'peft' ? source.baseName : null,
    r: rank,
    lora_alpha: rank,
    rank_pattern: pattern,
    alpha_pattern: pattern,
    target_modules: targetsOf(modules, base),
    lora_dropout: 0,
    bias: 'none',
    fan_in_fan_out: false,
    inference_mode: true,
    init_lora_weights: true,
    use_dora: false,
    use_rslora: false,
    modules_to_save: null,
  };
}

/** Short names when they name these modules only, else each module's own. */
function targetsOf(modules: readonly AdaptedModule[], { blocks }: DecoderConfig): string[] {
  const named = projections.filter((name) => modules.some(({ projection }) => projection === name));
  return modules.length === blocks * named.length ? named.map(targetName) : modules.map(moduleName);
}
