// AdapterManifest ↔ text, checked on the way in: it comes from files and database rows that outlive this program.

import { z } from 'zod';
import { projections } from '../model/decoder-config.ts';
import { type AdapterManifest, rankMaxLimit } from './adapter.ts';

const rank = z.int().min(1).max(rankMaxLimit);
const size = z
  .int()
  .min(1)
  .max(2 ** 24);

const schema = z.strictObject({
  format: z.literal('rankgate-adapter/2'),
  kind: z.literal('lora'),
  baseHash: z.string().regex(/^[0-9a-f]{64}$/),
  rankMax: rank,
  modules: z
    .array(
      z.strictObject({
        block: z.int().min(0).max(9_999),
        projection: z.enum(projections),
        rank,
        in: size,
        out: size,
      }),
    )
    .min(1)
    .max(100_000),
  rankCurve: z.array(z.number().min(0).max(1)).min(1).max(rankMaxLimit),
  source: z.strictObject({
    format: z.literal('peft'),
    rank,
    alpha: z.number().positive(),
    rslora: z.boolean(),
    targetModules: z.array(z.string()).max(10_000),
    baseName: z.string().nullable(),
  }),
});

/** Throws an Error that says what is wrong; the caller knows which code that deserves. */
export function parseManifest(text: string): AdapterManifest {
  const manifest = schema.parse(JSON.parse(text));
  const { modules, rankMax, rankCurve } = manifest;
  if (Math.max(...modules.map((module) => module.rank)) !== rankMax) {
    throw new Error(`rankMax is ${rankMax}, and no module's rank`);
  }
  if (new Set(modules.map((m) => `${m.block}.${m.projection}`)).size !== modules.length) {
    throw new Error('a module is there twice');
  }
  const isCurve = rankCurve.every((share, i) => share >= (rankCurve[i - 1] ?? 0));
  if (!isCurve || rankCurve.length !== rankMax || rankCurve.at(-1) !== 1) {
    throw new Error('rankCurve does not rise to 1 at rankMax');
  }
  return manifest;
}

export function formatManifest(manifest: AdapterManifest): string {
  return JSON.stringify(manifest);
}
