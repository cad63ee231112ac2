// The loop of a side's child process: opens the side named on the command line, runs the jobs that the parent sends, and
// adds what the process itself consumed. Ends when the parent says so or goes away.

import { score } from './divergence.ts';
import type { JobResult, Side, SideOptions } from './job.ts';
import type { FromChild, SideName, ToChild } from './side-process.ts';

type Open = (options: SideOptions) => Promise<Side> | Side;

const openers: Readonly<Record<SideName, () => Promise<Open>>> = {
  llamacpp: async () => (await import('./llama-cpp-side.ts')).openSide,
  'node-llama-cpp': async () => (await import('./node-llama-cpp-side.ts')).openSide,
  engine: async () => (await import('./engine-side.ts')).openSide,
  rankgate: async () => (await import('./rankgate-side.ts')).openSide,
};

function send(message: FromChild): void {
  process.send!(message);
}

const cpuMs = (): number => {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1000;
};

let side: Side | undefined;
let cpuAfterLastMs = 0;

async function handle(message: ToChild): Promise<void> {
  switch (message.kind) {
    case 'open': {
      const open = await openers[message.side]();
      side = await open(message.options);
      send({ kind: 'opened', description: side.description });
      break;
    }
    case 'run': {
      const cpuBeforeMs = cpuMs();
      const { job } = message;
      const raw = job.kind === 'score' ? score(side!, job) : await side!.run(job);
      const result: JobResult = {
        ...raw,
        cpuMs: cpuMs() - cpuBeforeMs,
        idleCpuMs: cpuBeforeMs - cpuAfterLastMs,
      };
      send({ kind: 'result', result });
      break;
    }
    case 'close':
      await side?.close();
      process.disconnect();
      return;
  }
  cpuAfterLastMs = cpuMs();
}

process.on('message', (message: ToChild) => {
  handle(message).catch((error: unknown) => {
    send({ kind: 'failed', message: error instanceof Error ? String(error.stack) : String(error) });
  });
});
process.on('disconnect', () => process.exit(0));
