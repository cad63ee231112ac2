// Programs on a device. ggml's scheduler splits a graph into parts for the device and for the CPU, which gets every op that
// the device lacks, and copies what crosses between them.
//
// It writes those copies into the graph that it is given and forgets them at the next one, so a graph is put back as it was
// recorded (Arena.restore) and split anew at each run: then the sizes and places that runs patch are the ones it sees.

import { GatewayError } from '../../errors.ts';
import type { GgmlDevice, GgmlLibrary, Pointer } from './library.ts';
import type { Device, MemoryPlace } from './memory.ts';

/** A device other than the CPU: one stream of work, and its memory. */
export class Accelerator implements MemoryPlace, Disposable {
  readonly backend: Pointer;
  readonly bufferType: Pointer;
  readonly description: string;
  readonly #library: GgmlLibrary;
  readonly #device: Pointer;

  constructor(library: GgmlLibrary, { pointer, name, description }: GgmlDevice) {
    this.#library = library;
    this.#device = pointer;
    this.backend = library.pointer('ggml_backend_dev_init', pointer, null);
    this.bufferType = library.pointer('ggml_backend_get_default_buffer_type', this.backend);
    this.description = `${name} (${description.trim()})`;
  }

  /** For ops that write into the device's memory: nobody else can run them, and the scheduler would end the process. */
  mustRun(node: Pointer, what: string): void {
    if (this.#library.number('ggml_backend_dev_supports_op', this.#device, node) === 1) return;
    throw new GatewayError('UNSUPPORTED', `${this.description} cannot ${what}; use --device cpu`);
  }

  [Symbol.dispose](): void {
    this.#library.call('ggml_backend_free', this.backend);
  }
}

export class DeviceScheduler implements Disposable {
  readonly accelerator: Accelerator;
  readonly #library: GgmlLibrary;
  readonly #backends: BigUint64Array; // the last one takes what the others cannot
  #scheduler: Pointer | undefined;
  #capacity = 0;
  /** The graph whose values are in the scheduler's memory. */
  #placed: Pointer | undefined;

  constructor(library: GgmlLibrary, accelerator: Accelerator, cpu: Device) {
    this.#library = library;
    this.accelerator = accelerator;
    this.#backends = BigUint64Array.of(accelerator.backend, cpu.backend);
  }

  /** Makes room for a graph of that many nodes and that many leaves. */
  reserve(nodes: number): void {
    if (2 * nodes <= this.#capacity) return;
    this[Symbol.dispose]();
    this.#capacity = 2 * nodes;
    this.#scheduler = this.#library.pointer(
      'ggml_backend_sched_new',
      this.#backends,
      null,
      this.#backends.length,
      this.#capacity,
      false,
      false,
    );
  }

  /** Splits a graph and gives all of its values memory. */
  place(graph: Pointer): void {
    this.#placed = undefined;
    this.#library.call('ggml_backend_sched_reset', this.#scheduler);
    if (this.#library.number('ggml_backend_sched_alloc_graph', this.#scheduler, graph) !== 1) {
      throw new GatewayError('ENGINE_FAILED', 'ggml: no memory for a program on the device');
    }
    this.#placed = graph;
  }

  compute(graph: Pointer): void {
    const name = 'ggml_backend_sched_graph_compute';
    const status = this.#library.number(name, this.#scheduler, graph);
    if (status !== 0) throw new GatewayError('ENGINE_FAILED', `ggml: graph compute gave ${status}`);
  }

  holds(graph: Pointer): boolean {
    return this.#placed === graph;
  }

  /** Parts that the last graph was split into: 1 when one backend ran all of it. */
  get splits(): number {
    return this.#library.number('ggml_backend_sched_get_n_splits', this.#scheduler);
  }

  /** Bytes of intermediate values, on the device and beside it. */
  get bytes(): number {
    if (this.#scheduler === undefined) return 0;
    const name = 'ggml_backend_sched_get_buffer_size';
    return [...this.#backends].reduce(
      (sum, backend) => sum + this.#library.number(name, this.#scheduler, backend),
      0,
    );
  }

  [Symbol.dispose](): void {
    if (this.#scheduler !== undefined) {
      this.#library.call('ggml_backend_sched_free', this.#scheduler);
    }
    this.#scheduler = undefined;
    this.#placed = undefined;
  }
}
