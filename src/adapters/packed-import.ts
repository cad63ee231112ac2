// A packed file that was made elsewhere (`rankgate adapters extract`, `compensate`, a trainer), let in as it is: its ranks are in
// an order that an import would lose. Its hash proves nothing about who made it: what packing guarantees beyond what
// every reader checks (pack.ts: header, manifest, finite numbers) is checked here, the base and every module's place in it.

import { GatewayError } from '../errors.ts';
import { projectionShape } from '../model/decoder-config.ts';
import { pairKinds } from './manifest.ts';
import { generationOf, openPacked, type PackedAdapter } from './pack.ts';
import type { Packed } from './pack-pairs.ts';
import type { AdapterBase } from './peft.ts';
import { moduleName } from './peft-names.ts';

/** The rankgate.json beside a packed file, which is the directory's adapter_model.safetensors. */
export const packedConfig = '{"kind":"packed"}\n';

/** Kinds that are served from one file. */
const wholeKinds = [...pairKinds, 'fly', 'mora'];

/** Throws INVALID_ADAPTER, BASE_MISMATCH, or UNSUPPORTED for a kind that needs another file. Borrows `weights`. */
export function importPacked(config: string, weights: Uint8Array, base: AdapterBase): Packed {
  if (config.trim() !== packedConfig.trim()) {
    const message = `rankgate.json: only ${packedConfig.trim()} is supported`;
    throw new GatewayError('UNSUPPORTED', message);
  }
  const packed = open(weights);
  const { kind, baseHash, modules } = packed.manifest;
  if (!wholeKinds.includes(kind)) {
    throw new GatewayError('UNSUPPORTED', `a packed file of kind ${kind} cannot be imported`);
  }
  if (baseHash !== base.hash) {
    const [theirs, ours] = [baseHash, base.hash].map((hash) => hash.slice(0, 12));
    throw new GatewayError('BASE_MISMATCH', `made for the base ${theirs}…, this one is ${ours}…`);
  }
  for (const module of modules) {
    const { block, projection, in: width, out } = module;
    const shape = projectionShape(base.config, projection);
    if (block >= base.config.blocks || width !== shape.in || out !== shape.out) {
      const message = `${moduleName(module)} is ${out}×${width}, which this base does not have`;
      throw new GatewayError('INVALID_ADAPTER', message);
    }
  }
  return { manifest: packed.manifest, bytes: weights };
}

/** What came beside a packed file is what it names. Nothing may come: it is served all the same. Throws INVALID_ADAPTER. */
export function checkKept({ manifest: { source } }: Packed, kept: Uint8Array | null): void {
  const named = source.format === 'rankgate' ? source.keeps : undefined;
  if (kept === null || generationOf(kept) === named) return;
  const message = 'the .coso.safetensors beside it is not what its manifest names';
  throw new GatewayError('INVALID_ADAPTER', message);
}

function open(bytes: Uint8Array): PackedAdapter {
  try {
    return openPacked(bytes, generationOf(bytes));
  } catch (cause) {
    if (!(cause instanceof GatewayError) || cause.code !== 'ADAPTER_CORRUPT') throw cause;
    throw new GatewayError('INVALID_ADAPTER', cause.message, { cause });
  }
}
