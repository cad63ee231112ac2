// What a trainer asks of Linux before it computes: time that nobody else wants, and to end with its gateway. SCHED_IDLE
// (sched(7)) goes further than priority 19: a thread of it makes room the moment another wakes, where one of priority 19
// keeps the core for a slice, and a core that runs nothing else counts as free when the system looks for one.

import { readdirSync } from 'node:fs';
import { getPriority } from 'node:os';
import koffi from 'koffi';

/** Who is given this one is meant to have what is below it too. */
const lastPriority = 19;
const schedIdle = 5;
const setParentDeathSignal = 1; // prctl(2)
const sigkill = 9;

/** Elsewhere than on Linux it stays as it is. */
export function runInBackground(): void {
  if (process.platform !== 'linux') return;
  const library = koffi.load(null);
  const word = 'unsigned long';
  // In the middle of a piece of computing, or stopped, it would not see that its channel has closed.
  library.func('prctl', 'int', ['int', word, word, word, word])(
    ...[setParentDeathSignal, sigkill, 0, 0, 0],
  );
  if (getPriority() < lastPriority) return;
  const schedule = library.func('sched_setscheduler', 'int', ['int', 'int', 'void *']);
  const priority = new Int32Array(1);
  // Of those that run; threads that are started later have that of the one that starts them.
  for (const thread of readdirSync('/proc/self/task')) {
    schedule(Number(thread), schedIdle, priority);
  }
}
