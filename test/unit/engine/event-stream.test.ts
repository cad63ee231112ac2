import { describe, expect, it } from 'vitest';
import { EventStream } from '../../../src/engine/event-stream.ts';
import type { EngineEvent } from '../../../src/engine/messages.ts';
import { GatewayError } from '../../../src/errors.ts';

const piece = (text: string): EngineEvent => ({ kind: 'piece', text, tokens: [] });
const end: EngineEvent = {
  kind: 'end',
  reason: 'stop',
  stopString: null,
  completionTokens: 1,
  ttftMs: 1,
  totalMs: 1,
  rankMean: 0,
};

async function read(stream: EventStream): Promise<string[]> {
  const kinds: string[] = [];
  try {
    for await (const event of stream) kinds.push(event.kind === 'piece' ? event.text : event.kind);
  } catch (error) {
    kinds.push(error instanceof GatewayError ? error.code : String(error));
  }
  return kinds;
}

describe('EventStream', () => {
  it('delivers what was queued before the end, in order, to a reader that comes late', async () => {
    const stream = new EventStream(10, () => expect.unreachable());
    for (const event of [piece('a'), piece('b'), end, piece('late')]) stream.push(event);
    expect(await read(stream)).toEqual(['a', 'b', 'end']);
  });

  it('wakes a waiting reader and delivers queued events before a failure', async () => {
    const stream = new EventStream(10, () => expect.unreachable());
    const reading = read(stream);
    await Promise.resolve();
    stream.push(piece('a'));
    stream.push(piece('b'));
    stream.fail(new GatewayError('ENGINE_FAILED', 'gone'));
    expect(await reading).toEqual(['a', 'b', 'ENGINE_FAILED']);
  });

  it('gives up a reader that falls further behind than the limit, and frees its events', async () => {
    let abandoned = 0;
    const stream = new EventStream(2, () => {
      abandoned += 1;
    });
    for (const text of ['a', 'b', 'c', 'd']) stream.push(piece(text));
    expect(abandoned).toBe(1);
    expect(stream.isOver).toBe(true);
    expect(await read(stream)).toEqual(['CANCELLED']);
  });

  it('takes an end beyond the limit: the answer is complete and costs nothing more', async () => {
    const stream = new EventStream(1, () => expect.unreachable());
    stream.push(piece('a'));
    stream.push(end);
    expect(await read(stream)).toEqual(['a', 'end']);
  });

  it('tells the writer once when the reader leaves by break, and not after the end', async () => {
    let abandoned = 0;
    const count = (): void => {
      abandoned += 1;
    };
    const left = new EventStream(10, count);
    left.push(piece('a'));
    for await (const event of left) {
      expect(event).toEqual(piece('a'));
      break;
    }
    left.cancel();
    expect(abandoned).toBe(1);
    const whole = new EventStream(10, count);
    whole.push(end);
    await read(whole);
    whole.cancel();
    expect(abandoned).toBe(1);
  });

  it('rejects a reader that waits when the caller cancels', async () => {
    let abandoned = 0;
    const stream = new EventStream(10, () => {
      abandoned += 1;
    });
    const reading = read(stream);
    await Promise.resolve();
    stream.cancel();
    expect(await reading).toEqual(['CANCELLED']);
    expect(abandoned).toBe(1);
  });
});
