// Types of Hono's context in this app, and the shape of a route.

import type { HttpBindings } from '@hono/node-server';
import type { Context } from 'hono';
import type { Caller } from './auth.ts';
import type { ServerDeps } from './deps.ts';
import type { RequestRecord } from './request-record.ts';

export interface Env {
  /** Absent members when there is no socket: app.request() in tests. */
  Bindings: Partial<HttpBindings>;
  Variables: { record: RequestRecord; tenant: string; caller: Caller };
}

export type Access = 'public' | 'inference' | 'admin';
export type Handle = (c: Context<Env>, deps: ServerDeps) => Response | Promise<Response>;

/** The only way to add a call: `access` is not optional, so no route is open by omission (faults.md B43). */
export interface Route {
  readonly method: 'GET' | 'POST' | 'PUT' | 'DELETE';
  readonly path: string;
  readonly access: Access;
  readonly handle: Handle;
}
