// The child's side of the channel: builds a loop, says ready, and turns messages into calls. A parent that is gone ends
// this process at once: nobody would read what it computes, and it holds a model's worth of memory.

import { asGatewayError } from '../errors.ts';
import type { EngineLoop } from './engine-loop.ts';
import type { FromEngine, ToEngine } from './messages.ts';

/** Resolves when the loop serves. `createLoop` gets the loop's `emit`. */
export async function serveLoop(
  createLoop: (emit: (message: FromEngine) => void) => Promise<EngineLoop>,
): Promise<void> {
  process.once('disconnect', () => process.exit(0));
  // The terminal's ^C reaches the whole group; the parent decides when this process ends, after its streams have.
  process.on('SIGINT', () => {});
  const send = (message: FromEngine, then?: () => void): void => {
    // An error here is a closed channel, which 'disconnect' answers.
    process.send?.(message, undefined, undefined, () => then?.());
  };
  try {
    const loop = await createLoop(send);
    process.on('message', (message) => handle(loop, message as ToEngine));
    send({ kind: 'ready', base: loop.base });
  } catch (error) {
    const { code, message } = asGatewayError(error);
    send({ kind: 'refused', code, message }, () => process.exit(1));
  }
}

function handle(loop: EngineLoop, message: ToEngine): void {
  switch (message.kind) {
    case 'submit':
      loop.submit(message.request, message.generated, message.rankChanges);
      break;
    case 'cancel':
      loop.cancel(message.id);
      break;
    case 'unload':
      loop.unload(message.generation);
      break;
    case 'pin':
      loop.pin(message.generations);
      break;
    case 'prewarm':
      loop.prewarm(message.hot);
      break;
    case 'coefficients':
      loop.setCosts(message.costs);
      break;
    case 'shutdown':
      loop.stop();
      process.exit(0);
  }
}
