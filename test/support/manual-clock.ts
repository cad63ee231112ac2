// A clock that moves only when a test says so.

export interface ManualClock {
  nowMs(): number;
  unixMs(): number;
  after(ms: number, callback: () => void): () => void;
  /** Moves time and runs what became due, in order of its due time. */
  advance(ms: number): void;
  /** Timers that have not fired or been cancelled. */
  pending(): number;
}

export function createManualClock(startMs = 1000, startUnixMs = 1_764_000_000_000): ManualClock {
  let nowMs = startMs;
  let timers: Array<{ readonly dueMs: number; readonly callback: () => void }> = [];
  return {
    nowMs: () => nowMs,
    unixMs: () => startUnixMs + (nowMs - startMs),
    after(ms, callback) {
      const timer = { dueMs: nowMs + ms, callback };
      timers.push(timer);
      return () => {
        timers = timers.filter((one) => one !== timer);
      };
    },
    advance(ms) {
      const targetMs = nowMs + ms;
      for (;;) {
        const due = timers
          .filter((one) => one.dueMs <= targetMs)
          .sort((a, b) => a.dueMs - b.dueMs)[0];
        if (due === undefined) break;
        timers = timers.filter((one) => one !== due);
        nowMs = Math.max(nowMs, due.dueMs);
        due.callback();
      }
      nowMs = targetMs;
    },
    pending: () => timers.length,
  };
}
