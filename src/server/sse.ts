// Server-sent events by pull: the next frame is made only when the socket wants one, which is all the backpressure there
// is. Hono's streamSSE is not used: it swallows write errors and shows `error.message` (faults.md section 5).
// A failure is a `data: {"error": …}` frame and the end of the body, without the [DONE] that only a whole answer gets.

import { GatewayError } from '../errors.ts';
import type { Clock } from './deps.ts';
import { problemOf } from './problem.ts';

export interface EventSource {
  /** Payloads of `data:` lines, without newlines. */
  readonly frames: AsyncGenerator<string, void, void>;
  readonly clock: Clock;
  readonly pingMs: number;
  readonly stallMsMax: number;
  /** Called exactly once; null after the last frame was handed over. After a failure it must make `frames` settle. */
  readonly onEnd: (failure: unknown) => void;
}

const encoder = new TextEncoder();

export function eventStream(source: EventSource): ReadableStream<Uint8Array> {
  const { frames, clock } = source;
  let pending: Promise<IteratorResult<string, void>> | null = null;
  let cancelStall = (): void => {};
  let isEnded = false;
  let left: GatewayError | null = null;
  const end = (failure: unknown): void => {
    cancelStall();
    if (isEnded) return;
    isEnded = true;
    source.onEnd(failure);
  };
  const leave = (reason: string): void => {
    pending?.catch(() => {});
    frames.return().catch(() => {});
    left = new GatewayError('CANCELLED', reason);
    end(left);
  };
  const armStall = (): void => {
    cancelStall = clock.after(source.stallMsMax, () => leave('the client stopped reading'));
  };
  armStall();
  return new ReadableStream<Uint8Array>(
    {
      async pull(controller): Promise<void> {
        cancelStall();
        try {
          // Given up already, and the reader is back: it must not take what it has for the whole.
          if (left !== null) throw left;
          pending ??= frames.next();
          const next = await within(pending, clock, source.pingMs);
          if (next === null) {
            controller.enqueue(encoder.encode(': ping\n\n'));
          } else if (next.done === true) {
            end(null);
            controller.close();
            return;
          } else {
            pending = null;
            controller.enqueue(encoder.encode(`data: ${next.value}\n\n`));
          }
          armStall();
        } catch (error) {
          end(error);
          const { error: body } = problemOf(error);
          controller.enqueue(encoder.encode(`data: ${JSON.stringify({ error: body })}\n\n`));
          controller.close();
        }
      },
      cancel(): void {
        leave('the client went away');
      },
    },
    { highWaterMark: 0 },
  );
}

/** What the promise gives, or null when it takes longer than `ms`. */
export async function within<T>(promise: Promise<T>, clock: Clock, ms: number): Promise<T | null> {
  let cancel = (): void => {};
  const late = new Promise<null>((resolve) => {
    cancel = clock.after(ms, () => resolve(null));
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    cancel();
  }
}
