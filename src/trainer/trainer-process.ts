// Entry of the trainer process: one claim of one job, and then it ends. Its only argument is the TrainerSpec as JSON, written
// by the gateway that forks it. A parent that is gone ends it at once: nobody would take what it makes.

import { asGatewayError } from '../errors.ts';
import {
  type FromTrainer,
  passingCodes,
  type ToTrainer,
  type TrainerSpec,
} from '../jobs/messages.ts';
import { runInBackground } from './background.ts';
import { Pacer, type PacerClock } from './pacer.ts';
import { trainFile } from './train-file.ts';

/** Well below the lease. */
const aliveMs = 2000;

const clock: PacerClock = {
  nowMs: () => performance.now(),
  cpuMs() {
    const { user, system } = process.cpuUsage();
    return (user + system) / 1000;
  },
  after(ms, callback) {
    const timer = setTimeout(callback, ms);
    return () => clearTimeout(timer);
  },
};

function tell(message: FromTrainer): void {
  // An error here is a closed channel, which 'disconnect' answers.
  process.send?.(message, undefined, undefined, () => {});
}

async function run(): Promise<void> {
  runInBackground();
  tell({ kind: 'alive' });
  process.once('disconnect', () => process.exit(0));
  // The terminal's ^C reaches the whole group; the parent decides when this process ends.
  process.on('SIGINT', () => {});
  const pacer = new Pacer(clock);
  process.on('message', (message: ToTrainer) => {
    if (message.kind === 'pace') pacer.setShare(message.share);
    else pacer.stop();
  });
  const living = setInterval(() => tell({ kind: 'alive' }), aliveMs);
  try {
    const spec = JSON.parse(process.argv[2] ?? 'null') as TrainerSpec;
    await trainFile(spec, { tell, breathe: () => pacer.breathe(), nowMs: clock.nowMs });
  } catch (error) {
    const { code, message } = asGatewayError(error);
    if (code === 'INTERNAL') process.stderr.write(`trainer: ${(error as Error).stack}\n`);
    tell({ kind: 'failed', code, message, retry: passingCodes.includes(code) });
  } finally {
    clearInterval(living);
    // Ends once everything has been sent; libuv's pools would keep it for a while.
    process.send?.({ kind: 'alive' }, undefined, undefined, () => process.exit(0));
  }
}

await run();
