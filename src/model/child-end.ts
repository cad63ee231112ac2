// When a forked process has really ended: it is gone, and all that it sent has been read from its channel.

import type { ChildProcess } from 'node:child_process';

/** How long the channel may stay open after the process has ended. Guess. */
const channelMsMax = 2000;

/** Calls `onEnd` once, after the last message, with how the process ended or why it could not be started. One that is alive
 *  without a channel is killed: nobody can talk to it any more. */
export function onChildEnd(
  child: ChildProcess,
  after: (ms: number, callback: () => void) => () => void,
  onEnd: (why: string) => void,
): void {
  let why: string | null = null;
  let cancelTimer = (): void => {};
  let hasEnded = false;
  const end = (): void => {
    if (hasEnded) return;
    hasEnded = true;
    cancelTimer();
    onEnd(why!);
  };
  child.on('error', (error) => {
    if (child.pid !== undefined) return; // A message or a signal that came too late.
    why = `it cannot be started (${(error as NodeJS.ErrnoException).code})`;
    end();
  });
  child.once('exit', (code, signal) => {
    why = signal === null ? `exit code ${code}` : `signal ${signal}`;
    // The process may end before the last of its messages has been read from the channel.
    if (child.connected) cancelTimer = after(channelMsMax, end);
    else end();
  });
  child.once('disconnect', () => {
    if (why !== null) end();
    else child.kill('SIGKILL');
  });
}
