// AdapterManifest ↔ text, checked on the way in: it comes from files and database rows that outlive this program.

import { z } from 'zod';
import { projections } from '../model/decoder-config.ts';
import { type AdapterManifest, adapterKinds, type FamilyOptions, rankMaxLimit } from './adapter.ts';

const rank = z.int().min(1).max(rankMaxLimit);
const size = z
  .int()
  .min(1)
  .max(2 ** 24);

const generation = z.templateLiteral(['sha256:', z.string().regex(/^[0-9a-f]{64}$/)]);

const options = z.strictObject({
  needs: generation.nullable(),
  seed: z
    .string()
    .regex(/^[0-9a-f]{16}$/)
    .nullable(),
  topK: rank.nullable(),
  temperature: z.number().positive().max(1e6).nullable(),
  labels: z.array(z.string().max(1000)).max(256).nullable(),
  blockLayers: z.int().min(1).max(9_999).nullable(),
});

const source = z.discriminatedUnion('format', [
  z.strictObject({
    format: z.literal('peft'),
    rank,
    alpha: z.number().positive(),
    rslora: z.boolean(),
    targetModules: z.array(z.string()).max(10_000),
    baseName: z.string().nullable(),
  }),
  z.strictObject({
    format: z.literal('rankgate'),
    by: z.string().max(200),
    from: z.array(generation).max(64),
    keeps: generation.exactOptional(),
  }),
]);

const schema = z.strictObject({
  format: z.literal('rankgate-adapter/3'),
  kind: z.enum([...adapterKinds, 'basis', 'bank']),
  describe: z.string().max(2000),
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
    .max(100_000),
  rankCurve: z.array(z.number().min(0).max(1)).max(rankMaxLimit),
  levels: z.array(z.array(rank).min(1).max(rankMaxLimit)).max(100_000).nullable(),
  options,
  source,
});

/** Throws an Error that says what is wrong; the caller knows which code that deserves. */
export function parseManifest(text: string): AdapterManifest {
  const manifest: AdapterManifest = schema.parse(JSON.parse(text));
  checkKind(manifest);
  if (manifest.kind === 'bank') return manifest;
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
  checkLevels(manifest);
  return manifest;
}

/** Which options a kind has: those and no others. */
const optionsOf: Readonly<Partial<Record<string, readonly (keyof FamilyOptions)[]>>> = {
  fly: ['seed', 'topK'],
  mora: ['topK', 'temperature'],
  svfit: ['needs'],
  queryable: ['needs', 'topK', 'labels'],
  bank: ['blockLayers'],
};

function checkKind({ kind, modules, rankCurve, options: given }: AdapterManifest): void {
  const wanted = optionsOf[kind] ?? [];
  for (const [key, value] of Object.entries(given)) {
    if ((value === null) === wanted.includes(key as keyof FamilyOptions)) {
      throw new Error(`${kind} with options.${key} ${JSON.stringify(value)}`);
    }
  }
  const isEmpty = modules.length === 0 && rankCurve.length === 0;
  if (isEmpty !== (kind === 'bank')) throw new Error(`${modules.length} modules of a ${kind}`);
  // Beyond a module's own ranks there is nothing to choose from.
  const isRouted = kind === 'fly' || kind === 'mora';
  if (isRouted && modules.some((module) => module.rank < (given.topK ?? 0))) {
    throw new Error(`topK ${given.topK} of a module with fewer ranks`);
  }
}

/** Kinds that are low-rank pairs and nothing else once published: their ranks mean the same alone as together. */
export const pairKinds: readonly string[] = [
  'lora',
  'matryoshka',
  'hydra',
  'flexmore',
  'salt',
  'triangular',
  'eora',
];

function checkLevels({ kind, modules, levels, rankMax }: AdapterManifest): void {
  if (levels === null) return;
  if (!pairKinds.includes(kind)) throw new Error(`levels of a ${kind}`);
  if (levels.length !== modules.length) throw new Error('levels of other modules');
  for (const [i, level] of levels.entries()) {
    const isOrdered = level.every((k, r) => k <= rankMax && k >= (level[r - 1] ?? 1));
    if (level.length !== modules[i]!.rank || !isOrdered) {
      throw new Error(`the levels of module ${i} do not rise over its ranks`);
    }
  }
}

export function formatManifest(manifest: AdapterManifest): string {
  return JSON.stringify(manifest);
}
