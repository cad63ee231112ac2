import { describe, expect, it } from 'vitest';
import { GatewayError } from '../../../src/errors.ts';
import { problemOf } from '../../../src/server/problem.ts';

describe('problemOf', () => {
  it.each([
    "ENOENT: no such file or directory, open '/srv/adapters/x'",
    'cannot read /etc/passwd',
    'at C:\\Users\\x',
    'tensor at 0x7ffd12345678 is wrong',
    'boom\n    at Object.run (file.js:1:2)',
    'see file:///home/x',
    'path=/var/lib/rankgate',
  ])('replaces a message that reveals something: %j', (message) => {
    const { error } = problemOf(new GatewayError('INVALID_ADAPTER', message));
    expect(error.message).toBe('invalid adapter');
  });

  it.each([
    'rank: want a whole number from 0 to 16, got 17',
    'made for org/name, this is smollm2-135m; set accept_base_name to org/name to take it',
    'q_proj/k_proj: 3 of 7 tensors matched',
    'lora_alpha: got NaN, want a finite number > 0',
  ])('keeps a message that explains: %j', (message) => {
    expect(problemOf(new GatewayError('INVALID_ADAPTER', message)).error.message).toBe(message);
  });

  it('shows nothing of an error that is not ours', () => {
    for (const thrown of [new TypeError('x is undefined'), 'text', null, { code: 'EACCES' }]) {
      expect(problemOf(thrown)).toMatchObject({
        status: 500,
        error: { message: 'internal error', type: 'server_error', param: null, code: 'internal' },
      });
    }
  });
});
