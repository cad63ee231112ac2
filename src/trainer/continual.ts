// What a recipe's continual learning takes from the generation that it goes on from, and leaves to the next: the bases of coso.ts,
// in a file beside the packed one, whose hash the packed file's manifest has. So a generation says what it keeps, and bases
// that are lost or another's are noticed.

import { readFile } from 'node:fs/promises';
import { keptPath } from '../adapters/blobs.ts';
import type { Columns } from '../adapters/orthogonal.ts';
import { generationOf, type PackedAdapter } from '../adapters/pack.ts';
import { GatewayError } from '../errors.ts';
import type { Recipe } from '../jobs/recipe.ts';
import { tensorName } from '../model/trained-delta.ts';
import { type Coso, createCoso } from './coso.ts';
import { readBases } from './coso-file.ts';
import type { ParameterShape } from './optimizers/optimizer.ts';

/** By the names of the A's that they are for. */
export type Bases = ReadonlyMap<string, Columns>;

/** Those of the packed file at this path; none where its training kept none. Throws INVALID_ADAPTER when they are not there. */
export async function readKept(path: string, { manifest }: PackedAdapter): Promise<Bases> {
  const { source, modules } = manifest;
  const wanted = source.format === 'rankgate' ? source.keeps : undefined;
  if (wanted === undefined) return new Map();
  const file = await readFile(keptPath(path)).catch(() => null);
  if (file === null || generationOf(file) !== wanted) {
    const message = 'what its training must not forget is not beside the adapter to go on from';
    throw new GatewayError('INVALID_ADAPTER', message);
  }
  const bases = readBases(file);
  for (const module of modules) {
    const rows = bases.get(tensorName(module, 'a'))?.rows ?? module.in;
    if (rows !== module.in) throw new GatewayError('INVALID_ADAPTER', `coso: ${rows} inputs`);
  }
  return bases;
}

export function directionsIn(bases: Bases): number {
  return Array.from(bases.values()).reduce((sum, { columns }) => sum + columns, 0);
}

/** null where the recipe wants none. */
export function cosoOf(
  { continual, optimizer }: Recipe,
  parameters: readonly ParameterShape[],
  bases: Bases,
): Coso | null {
  if (continual === null) return null;
  if (optimizer.name !== 'adamw') throw new GatewayError('INTERNAL', 'coso steps as adamw does');
  return createCoso({ ...continual, ...optimizer }, parameters, bases);
}
