// The app on a socket: @hono/node-server with every limit and timeout of Node's HTTP server set by name (faults.md
// section 5 has the defaults, measured), and the drain: what is new gets a 503, what runs may end within a grace, then cut.

import { once, setMaxListeners } from 'node:events';
import type { Server, ServerResponse } from 'node:http';
import type { AddressInfo, Socket } from 'node:net';
import { createAdaptorServer } from '@hono/node-server';
import { GatewayError } from '../errors.ts';
import type { App } from './app.ts';
import type { Lifecycle } from './deps.ts';

export interface ListenOptions {
  readonly host: string;
  /** 0 takes a free one. */
  readonly port: number;
  readonly connectionsMax: number;
  readonly keepAliveMs: number;
  /** From a request's first byte to its last. */
  readonly requestMsMax: number;
}

export interface Listening {
  readonly port: number;
  /** Resolves when the last connection is closed, at the latest a moment after the grace. Idempotent. */
  close(graceMs: number): Promise<void>;
}

export interface SettableLifecycle extends Lifecycle {
  isDraining: boolean;
  /** Cancels every answer that still runs. */
  cut(): void;
}

export function createLifecycle(): SettableLifecycle {
  const controller = new AbortController();
  // One listener per running answer, removed at its end: more than Node's ten are no leak here.
  setMaxListeners(0, controller.signal);
  return { isDraining: false, cutOff: controller.signal, cut: () => controller.abort() };
}

/** Rejects when the address cannot be had. */
export async function listen(
  app: App,
  lifecycle: SettableLifecycle,
  options: ListenOptions,
): Promise<Listening> {
  const server = createAdaptorServer({
    fetch: app.hono.fetch,
    // The process keeps Node's own Request and Response.
    overrideGlobalObjects: false,
    // A missing Host is refused by Node already; this is for HTTP/1.0, where it may be absent.
    hostname: 'localhost',
    serverOptions: {
      maxHeaderSize: 16 * 1024,
      headersTimeout: 20_000,
      // Of the longest body, an upload. A slow sender is cut off long before (limits.ts).
      requestTimeout: options.requestMsMax,
      connectionsCheckingInterval: 5_000,
      keepAliveTimeout: options.keepAliveMs,
      requireHostHeader: true,
      insecureHTTPParser: false,
      joinDuplicateHeaders: false,
      noDelay: true, // one token is one small write
    },
  }) as Server;
  server.maxHeadersCount = 100;
  server.maxRequestsPerSocket = 10_000;
  server.maxConnections = options.connectionsMax;
  // Silence in both directions. Longer than any whole answer takes: until its end a non-stream answer sends nothing.
  server.setTimeout(30 * 60_000);
  server.listen({ host: options.host, port: options.port });
  await once(server, 'listening').catch((cause: unknown) => {
    const why = cause instanceof Error && 'code' in cause ? String(cause.code) : 'unknown';
    const message = `cannot listen on ${options.host} port ${options.port}: ${why}`;
    throw new GatewayError('INVALID_REQUEST', message, { cause });
  });
  return { port: (server.address() as AddressInfo).port, close: closer(server, lifecycle) };
}

/** After `cut`, answers need a moment to write their last error and close. */
const cutMs = 500;

function closer(server: Server, lifecycle: SettableLifecycle): (graceMs: number) => Promise<void> {
  let closing: Promise<void> | null = null;
  let onIdle = (): void => {};
  // Connections without a request yet (browsers and undici open them ahead): Node 20 does not count them as idle.
  const unused = new Set<Socket>();
  const answering = new Set<ServerResponse>();
  server.on('connection', (socket) => {
    unused.add(socket);
    socket.once('close', () => {
      unused.delete(socket);
      // Node tells the response whose turn it was. Those of requests pipelined behind it would be computed for nobody.
      for (const response of answering) {
        if (response.req.socket === socket && response.socket === null) response.emit('close');
      }
    });
  });
  server.prependListener('request', ({ socket }, response) => {
    unused.delete(socket);
    answering.add(response);
    if (lifecycle.isDraining) response.shouldKeepAlive = false;
    response.once('close', () => {
      answering.delete(response);
      if (!lifecycle.isDraining) return;
      // A connection that becomes idle now would be kept for keepAliveTimeout: close() looks only once.
      setImmediate(() => {
        server.closeIdleConnections();
        if (answering.size === 0) onIdle();
      });
    });
  });
  return function close(graceMs) {
    closing ??= new Promise<void>((resolve) => {
      lifecycle.isDraining = true;
      // Until the last answer ends: whoever was not told yet to go elsewhere gets a 503 and not a refused connection.
      const stop = (): void => {
        onIdle = () => {};
        server.close(() => {
          clearTimeout(cutting);
          clearTimeout(closingAll);
          resolve();
        });
        server.closeIdleConnections();
        for (const socket of unused) socket.destroy();
      };
      const cutting = setTimeout(() => {
        lifecycle.cut();
        onIdle();
      }, graceMs);
      const closingAll = setTimeout(() => server.closeAllConnections(), graceMs + cutMs);
      onIdle = stop;
      if (answering.size === 0) stop();
    });
    return closing;
  };
}
