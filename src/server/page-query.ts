// The query of a list, as OpenAI has it: after, limit and, where a list has two ways, order; and what a list answers.

import type { Context } from 'hono';
import type { Page, PageWish } from '../jobs/job.ts';
import type { Env } from './env.ts';
import { invalidRequest } from './problem.ts';

const limitMax = 100;
const limitDefault = 20;

/** `more` are the parameters that the call knows besides; any other is refused by name. */
export function pageWishOf(c: Context<Env>, more: readonly string[] = []): PageWish {
  const known = ['after', 'limit', ...more];
  const unknown = Object.keys(c.req.query()).find((name) => !known.includes(name));
  if (unknown !== undefined) throw invalidRequest(`known parameters: ${known.join(', ')}`);
  const { after = null, limit = String(limitDefault), order = 'desc' } = c.req.query();
  const count = /^[1-9]\d{0,3}$/.test(limit) ? Number(limit) : Number.NaN;
  if (!(count <= limitMax))
    throw invalidRequest(`limit: an integer from 1 to ${limitMax}`, 'limit');
  if (order !== 'asc' && order !== 'desc') throw invalidRequest('order: asc or desc', 'order');
  return { after, limit: count, order };
}

export interface Described {
  readonly id: string;
  readonly [field: string]: unknown;
}

export function listOf<T>({ items, hasMore }: Page<T>, describe: (item: T) => Described): object {
  const data = items.map(describe);
  return {
    object: 'list',
    data,
    first_id: data[0]?.id ?? null,
    last_id: data.at(-1)?.id ?? null,
    has_more: hasMore,
  };
}
