// What an adapter keeps at each rank, and making one of fewer ranks: its AURAC, and LoRA-Squeeze after training (`post`).

import type { Context } from 'hono';
import { z } from 'zod';
import { rankMaxLimit } from '../adapters/adapter.ts';
import { aurac } from '../adapters/aurac.ts';
import { GatewayError } from '../errors.ts';
import { describeAdapter, expectedOf, nameOf, recordOf, unloadUnused } from './adapters.ts';
import type { ServerDeps } from './deps.ts';
import type { Env } from './env.ts';
import { readBody } from './limits.ts';
import { invalidRequest } from './problem.ts';
import { checkMayName } from './tenancy.ts';

const squeezeSchema = z.strictObject({
  rank: z.int().min(1).max(rankMaxLimit).exactOptional(),
  /** Share of each module's energy that stays. */
  variance: z.number().gt(0).lte(1).exactOptional(),
  mode: z.enum(['post', 'cont']).exactOptional(),
});

/** The quality at a rank is the energy that it keeps; a measured one needs an evaluation. */
export function showAurac(c: Context<Env>, deps: ServerDeps): Response {
  const { name, generation, manifest } = recordOf(c, deps);
  const { rankCurve } = manifest;
  if (rankCurve.length === 0) {
    throw new GatewayError('UNSUPPORTED', `an adapter of kind ${manifest.kind} has no ranks`);
  }
  const ranks = rankCurve.map((_, i) => i + 1);
  const areas = aurac(ranks, rankCurve);
  return c.json({
    ...{ object: 'adapter.aurac', name, generation, quality: 'energy' },
    curve: ranks.map((rank, i) => ({ rank, quality: rankCurve[i] })),
    ...areas,
  });
}

/** The name points at the result, unless it was swapped meanwhile; a rollback takes it back. */
export async function squeezeAdapter(c: Context<Env>, deps: ServerDeps): Promise<Response> {
  const { registry, importer } = deps;
  const { generation: before } = recordOf(c, deps);
  const { rank, variance, mode = 'post' } = await readBody(c, deps, squeezeSchema);
  if (mode === 'cont') {
    const message =
      'mode cont trains on afterwards: that is a fine-tuning job whose model is the squeezed adapter';
    throw new GatewayError('UNSUPPORTED', message, { param: 'mode' });
  }
  if ((rank === undefined) === (variance === undefined)) {
    throw invalidRequest('one of rank and variance is wanted', 'rank');
  }
  const expected = expectedOf(c) ?? before;
  if (expected !== before) {
    throw new GatewayError('GENERATION_MISMATCH', `the adapter is at ${before}`);
  }
  checkMayName(nameOf(c), c.get('caller'));
  // Leased: its blob must outlast a swap or a removal that comes in between.
  using lease = registry.lease(`${nameOf(c)}@${before}`);
  const target = rank === undefined ? { variance: variance! } : { rank };
  const { generation } = await importer.squeeze(lease.generation, target);
  const record = registry.swap(nameOf(c), generation, before);
  unloadUnused(before, deps);
  return c.json(describeAdapter(record, deps));
}
