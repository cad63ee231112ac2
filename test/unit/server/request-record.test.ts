import { describe, expect, it } from 'vitest';
import { onEvent, type RequestEnd } from '../../../src/channels.ts';
import { GatewayError } from '../../../src/errors.ts';
import { RequestRecord } from '../../../src/server/request-record.ts';
import { createManualClock } from '../../support/manual-clock.ts';

describe('RequestRecord', () => {
  it('is one log line and one event, however often it is finished', () => {
    const clock = createManualClock();
    const lines: string[] = [];
    const ends: RequestEnd[] = [];
    const stop = onEvent('request-end', (end) => void ends.push(end));
    const log = (line: string): void => void lines.push(line);
    const record = new RequestRecord('r', 'GET', { clock, log });
    clock.advance(25);
    // The first failure is the cause; what follows from it is not.
    record.fail(new GatewayError('NO_CAPACITY', 'down'));
    record.fail(new GatewayError('INTERNAL', 'later'));
    record.finish(503);
    record.finish(200);
    stop();
    expect(lines).toHaveLength(1);
    expect(ends).toEqual([
      expect.objectContaining({ requestId: 'r', status: 503, code: 'no_capacity', durationMs: 25 }),
    ]);
    expect(JSON.parse(lines[0]!)).toMatchObject({ level: 'error', status: 503 });
  });
});
