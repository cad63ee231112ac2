// Time as an argument: the engine never reads a global clock or starts a timer of its own, so that tests own both.

export interface EngineClock {
  /** Monotonic, the time base of performance.now(). */
  nowMs(): number;
  /** Calls back once after `ms`; the returned function cancels it. Does not keep the process alive. */
  after(ms: number, callback: () => void): () => void;
}

export const systemClock: EngineClock = {
  nowMs: () => performance.now(),
  after(ms, callback) {
    const timer = setTimeout(callback, ms);
    timer.unref();
    return () => clearTimeout(timer);
  },
};
