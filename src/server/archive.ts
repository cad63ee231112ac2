// The archive at the API: the map as JSON or as a picture, evaluations into it, and the reading of a request's cell. A row
// is a tenant's or everybody's: what a tenant says fills its own row, and its requests read that before the shared one. An
// elite whose name has moved to another generation is not current: it was measured on something else.

import type { Context } from 'hono';
import { z } from 'zod';
import { rankMaxLimit, tenantOf } from '../adapters/adapter.ts';
import type { Registry } from '../adapters/registry.ts';
import { publish } from '../channels.ts';
import { GatewayError } from '../errors.ts';
import {
  type Archive,
  type ArchiveRows,
  archiveFigures,
  type Elite,
  type IsCurrent,
  ownerOf,
} from '../router/archive.ts';
import type { ArchiveScores } from '../router/archive-scores.ts';
import { budgetMsMax, wholeMs } from '../router/budget.ts';
import type { Budget, Plan } from '../router/policy.ts';
import { adapterName } from './adapters.ts';
import { drawArchive } from './archive-picture.ts';
import type { Caller } from './auth.ts';
import type { Target } from './blend.ts';
import type { ServerDeps } from './deps.ts';
import type { Env } from './env.ts';
import { readBody } from './limits.ts';
import { answerPage } from './page.ts';
import { HttpError, invalidRequest } from './problem.ts';
import { domainName } from './schemas.ts';

/** The map, the scores that are on their way into it, and the file that it is kept in. */
export interface ArchiveDeps {
  readonly map: Archive;
  readonly scores: ArchiveScores;
  /** Resolves when the map as it is now is on disk. Rejects with DISK_FULL or INTERNAL. */
  save(): Promise<void>;
}

const candidateSchema = z.strictObject({
  domain: domainName,
  /** null: the base model alone. */
  adapter: adapterName.nullable(),
  rank: z.int().min(0).max(rankMaxLimit),
  latency_ms: z.number().positive().max(budgetMsMax),
  objective: z.number().min(0).max(1),
});
const offerSchema = z.strictObject({ candidates: z.array(candidateSchema).min(1).max(256) });

/** A tenant's adapter, and whatever a tenant says: the tenant's row. */
export function rowOf(adapter: string | null, domain: string, { namespace }: Caller): string {
  const owner = (adapter === null ? null : tenantOf(adapter)) ?? namespace ?? '';
  return `${owner}/${domain}`;
}

export function currentIn(registry: Registry): IsCurrent {
  return ({ adapter, generation }) =>
    adapter === null || registry.find(adapter)?.generation === generation;
}

function visibleRows({ map }: ArchiveDeps, { namespace, isOperator }: Caller): ArchiveRows {
  return map.rows().filter(([row]) => isOperator || ['', namespace].includes(ownerOf(row)));
}

const rowView = (row: string): { tenant: string | null; domain: string } => ({
  tenant: ownerOf(row) || null,
  domain: row.slice(row.indexOf('/') + 1),
});

export function showArchive(c: Context<Env>, { archive, registry }: ServerDeps): Response {
  const rows = visibleRows(archive, c.get('caller'));
  const isCurrent = currentIn(registry);
  const { map } = archive;
  const bounds = Array.from({ length: map.cells }, (_, cell) => map.bounds(cell));
  c.header('vary', 'accept');
  if (c.req.header('accept')?.includes('text/html') === true) {
    return answerPage(c, 'archive', drawArchive(rows, bounds, isCurrent));
  }
  const data = rows.flatMap(([row, elites]) =>
    elites.flatMap((elite, cell) => {
      if (elite === null) return [];
      const { latencyMs, ...rest } = elite;
      const current = isCurrent(elite);
      return [{ ...rowView(row), cell, ...rest, latency_ms: latencyMs, current }];
    }),
  );
  const { elites, coverage, qdScore } = archiveFigures(rows);
  return c.json({
    object: 'adapter.archive',
    latency_cells_ms: bounds,
    domains: rows.length,
    elites,
    coverage,
    qd_score: qdScore,
    data,
  });
}

/** Evaluations. All candidates are checked before the first is offered; what is acknowledged is on disk. */
export async function offerToArchive(c: Context<Env>, deps: ServerDeps): Promise<Response> {
  const { archive, registry } = deps;
  const { candidates } = await readBody(c, deps, offerSchema);
  const offers = candidates.map((one, i) => {
    const elite = eliteOf(one, `candidates[${i}]`, registry);
    return { row: rowOf(elite.adapter, one.domain, c.get('caller')), elite };
  });
  const isCurrent = currentIn(registry);
  const data = offers.map(({ row, elite }) => {
    const status = archive.map.offer(row, elite, isCurrent);
    publish('archive-offer', { from: 'evaluation', status });
    return { ...rowView(row), cell: archive.map.cellOf(elite.latencyMs), status };
  });
  await archive.save();
  return c.json({ object: 'list', data });
}

function eliteOf(
  candidate: z.infer<typeof candidateSchema>,
  param: string,
  registry: Registry,
): Elite {
  const { adapter, rank, latency_ms: latencyMs, objective } = candidate;
  if (adapter === null) {
    if (rank !== 0) throw invalidRequest(`${param}.rank: the base has rank 0`, `${param}.rank`);
    return { adapter, generation: null, kind: 'base', rank, objective, latencyMs };
  }
  const record = registry.find(adapter);
  if (record === null) {
    const message = `${param}.adapter: there is no such adapter`;
    throw new GatewayError('ADAPTER_NOT_FOUND', message, { param: `${param}.adapter` });
  }
  const { name, generation, manifest } = record;
  if (rank < 1 || rank > manifest.rankMax) {
    throw invalidRequest(`${param}.rank: want 1 to ${manifest.rankMax}`, `${param}.rank`);
  }
  return { adapter: name, generation, kind: manifest.kind, rank, objective, latencyMs };
}

/** A row with all that is in it, for a mistake in an evaluation: nothing else makes a cell worse. The operator names a
 *  tenant's row by `?tenant=`. */
export async function removeDomain(c: Context<Env>, { archive }: ServerDeps): Promise<Response> {
  const domain = c.req.param('domain') ?? '';
  const { isOperator, namespace } = c.get('caller');
  const tenant = isOperator ? (c.req.query('tenant') ?? '') : namespace;
  if (!archive.map.remove(`${tenant}/${domain}`)) {
    throw new HttpError(404, 'not_found', 'there is no such domain');
  }
  await archive.save();
  return c.json({ domain, object: 'adapter.archive.row', deleted: true });
}

/** What is told of a plan: a rank that the archive limits is its cell's, of an adapter that may have more. */
export function shownPlan(
  { rank, rankMax, reason }: Plan,
  { rankLimit, parts }: Target,
): { rank: number; rankMax: number; reason: string } {
  if (rankLimit === null) return { rank, rankMax, reason };
  const isCells = rank === rankLimit && reason !== 'infeasible';
  const whole = parts[0]!.lease.manifest.rankMax;
  return { rank, rankMax: whole, reason: isCells ? 'cell' : reason };
}

interface Reading {
  /** With the elite's lease; releases the one it was made from as well. */
  readonly target: Target;
  /** Headers of the answer. */
  readonly headers: Readonly<Record<string, string>>;
}

interface ReadingAsk {
  readonly domain: string;
  readonly budget: Budget;
  readonly tokensMax: number;
  readonly caller: Caller;
}

/** What answers a request for the base with a `domain`: its cell's elite, at most at the rank it was measured at, unless the
 *  caller fixes the rank. A domain that nobody filled is answered by the base, and the header says so. */
export function readCell(
  target: Target,
  { domain, budget, tokensMax, caller }: ReadingAsk,
  { archive, registry }: ServerDeps,
): Reading {
  const budgetMs = wholeMs(budget, tokensMax);
  const isCurrent = currentIn(registry);
  for (const row of new Set([rowOf(null, domain, caller), `/${domain}`])) {
    const found = archive.map.read(row, budgetMs, isCurrent);
    if (found === null) continue;
    publish('archive-read', { match: found.match });
    const { adapter, generation, rank } = found.elite;
    const headers = { 'x-archive-cell': `${domain}/${found.cell}`, 'x-archive-match': found.match };
    if (adapter === null) return { target, headers };
    const lease = registry.lease(`${adapter}@${generation}`);
    const release = (): void => {
      lease.release();
      target.release();
    };
    const parts = [{ lease, weight: 1 }];
    const system = target.system?.generation === lease.generation ? null : target.system; // once is enough
    const rankLimit = budget.rank === null ? rank : null;
    return { target: { ...target, parts, system, rankLimit, release }, headers };
  }
  publish('archive-read', { match: 'none' });
  return { target, headers: { 'x-archive-match': 'none' } };
}

/** What made an answer, for the scores of it that may come. Rank 0 is the base model's answer. */
export function madeBy({ parts }: Target, rank: number): Omit<Elite, 'objective' | 'latencyMs'> {
  const [part] = rank === 0 ? [] : parts;
  if (part === undefined) return { adapter: null, generation: null, kind: 'base', rank: 0 };
  const { name: adapter, generation, manifest } = part.lease;
  return { adapter, generation, kind: manifest.kind, rank };
}
