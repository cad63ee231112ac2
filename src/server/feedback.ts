// POST /v1/feedback: how good an answer was, by the id of its body. Counts once, for whoever got the answer: the rank policy
// learns from it, and answers with a `domain` fill the archive. Rows are made by evaluations only: no caller of the
// inference calls can use up the room for domains. What scores changed is on disk within a minute, not at once.

import type { Context } from 'hono';
import { z } from 'zod';
import { currentIn } from './archive.ts';
import type { ServerDeps } from './deps.ts';
import type { Env } from './env.ts';
import { readBody } from './limits.ts';
import { HttpError } from './problem.ts';

const feedbackSchema = z.strictObject({
  /** `id` of the answer. */
  request_id: z.string().min(1).max(128),
  score: z.number().min(0).max(1),
});

export async function takeFeedback(c: Context<Env>, deps: ServerDeps): Promise<Response> {
  const { request_id: id, score } = await readBody(c, deps, feedbackSchema);
  const { map, scores } = deps.archive;
  const scored = scores.score({ id, tenant: c.get('tenant'), score }, (ms) => map.cellOf(ms));
  if (scored === null) {
    throw new HttpError(404, 'not_found', 'there is no answer of this id that waits for a score');
  }
  const { planned, candidate } = scored;
  deps.router.judge({ ...planned, met: null, score });
  const isOffered = candidate !== null && map.has(candidate.row);
  const status = isOffered
    ? map.offer(candidate.row, candidate.elite, currentIn(deps.registry))
    : 'counted';
  return c.json({ object: 'feedback', request_id: id, archive: status });
}
