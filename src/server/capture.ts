// What of an adapter's traffic may be learnt from, and its refresh. An adapter's owner switches capture on; a tenant, by any of
// its keys, refuses for all of its own requests, whatever adapter answers them.

import type { Context } from 'hono';
import { z } from 'zod';
import { recordOf } from './adapters.ts';
import type { ServerDeps } from './deps.ts';
import type { Env } from './env.ts';
import { trainingOf } from './files.ts';
import { describeJob } from './fine-tuning.ts';
import { readBody } from './limits.ts';
import { invalidRequest } from './problem.ts';
import { checkMayName } from './tenancy.ts';

const switchSchema = z.strictObject({ capture: z.enum(['on', 'off']) });
const refusalSchema = z.strictObject({ refused: z.boolean() });

/** Acknowledged when it is on disk: what is off stays off. */
export async function refuseCapture(c: Context<Env>, deps: ServerDeps): Promise<Response> {
  const { capture } = trainingOf(deps).refresher;
  const { refused } = await readBody(c, deps, refusalSchema);
  capture.refuse(c.get('tenant'), refused);
  await capture.durable();
  return c.json({ object: 'capture', refused });
}

export async function switchCapture(c: Context<Env>, deps: ServerDeps): Promise<Response> {
  const { capture } = trainingOf(deps).refresher;
  const name = ownedName(c, deps);
  const body = await readBody(c, deps, switchSchema);
  capture.switch(name, body.capture === 'on');
  await capture.durable();
  return showCapture(c, deps);
}

export function showCapture(c: Context<Env>, deps: ServerDeps): Response {
  const { refresher } = trainingOf(deps);
  const name = ownedName(c, deps);
  const { scored, waiting, bytes, seen } = refresher.capture.figures(name);
  const { startedS, job, watch, last } = refresher.notes(name);
  return c.json({
    object: 'adapter.capture',
    adapter: name,
    capture: refresher.capture.isOn(name) ? 'on' : 'off',
    ...{ scored, waiting, bytes, seen },
    refresh: {
      started_at: startedS,
      job,
      on_probation: watch === null ? null : { generation: watch.generation, before: watch.earlier },
      last: last === null ? null : { ...last, atS: undefined, at: last.atS },
    },
  });
}

/** Its job, at once. */
export async function refreshAdapter(c: Context<Env>, deps: ServerDeps): Promise<Response> {
  const { refresher } = trainingOf(deps);
  const started = await refresher.start(ownedName(c, deps), true);
  if (typeof started === 'string') throw invalidRequest(`no refresh: ${started}`);
  return c.json(describeJob(started));
}

/** Captured answers are the adapter owner's alone. */
function ownedName(c: Context<Env>, deps: ServerDeps): string {
  const { name } = recordOf(c, deps);
  checkMayName(name, c.get('caller'));
  return name;
}
