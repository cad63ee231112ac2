// createApp: dependencies -> Hono, without listening. All routes come from one table whose entries must state their
// access; what is not in it is 404, a known path with another method 405. Authentication runs per route, so no spelling of
// a path reaches a handler around it (faults.md B43).

import { type Context, Hono } from 'hono';
import { GatewayError } from '../errors.ts';
import { adapterRoutes } from './adapters.ts';
import { createAuthenticate, readCredentials } from './auth.ts';
import { chatRoutes } from './chat.ts';
import { completionRoutes } from './completions.ts';
import type { ServerDeps } from './deps.ts';
import type { Env, Route } from './env.ts';
import { healthRoutes } from './health.ts';
import { modelRoutes } from './models.ts';
import { HttpError, problemOf } from './problem.ts';
import { RequestRecord } from './request-record.ts';
import { vllmRoutes } from './vllm-lora.ts';

export interface App {
  readonly hono: Hono<Env>;
  /** For tests and documentation: what is mounted, with its access. */
  readonly routes: readonly Route[];
}

export function createApp(deps: ServerDeps): App {
  const routes: readonly Route[] = [
    ...chatRoutes(deps),
    ...completionRoutes(deps),
    ...modelRoutes(deps),
    ...adapterRoutes(deps),
    ...vllmRoutes(deps),
    ...healthRoutes(deps),
  ];
  const hono = new Hono<Env>();
  hono.use(async function observe(c, next) {
    const record = new RequestRecord(
      { id: requestId(c, deps), method: c.req.method },
      deps.clock,
      deps.log,
    );
    c.set('record', record);
    c.header('x-request-id', record.id);
    c.header('x-content-type-options', 'nosniff');
    c.header('cache-control', 'no-store');
    await next();
    if (!record.isStream) record.finish(c.res.status);
  });
  mount(hono, routes, deps);
  hono.notFound((c) =>
    problemResponse(c, new HttpError(404, 'not_found', 'there is no such route')),
  );
  hono.onError((error, c) => problemResponse(c, error));
  return { hono, routes };
}

function mount(hono: Hono<Env>, routes: readonly Route[], deps: ServerDeps): void {
  const authenticate = createAuthenticate(deps.config.apiKeys, deps.config.hostsAllowed);
  for (const route of routes) {
    hono.on(route.method, route.path, (c) => {
      const record = c.get('record');
      record.route = route.path;
      const peer = c.env?.incoming?.socket.remoteAddress ?? null;
      const caller = authenticate(route.access, readCredentials(c.req.raw, peer));
      record.tenant = caller.tenant;
      c.set('caller', caller);
      return route.handle(c);
    });
  }
  for (const path of new Set(routes.map((route) => route.path))) {
    const allow = routes.filter((route) => route.path === path).map((route) => route.method);
    hono.all(path, (c) => {
      c.get('record').route = path;
      throw new HttpError(405, 'method_not_allowed', `this route answers ${allow.join(', ')}`, {
        allow: allow.join(', '),
      });
    });
  }
}

/** A caller's own id is kept when it is short and plain; it names log lines, nothing in the engine. */
function requestId(c: Context<Env>, deps: ServerDeps): string {
  const own = c.req.header('x-request-id');
  return own !== undefined && /^[\w.-]{1,128}$/.test(own) ? own : `req-${deps.random.id()}`;
}

function problemResponse(c: Context<Env>, thrown: unknown): Response {
  // Hono's own request errors are HTTPExceptions; anything that is not ours is INTERNAL and shows nothing.
  const known = thrown instanceof GatewayError || thrown instanceof HttpError;
  const problem = problemOf(thrown);
  c.get('record').fail(known || thrown instanceof Error ? thrown : new Error(String(thrown)));
  const headers = new Headers(problem.headers);
  headers.set('content-type', 'application/json');
  headers.set('x-request-id', c.get('record').id);
  headers.set('x-content-type-options', 'nosniff');
  headers.set('cache-control', 'no-store');
  return new Response(JSON.stringify({ error: problem.error }), {
    status: problem.status,
    headers,
  });
}
