// Time as an argument: the engine never reads a global clock or starts a timer of its own, so that tests own both.

export interface EngineClock {
  /** Monotonic, the time base of performance.now(). */
  nowMs(): number;
  /** Calls back once after `ms`; the returned function cancels it. Keeps the process alive until then: with the engine
   *  dead, the timer of its restart may be all that is left to do so. */
  after(ms: number, callback: () => void): () => void;
}

export const systemClock: EngineClock = {
  nowMs: () => performance.now(),
  after(ms, callback) {
    const timer = setTimeout(callback, ms);
    return () => clearTimeout(timer);
  },
};
