// How much of the time a trainer may compute, from what the engine does at the moment. Pure. That serving comes first is the
// system's work: a trainer has only what nobody else wants (trainer/background.ts). Of that it has all: pausing it now and
// then spares no answer its slow steps, it only makes them fewer. Where others want the cores, a trainer is one of too many.

export interface EnginePressure {
  /** Sequences that generate. */
  readonly running: number;
  /** Threads of its kernels now; fewer than its most when its governor saw that others want the cores. */
  readonly threads: number;
  readonly threadsMax: number;
}

/** 0…1. */
export function paceOf({ running, threads, threadsMax }: EnginePressure): number {
  return running > 0 && threads < threadsMax ? 0 : 1;
}
