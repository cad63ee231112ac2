// Promises for adapter loads that the engine has not answered yet. A load outlives the process that it was asked of:
// the next one is asked again.

import type { Generation } from '../adapters/adapter.ts';
import { GatewayError } from '../errors.ts';
import type { ToEngine } from './messages.ts';

interface Ticket {
  readonly generation: Generation;
  readonly resolve: () => void;
  readonly reject: (error: GatewayError) => void;
}

const ticketsMax = 1000;

export class LoadTickets {
  readonly #open: Map<number, Ticket> = new Map();
  #last = 0;

  /** Throws CONTENDED when too many are open. */
  open(generation: Generation): { readonly promise: Promise<void>; readonly message: ToEngine } {
    if (this.#open.size >= ticketsMax) {
      throw new GatewayError('CONTENDED', `${ticketsMax} adapter loads wait`);
    }
    this.#last += 1;
    const ticket = this.#last;
    const promise = new Promise<void>((resolve, reject) => {
      this.#open.set(ticket, { generation, resolve, reject });
    });
    return { promise, message: { kind: 'load', generation, ticket } };
  }

  /** What to ask a new engine for. */
  messages(): ToEngine[] {
    return [...this.#open].map(([ticket, { generation }]) => ({
      kind: 'load',
      generation,
      ticket,
    }));
  }

  settle(ticket: number, error: GatewayError | null): void {
    const open = this.#open.get(ticket);
    this.#open.delete(ticket);
    if (error === null) open?.resolve();
    else open?.reject(error);
  }

  failAll(error: GatewayError): void {
    for (const ticket of [...this.#open.keys()]) this.settle(ticket, error);
  }
}
