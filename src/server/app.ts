// createApp: dependencies -> Hono, without listening. All routes come from one table whose entries must state their
// access; what is not in it is 404, a known path with another method 405. Authentication runs per route, so no spelling of
// a path reaches a handler around it (faults.md B43).

import { type Context, Hono } from 'hono';
import type { ContentfulStatusCode } from 'hono/utils/http-status';
import { showAurac, squeezeAdapter } from './adapter-shape.ts';
import * as adapters from './adapters.ts';
import { createAddAdapter } from './add-adapter.ts';
import { offerToArchive, removeDomain, showArchive } from './archive.ts';
import { authenticate } from './auth.ts';
import * as refresh from './capture.ts';
import { completeChat } from './chat.ts';
import { completeText } from './completions.ts';
import type { ServerDeps } from './deps.ts';
import type { Access, Env, Handle, Route } from './env.ts';
import { takeFeedback } from './feedback.ts';
import * as files from './files.ts';
import * as jobs from './fine-tuning.ts';
import { createReadyz, livez, metricsPage } from './health.ts';
import { listModels, showModel } from './models.ts';
import { HttpError, problemOf } from './problem.ts';
import { showReport } from './refresh-picture.ts';
import { RequestRecord } from './request-record.ts';
import { registryOf } from './tenancy.ts';
import { loadLora, unloadLora } from './vllm-lora.ts';

export interface App {
  readonly hono: Hono<Env>;
  /** For tests and documentation: what is mounted, with its access. */
  readonly routes: readonly Route[];
}

function routeTable(metricsPublic: boolean): readonly Route[] {
  const at =
    (access: Access) =>
    (method: Route['method'], path: string, handle: Handle): Route => ({
      method,
      path,
      access,
      handle,
    });
  const [open, inference, admin] = [at('public'), at('inference'), at('admin')];
  return [
    inference('POST', '/v1/chat/completions', completeChat),
    inference('POST', '/v1/completions', completeText),
    inference('POST', '/v1/tiers/:tier/chat/completions', completeChat),
    inference('POST', '/v1/tiers/:tier/completions', completeText),
    inference('POST', '/v1/feedback', takeFeedback),
    inference('PUT', '/v1/capture', refresh.refuseCapture),
    inference('GET', '/v1/models', listModels),
    inference('GET', '/v1/models/:id', showModel),
    admin('POST', '/v1/adapters', createAddAdapter()),
    admin('GET', '/v1/adapters', adapters.listAdapters),
    // Before the names: no adapter is called archive.
    admin('GET', '/v1/adapters/archive', showArchive),
    admin('POST', '/v1/adapters/archive', offerToArchive),
    admin('DELETE', '/v1/adapters/archive/:domain', removeDomain),
    admin('GET', '/v1/adapters/:name', adapters.showAdapter),
    admin('PUT', '/v1/adapters/:name', adapters.swapAdapter),
    admin('DELETE', '/v1/adapters/:name', adapters.deleteAdapter),
    admin('POST', '/v1/adapters/:name/rollback', adapters.rollBackAdapter),
    admin('PUT', '/v1/adapters/:name/alias', adapters.aliasAdapter),
    admin('POST', '/v1/adapters/:name/pin', adapters.pinAdapter),
    admin('POST', '/v1/adapters/:name/unpin', adapters.unpinAdapter),
    admin('GET', '/v1/adapters/:name/capture', refresh.showCapture),
    admin('PUT', '/v1/adapters/:name/capture', refresh.switchCapture),
    admin('POST', '/v1/adapters/:name/refresh', refresh.refreshAdapter),
    admin('GET', '/v1/adapters/:name/export', adapters.exportAdapter),
    admin('GET', '/v1/adapters/:name/aurac', showAurac),
    admin('POST', '/v1/adapters/:name/squeeze', squeezeAdapter),
    admin('POST', '/v1/load_lora_adapter', loadLora),
    admin('POST', '/v1/unload_lora_adapter', unloadLora),
    admin('POST', '/v1/files', files.createAddFile()),
    admin('GET', '/v1/files', files.listFiles),
    admin('GET', '/v1/files/:id', files.showFile),
    admin('GET', '/v1/files/:id/content', files.sendFile),
    admin('DELETE', '/v1/files/:id', files.deleteFile),
    admin('POST', '/v1/fine_tuning/jobs', jobs.createJob),
    admin('GET', '/v1/fine_tuning/jobs', jobs.listJobs),
    admin('GET', '/v1/fine_tuning/jobs/:id', jobs.showJob),
    admin('POST', '/v1/fine_tuning/jobs/:id/cancel', jobs.cancelJob),
    admin('GET', '/v1/fine_tuning/jobs/:id/events', jobs.listEvents),
    admin('GET', '/v1/fine_tuning/jobs/:id/checkpoints', jobs.listCheckpoints),
    admin('GET', '/v1/fine_tuning/jobs/:id/report', showReport),
    open('GET', '/livez', livez),
    open('GET', '/readyz', createReadyz()),
    (metricsPublic ? open : inference)('GET', '/metrics', metricsPage),
  ];
}

export function createApp(deps: ServerDeps): App {
  const routes = routeTable(deps.config.metricsPublic);
  const hono = new Hono<Env>();
  hono.use(async function observe(c, next) {
    const record = new RequestRecord(requestId(c, deps), c.req.method, deps);
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
  for (const route of routes) {
    const changes = route.access === 'admin' && route.method !== 'GET';
    hono.on(route.method, route.path, async (c) => {
      const record = c.get('record');
      record.route = route.path;
      const caller = authenticate(c, route.access, deps.config);
      record.tenant = caller.tenant;
      c.set('tenant', caller.tenant);
      c.set('caller', caller);
      const answer = await route.handle(c, {
        ...deps,
        registry: registryOf(deps.registry, caller),
      });
      if (changes) await Promise.all([deps.registry.durable(), deps.training?.jobs.durable()]); // What is answered is kept.
      return answer;
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

function problemResponse(c: Context<Env>, thrown: Error): Response {
  c.get('record').fail(thrown);
  const { status, headers, error } = problemOf(thrown);
  return c.json({ error }, status as ContentfulStatusCode, headers);
}
