// POST /v1/feedback: how good an answer was, by the id of its body. Counts once, for whoever got the answer: the rank policy
// learns from it, answers with a `domain` fill the archive, and captured ones are learnt from (jobs/capture.ts). Rows are made
// by evaluations only: no caller of the inference calls can use up the room for domains. What scores changed is on disk within a minute, not at once.

import type { Context } from 'hono';
import { z } from 'zod';
import { publish } from '../channels.ts';
import { currentIn } from './archive.ts';
import type { ServerDeps } from './deps.ts';
import type { Env } from './env.ts';
import { readBody } from './limits.ts';
import { HttpError } from './problem.ts';
import { plainText } from './schemas.ts';

const feedbackSchema = z.strictObject({
  /** `id` of the answer. */
  request_id: z.string().min(1).max(128),
  score: z.number().min(0).max(1),
  comment: plainText.pipe(z.string().max(2000)).exactOptional(),
  /** What the answer should have been. */
  correction: plainText
    .pipe(
      z
        .string()
        .min(1)
        .max(64 * 1024),
    )
    .exactOptional(),
});

export async function takeFeedback(c: Context<Env>, deps: ServerDeps): Promise<Response> {
  const body = await readBody(c, deps, feedbackSchema);
  const { request_id: id, score, comment = null, correction = null } = body;
  const { map, scores } = deps.archive;
  const tenant = c.get('tenant');
  const scored = scores.score({ id, tenant, score }, (ms) => map.cellOf(ms));
  const refresher = deps.training?.refresher;
  const isCaptured = refresher?.capture.score(id, tenant, { score, comment, correction }) ?? false;
  if (scored === null && !isCaptured) {
    throw new HttpError(404, 'not_found', 'there is no answer of this id that waits for a score');
  }
  if (scored === null) return c.json(counted(id, 'counted', isCaptured));
  const { planned, candidate, only } = scored;
  if (only !== null) refresher?.noteScore(only.name, only.generation, score);
  deps.router.judge({ ...planned, met: null, score });
  const isOffered = candidate !== null && map.has(candidate.row);
  if (!isOffered) return c.json(counted(id, 'counted', isCaptured));
  const status = map.offer(candidate.row, candidate.elite, currentIn(deps.registry));
  publish('archive-offer', { from: 'feedback', status });
  return c.json(counted(id, status, isCaptured));
}

function counted(id: string, archive: string, captured: boolean): object {
  return { object: 'feedback', request_id: id, archive, captured };
}
