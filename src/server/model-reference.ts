// What names a model, in the `model` field and elsewhere: `base`, `adapter`, `adapter@sha256:…`, each with an optional `:tier`. Whatever names nothing is
// MODEL_NOT_FOUND; there is no fallback to the base model (design.md section 7).

import { isAdapterName, isGeneration } from '../adapters/adapter.ts';
import type { Lease, Registry } from '../adapters/registry.ts';
import { GatewayError } from '../errors.ts';

export interface Reference {
  readonly asked: string;
  readonly lease: Lease | null;
  readonly tier: string | null;
}

const referencePattern = /^([^@:]+)(?:@(sha256:[^:]+))?(?::([^@:]+))?$/;

/** Leases the adapter; the caller releases it. */
export function resolveModel(
  asked: string,
  known: { readonly modelName: string; readonly tiers: object },
  registry: Registry,
  param = 'model',
): Reference {
  const missing = (): GatewayError => notFound(asked, param);
  const [, name = '', generation, tier = null] = referencePattern.exec(asked) ?? [];
  if (tier !== null && !Object.hasOwn(known.tiers, tier)) throw missing();
  if (name === known.modelName && generation === undefined) return { asked, lease: null, tier };
  if (!isAdapterName(name)) throw missing();
  if (generation !== undefined && !isGeneration(generation)) throw missing();
  try {
    const reference = generation === undefined ? name : `${name}@${generation}`;
    return { asked, lease: registry.lease(reference), tier };
  } catch (error) {
    if (error instanceof GatewayError && error.code === 'ADAPTER_NOT_FOUND') throw missing();
    throw error;
  }
}

export function notFound(asked: string, param = 'model'): GatewayError {
  // Control characters would be escaped by JSON; what a terminal would act on is left out as well.
  const shown = asked.slice(0, 128).replaceAll(/[^\x20-\x7e]/g, '?');
  return new GatewayError('MODEL_NOT_FOUND', `the model '${shown}' does not exist`, { param });
}
