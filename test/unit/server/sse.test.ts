import { describe, expect, it } from 'vitest';
import { eventStream } from '../../../src/server/sse.ts';
import { createManualClock } from '../../support/manual-clock.ts';

function open(frames: AsyncGenerator<string, void, void>) {
  const clock = createManualClock();
  const ends: unknown[] = [];
  const stream = eventStream({
    frames,
    clock,
    pingMs: 100,
    stallMsMax: 1000,
    onEnd: (failure) => void ends.push(failure),
  });
  return { clock, ends, reader: stream.getReader() };
}

const cancelled = expect.objectContaining({ code: 'CANCELLED' });

async function* some(count: number, failure?: Error): AsyncGenerator<string, void, void> {
  for (let i = 0; i < count; i++) yield String(i);
  if (failure !== undefined) throw failure;
}

async function readAll(reader: ReadableStreamDefaultReader<Uint8Array>): Promise<string> {
  let text = '';
  for (let next = await reader.read(); !next.done; next = await reader.read()) {
    text += Buffer.from(next.value).toString();
  }
  return text;
}

describe('eventStream', () => {
  it('ends once, after a whole answer', async () => {
    const { ends, reader, clock } = open(some(2));
    expect(await readAll(reader)).toBe('data: 0\n\ndata: 1\n\n');
    await reader.cancel();
    clock.advance(10_000);
    expect(ends).toEqual([null]);
    expect(clock.pending()).toBe(0);
  });

  it('ends once, after a failure', async () => {
    const { ends, reader, clock } = open(some(1, new Error('secret')));
    expect(await readAll(reader)).toMatch(
      /^data: 0\n\ndata: \{"error":\{.*"internal error".*\n\n$/,
    );
    await reader.cancel();
    clock.advance(10_000);
    expect(ends).toEqual([new Error('secret')]);
  });

  it('ends once, when it is cancelled after it was given up', async () => {
    const { ends, reader, clock } = open(some(9));
    await reader.read();
    clock.advance(1000);
    await reader.cancel();
    expect(ends).toEqual([cancelled]);
    expect(clock.pending()).toBe(0);
  });

  it('ends without a reader at all', async () => {
    const { ends, clock } = open(some(9));
    clock.advance(1000);
    expect(ends).toEqual([cancelled]);
  });
});
