// PEFT files → the packed, rank-ordered file; and a prefix of a packed file → PEFT files again. Pure: bytes in, bytes out.

import { GatewayError } from '../errors.ts';
import { f16Values } from '../kernels/half.ts';
import { type DecoderConfig, projections } from '../model/decoder-config.ts';
import { type SafetensorsTensor, writeSafetensors } from '../model/safetensors.ts';
import { type AdaptedModule, type AdapterManifest, noOptions, pageRanks } from './adapter.ts';
import { createPacker, type PackedAdapter } from './pack.ts';
import { type PeftInput, readPeft } from './peft.ts';
import { formatTensorName, moduleName, peftRowOrder, targetName } from './peft-names.ts';
import type { PeftFiles } from './registry.ts';
import { servedPair } from './served.ts';
import { rankCurve, squeezeModule } from './squeeze.ts';

export interface PackedPeft {
  readonly manifest: AdapterManifest;
  readonly bytes: Uint8Array;
  readonly warnings: readonly string[];
}

/** Throws INVALID_ADAPTER or BASE_MISMATCH. Seconds of compute for large ranks: not for an event loop. */
export function packPeft(input: PeftInput): PackedPeft {
  const adapter = readPeft(input);
  const packer = createPacker();
  const sigmas = adapter.modules.map((module) => {
    try {
      const squeezed = squeezeModule(adapter.read(module));
      packer.add(servedPair(module, squeezed));
      return squeezed.sigma;
    } catch (error) {
      if (!(error instanceof GatewayError)) throw error;
      throw new GatewayError(error.code, `${moduleName(module)}: ${error.message}`);
    }
  });
  const curve = rankCurve(sigmas);
  const isZero = sigmas.every((sigma) => sigma[0] === 0);
  const { manifest, bytes } = packer.finish({
    format: 'rankgate-adapter/3',
    kind: 'lora',
    describe: 'low-rank pairs, ranks ordered by singular value',
    baseHash: input.base.hash,
    rankMax: curve.length,
    rankCurve: curve,
    levels: null,
    options: noOptions,
    source: adapter.source,
  });
  const zero = isZero ? ['every B·A is zero: the adapter changes nothing'] : [];
  return { manifest, bytes, warnings: [...adapter.warnings, ...zero] };
}

/** The prefix of uniform rank `rank`, in f32 values that equal the served f16 ones. alpha = r, so that PEFT's scale is 1. */
export function unpackPeft(packed: PackedAdapter, rank: number, base: DecoderConfig): PeftFiles {
  const { manifest } = packed;
  if (!Number.isInteger(rank) || rank < 1 || rank > manifest.rankMax) {
    const message = `rank is ${rank}, the adapter has 1 … ${manifest.rankMax}`;
    throw new GatewayError('INVALID_REQUEST', message, { param: 'rank' });
  }
  const tensors = new Map<string, SafetensorsTensor>();
  for (const module of manifest.modules) {
    const kept = Math.min(rank, module.rank);
    const { a, b } = prefixOf(packed, module, kept);
    const order = peftRowOrder(base, module.projection);
    const rows = order === null ? b : unpermuted(b, kept, order);
    tensors.set(formatTensorName(module, 'A'), f32Tensor(a, [kept, module.in]));
    tensors.set(formatTensorName(module, 'B'), f32Tensor(rows, [module.out, kept]));
  }
  return {
    config: `${JSON.stringify(exportedConfig(manifest, rank, base), null, 2)}\n`,
    weights: writeSafetensors(tensors, new Map([['format', 'pt']])),
  };
}

function prefixOf(
  packed: PackedAdapter,
  module: AdaptedModule,
  kept: number,
): { readonly a: Float32Array; readonly b: Float32Array } {
  const a = new Float32Array(kept * module.in); // [kept, in]
  const b = new Float32Array(module.out * kept); // [out, kept]
  for (let r = 0; r < kept; r++) {
    const page = packed.page(module, Math.floor(r / pageRanks));
    if (page === null) throw new GatewayError('INTERNAL', 'a page is missing');
    const lane = r % pageRanks;
    for (let i = 0; i < module.in; i++) {
      a[r * module.in + i] = f16Values[page.a[lane * module.in + i]!]!;
    }
    for (let o = 0; o < module.out; o++) {
      b[o * kept + r] = f16Values[page.b[lane * module.out + o]!]!;
    }
  }
  return { a, b };
}

function unpermuted(b: Float32Array, kept: number, order: Int32Array): Float32Array {
  const rows = new Float32Array(b.length);
  order.forEach((to, from) => {
    rows.set(b.subarray(from * kept, (from + 1) * kept), to * kept);
  });
  return rows;
}

function f32Tensor(values: Float32Array, shape: readonly number[]): SafetensorsTensor {
  return { dtype: 'F32', shape, data: new Uint8Array(values.buffer) };
}

/** Modules of fewer ranks than `rank` get them by pattern, and the alpha that keeps their scale at 1. */
function exportedConfig(
  { modules, source }: AdapterManifest,
  rank: number,
  base: DecoderConfig,
): unknown {
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
