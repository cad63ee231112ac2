// Who may call what. Every route states its access (app.ts has no other way to add one); keys are compared as SHA-256
// digests in constant time; only `Authorization: Bearer` counts. Without configured keys inference is open, and admin
// calls are for this machine alone: a loopback peer, no proxy's header, no browser origin (faults.md B67-B71, B84).

import { createHash, timingSafeEqual } from 'node:crypto';
import { GatewayError } from '../errors.ts';

export type Access = 'public' | 'inference' | 'admin';

export interface ApiKey {
  /** SHA-256 of the key, 32 bytes. The key itself is kept nowhere. */
  readonly digest: Uint8Array;
  /** An admin key is good for inference too. */
  readonly access: 'inference' | 'admin';
}

export interface Caller {
  /** Part of the prefix cache's identity: callers with different keys share nothing. */
  readonly tenant: string;
}

export interface Credentials {
  readonly authorization: string | null;
  /** The peer's address as the socket has it; null when there is no socket (tests). */
  readonly peer: string | null;
  /** Host that the request was sent to, without its port. */
  readonly host: string;
  readonly origin: string | null;
  /** Some proxy's forwarding header is present. */
  readonly isForwarded: boolean;
}

/** RFC 6750's b64token, with a length limit. */
const bearerPattern = /^Bearer ([A-Za-z0-9._~+/-]{1,512}={0,2})$/;
const forwardingHeaders = ['forwarded', 'x-forwarded-for', 'x-real-ip', 'x-forwarded-host'];

export function readCredentials(request: Request, peer: string | null): Credentials {
  return {
    authorization: request.headers.get('authorization'),
    peer,
    host: new URL(request.url).hostname,
    origin: request.headers.get('origin'),
    isForwarded: forwardingHeaders.some((name) => request.headers.has(name)),
  };
}

export type Authenticate = (access: Access, credentials: Credentials) => Caller;

/** Throws UNAUTHENTICATED (no key or a wrong one) or FORBIDDEN (a right one that is not enough). */
export function createAuthenticate(
  keys: readonly ApiKey[],
  hostsAllowed: readonly string[],
): Authenticate {
  for (const key of keys) {
    if (key.digest.byteLength !== 32) throw new RangeError('an API key digest is not 32 bytes');
  }
  return function authenticate(access, credentials): Caller {
    if (access === 'public') return { tenant: 'public' };
    if (keys.length === 0) return admitKeyless(access, credentials, hostsAllowed);
    const key = matchKey(keys, credentials.authorization);
    if (access === 'admin' && key.access !== 'admin') {
      throw new GatewayError('FORBIDDEN', 'this call needs an admin key');
    }
    return { tenant: `key-${Buffer.from(key.digest).toString('hex', 0, 8)}` };
  };
}

function matchKey(keys: readonly ApiKey[], authorization: string | null): ApiKey {
  const token = bearerPattern.exec(authorization ?? '')?.[1];
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

function admitKeyless(
  access: Access,
  credentials: Credentials,
  hostsAllowed: readonly string[],
): Caller {
  const { peer, host, origin, isForwarded } = credentials;
  const isLocal = peer !== null && isLoopback(peer);
  // A web page on this machine can point its own name at 127.0.0.1 and then read our answers; it cannot choose the Host
  // header. So a local caller must have used a local name.
  if (isLocal && !isLocalHost(host) && !hostsAllowed.includes(host)) {
    throw new GatewayError('FORBIDDEN', 'this host name is not served without API keys');
  }
  if (access === 'admin' && (!isLocal || isForwarded || origin !== null)) {
    throw new GatewayError(
      'FORBIDDEN',
      'admin calls are for this machine only until an admin key is configured',
    );
  }
  return { tenant: 'local' };
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
