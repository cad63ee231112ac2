// What one caller may see and change of the registry. Names are `tenant/name`, or plain and shared by all: a tenant's key
// sees its own and the shared, and changes its own alone; another tenant's names are to it as if they were not there. Every
// handler gets its registry through here (app.ts), so none can forget it.

import { type AdapterManifest, type Generation, tenantOf } from '../adapters/adapter.ts';
import type { AdapterRecord, Lease, Registry, StoredGeneration } from '../adapters/registry.ts';
import { GatewayError } from '../errors.ts';
import type { Caller } from './auth.ts';

export function isVisible(name: string, { namespace, isOperator }: Caller): boolean {
  const tenant = tenantOf(name);
  return isOperator || tenant === null || tenant === namespace;
}

export function registryOf(registry: Registry, caller: Caller): Registry {
  return caller.isOperator ? registry : new TenantRegistry(registry, caller);
}

/** Throws FORBIDDEN, without a look at what exists, when the caller may name nothing so. */
export function checkMayName(name: string, { namespace, isOperator }: Caller): void {
  if (isOperator || (namespace !== null && tenantOf(name) === namespace)) return;
  const own = namespace === null ? 'no adapters' : `adapters ${namespace}/… only`;
  throw new GatewayError('FORBIDDEN', `this key names ${own}`, { param: 'name' });
}

class TenantRegistry implements Registry {
  readonly #registry: Registry;
  readonly #caller: Caller;

  constructor(registry: Registry, caller: Caller) {
    this.#registry = registry;
    this.#caller = caller;
  }

  list(): readonly AdapterRecord[] {
    return this.#registry.list().filter(({ name }) => isVisible(name, this.#caller));
  }

  find(name: string): AdapterRecord | null {
    return isVisible(name, this.#caller) ? this.#registry.find(name) : null;
  }

  lease(reference: string): Lease {
    this.#expectVisible(reference.split('@', 1)[0]!);
    return this.#registry.lease(reference);
  }

  leases(generation: Generation): number {
    return this.#registry.leases(generation);
  }

  stored(generation: Generation): StoredGeneration | null {
    return this.#registry.stored(generation);
  }

  isNamed(generation: Generation): boolean {
    return this.#registry.isNamed(generation);
  }

  create(name: string, generation: Generation): AdapterRecord {
    checkMayName(name, this.#caller);
    return this.#registry.create(name, generation);
  }

  swap(name: string, generation: Generation, expected: Generation | null): AdapterRecord {
    this.#expectOwn(name);
    return this.#registry.swap(name, generation, expected);
  }

  rollback(name: string): AdapterRecord {
    this.#expectOwn(name);
    return this.#registry.rollback(name);
  }

  alias(name: string, target: string): AdapterRecord {
    checkMayName(name, this.#caller);
    this.#expectOwn(target);
    return this.#registry.alias(name, target);
  }

  pin(name: string): AdapterRecord {
    return this.#refusePin(name);
  }

  unpin(name: string): AdapterRecord {
    return this.#refusePin(name);
  }

  pinned(): readonly Generation[] {
    return this.#registry.pinned();
  }

  remove(name: string, expected: Generation | null): void {
    this.#expectOwn(name);
    this.#registry.remove(name, expected);
  }

  store(generation: Generation, manifest: AdapterManifest, bytes: number): void {
    this.#registry.store(generation, manifest, bytes);
  }

  durable(): Promise<void> {
    return this.#registry.durable();
  }

  durableNow(): void {
    this.#registry.durableNow();
  }

  close(): void {
    this.#registry.close();
  }

  #expectVisible(name: string): void {
    if (isVisible(name, this.#caller)) return;
    // The registry's own words for a name that it does not have.
    throw new GatewayError('ADAPTER_NOT_FOUND', `adapter ${name} does not exist`);
  }

  #expectOwn(name: string): void {
    this.#expectVisible(name);
    if (tenantOf(name) === this.#caller.namespace && tenantOf(name) !== null) return;
    throw new GatewayError('FORBIDDEN', 'only the operator changes what is shared');
  }

  /** Memory that one tenant's pin takes is taken from all. */
  #refusePin(name: string): never {
    this.#expectVisible(name);
    throw new GatewayError('FORBIDDEN', 'only the operator pins');
  }
}
