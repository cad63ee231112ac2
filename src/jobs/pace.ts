// How much of the time a trainer may compute, from what the engine does at the moment. Pure. That serving comes first is the
// system's work: a trainer has only what nobody else wants (trainer/background.ts). Of that it has all: pausing it now and
// then spares no answer its slow steps, it only makes them fewer. It does not where what it uses is missing elsewhere.

export interface EnginePressure {
  /** Sequences that are computed or wait. */
  readonly answers: number;
  /** Cores are a quota of CPU time, fewer than the machine's: a trainer uses it up also on a core that nobody else wants, and
   *  then the system stops everybody until the quota's next period. */
  readonly isQuota: boolean;
  /** Threads of its kernels now; fewer than its most when its governor saw that others want the cores. */
  readonly threads: number;
  readonly threadsMax: number;
}

/** 0…1. */
export function paceOf({ answers, isQuota, threads, threadsMax }: EnginePressure): number {
  return answers > 0 && (isQuota || threads < threadsMax) ? 0 : 1;
}
