// One page of rows that are numbered as they come, as OpenAI's lists are read: `after` an id, so many, in an order.

import type { OwnDatabase } from '../database.ts';
import { GatewayError } from '../errors.ts';
import type { Page, PageWish, Viewer } from './job.ts';

/** Of `files` or `jobs`, as `viewer` sees them. Throws INVALID_REQUEST when `after` is none of theirs. */
export function readPage<Row>(
  db: OwnDatabase,
  table: 'files' | 'jobs',
  viewer: Viewer,
  { after, limit, order }: PageWish,
): Page<Row> {
  const theirs = '(? IS NULL OR owner = ?)';
  let from: number | null = null;
  if (after !== null) {
    const last = db.sql(`SELECT number FROM ${table} WHERE id = ? AND ${theirs}`);
    const row = last.get(after, viewer, viewer) as { number: number } | undefined;
    if (row === undefined) throw noSuchAfter();
    from = row.number;
  }
  const next = order === 'asc' ? 'number > ? ORDER BY number' : 'number < ? ORDER BY number DESC';
  const rows = db
    .sql(`SELECT * FROM ${table} WHERE ${theirs} AND ${next} LIMIT ?`)
    .all(viewer, viewer, from ?? (order === 'asc' ? 0 : Number.MAX_SAFE_INTEGER), limit + 1);
  return cutPage(rows as Row[], limit);
}

/** `rows` were read one beyond `limit`, which tells whether there are more. */
export function cutPage<Row>(rows: readonly Row[], limit: number): Page<Row> {
  return { items: rows.slice(0, limit), hasMore: rows.length > limit };
}

export function noSuchAfter(): GatewayError {
  return new GatewayError('INVALID_REQUEST', 'after: no item of this list', { param: 'after' });
}
