// How much of the time a trainer may compute, from what the engine does at the moment. Pure. Serving comes first: a trainer
// has the lowest priority of the system besides, so this is about what priority does not reach: memory bandwidth, caches and
// the barriers at which the kernels' threads wait for each other.

export interface EnginePressure {
  /** Sequences that generate, and that wait for memory. */
  readonly running: number;
  readonly waiting: number;
  /** Threads of its kernels now; fewer than its most when its governor saw that others want the cores. */
  readonly threads: number;
  readonly threadsMax: number;
}

/** While answers are generated on cores that nobody contends for. A guess. */
const busyShare = 0.25;

/** 0…1. */
export function paceOf({ running, waiting, threads, threadsMax }: EnginePressure): number {
  if (waiting > 0) return 0;
  if (running === 0) return 1;
  return threads < threadsMax ? 0 : busyShare;
}
