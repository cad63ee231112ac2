import { expect, it } from 'vitest';
import { openGguf } from '../../../src/model/gguf.ts';
import { answerText, taskOf } from '../../../src/trainer/tasks.ts';
import { tinyPath } from '../../support/open-test-decoder.ts';
import { tinyEncoder } from '../../support/training-base.ts';

it('a task is the prompt of the last answer, which it expects', () => {
  using file = openGguf(tinyPath);
  const text = answerText(file.metadata);
  const say = (role: 'user' | 'assistant', content: string) => {
    return { role, content, learnt: role === 'assistant' };
  };
  const messages = [
    ...[say('user', 'one'), say('assistant', 'two'), say('user', 'three')],
    say('assistant', 'four ü'),
  ];
  const whole = tinyEncoder(200)({ kind: 'chat', messages });
  const first = tinyEncoder(200)({ kind: 'chat', messages: messages.slice(0, 2) });
  const task = taskOf(whole, text);
  expect(task.expected).toBe('four ü');
  expect([...whole.tokens].slice(0, task.prompt.length)).toEqual([...task.prompt]);
  expect(task.prompt.length).toBeGreaterThan(first.tokens.length);
  expect(taskOf(first, text).expected).toBe('two');
});
