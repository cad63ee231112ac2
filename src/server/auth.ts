// Who may call what. Every route states its access (app.ts has no other way to add one); keys are compared as SHA-256
// digests in constant time; only `Authorization: Bearer` counts. Without configured keys inference is open, and admin
// calls are for this machine alone: a loopback peer, no proxy's header, no browser origin (faults.md B67-B71, B84).

import { createHash, timingSafeEqual } from 'node:crypto';
import type { Context } from 'hono';
import { GatewayError } from '../errors.ts';
import type { Access, Env } from './env.ts';

export interface ApiKey {
  /** SHA-256 of the key, 32 bytes. The key itself is kept nowhere. */
  readonly digest: Uint8Array;
  /** An admin key is good for inference too. */
  readonly access: 'inference' | 'admin';
  /** Whose adapters it is for beside the shared ones. null: none's; an admin key then is the operator's. */
  readonly tenant: string | null;
}

export interface Caller {
  /** Part of the prefix cache's identity: callers of different tenants share nothing. */
  readonly tenant: string;
  /** Sees `namespace/…`, and changes it with an admin key. */
  readonly namespace: string | null;
  /** Sees and changes what is everybody's. */
  readonly isOperator: boolean;
}

/** RFC 6750's b64token, with a length limit. */
const bearerPattern = /^Bearer ([A-Za-z0-9._~+/-]{1,512}={0,2})$/;
/** Some proxy's, or a browser's: whoever asks is not this machine's user at a prompt. */
const relayHeaders = ['forwarded', 'x-forwarded-for', 'x-real-ip', 'x-forwarded-host', 'origin'];

/** Keys without a tenant are a tenant each. Throws UNAUTHENTICATED (no key or a wrong one) or FORBIDDEN (a right one that is
 *  not enough). */
export function authenticate(
  c: Context<Env>,
  access: Access,
  config: { readonly apiKeys: readonly ApiKey[]; readonly hostsAllowed: readonly string[] },
): Caller {
  if (access === 'public') return { tenant: 'public', namespace: null, isOperator: false };
  if (config.apiKeys.length === 0) {
    admitKeyless(c, access, config.hostsAllowed);
    return { tenant: 'local', namespace: null, isOperator: true };
  }
  const key = matchKey(config.apiKeys, c.req.header('authorization') ?? '');
  if (access === 'admin' && key.access !== 'admin') {
    throw new GatewayError('FORBIDDEN', 'this call needs an admin key');
  }
  const { tenant: namespace } = key;
  return {
    tenant:
      namespace === null
        ? `key-${Buffer.from(key.digest).toString('hex', 0, 8)}`
        : `tenant-${namespace}`,
    namespace,
    isOperator: key.access === 'admin' && namespace === null,
  };
}

function matchKey(keys: readonly ApiKey[], authorization: string): ApiKey {
  const token = bearerPattern.exec(authorization)?.[1];
  const digest = createHash('sha256')
    .update(token ?? '')
    .digest();
  // Every key is compared, whichever matches: the time says nothing about which one or how far.
  let matched: ApiKey | null = null;
  for (const key of keys) if (timingSafeEqual(key.digest, digest)) matched = key;
  if (token === undefined || matched === null) {
    throw new GatewayError(
      'UNAUTHENTICATED',
      'a valid API key is needed: send it as Authorization: Bearer KEY',
    );
  }
  return matched;
}

function admitKeyless(c: Context<Env>, access: Access, hostsAllowed: readonly string[]): void {
  // Absent in tests that have no socket: then nobody is local.
  const isLocal = isLoopback(c.env?.incoming?.socket.remoteAddress ?? '');
  const host = new URL(c.req.url).hostname;
  // A web page on this machine can point its own name at 127.0.0.1 and then read our answers; it cannot choose the Host
  // header. So a local caller must have used a local name.
  if (isLocal && !isLocalHost(host) && !hostsAllowed.includes(host)) {
    throw new GatewayError('FORBIDDEN', 'this host name is not served without API keys');
  }
  const isRelayed = relayHeaders.some((name) => c.req.header(name) !== undefined);
  if (access === 'admin' && (!isLocal || isRelayed)) {
    throw new GatewayError(
      'FORBIDDEN',
      'admin calls are for this machine only until an admin key is configured',
    );
  }
}

function isLoopback(address: string): boolean {
  const plain = address.toLowerCase().replace(/^::ffff:/, '');
  return plain === '::1' || /^127(?:\.\d{1,3}){3}$/.test(plain);
}

/** Names that no stranger's DNS can answer for. */
function isLocalHost(host: string): boolean {
  return (
    host === 'localhost' ||
    host.endsWith('.localhost') ||
    /^\d{1,3}(?:\.\d{1,3}){3}$/.test(host) ||
    host.startsWith('[')
  );
}
