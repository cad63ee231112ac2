import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, describe, expect, it } from 'vitest';
import type { ChatMessage, TextService } from '../../../src/engine/text.ts';
import { createTextService, type TextServiceOptions } from '../../../src/engine/text-service.ts';
import { type TextModel, writeTextModel } from '../../support/text-model.ts';

const dir = mkdtempSync(join(tmpdir(), 'text-service-'));
afterAll(() => rmSync(dir, { recursive: true }));

const services: TextService[] = [];
afterEach(async () => {
  await Promise.all(services.splice(0).map(async (service) => service.close()));
});

let models = 0;
async function open(
  model: TextModel,
  options: Partial<TextServiceOptions> = {},
): Promise<TextService> {
  models += 1;
  const modelPath = join(dir, `${models}.gguf`);
  writeTextModel(modelPath, model);
  const service = await createTextService({ modelPath, contextMax: 100, ...options });
  services.push(service);
  return service;
}

const user = (content: string): ChatMessage[] => [{ role: 'user', content }];
const failure = (code: string, more: object = {}): unknown =>
  expect.objectContaining({ code, ...more });

const plain = '{{ bos_token }}{{ messages[0].content }}{{ eos_token }}';
// Runs for minutes unless the message says otherwise: 10^8 rounds of the interpreter.
const endless =
  "{% if messages[0].content == 'hang' %}{% for i in range(10000) %}{% for j in range(10000) %}" +
  '{% endfor %}{% endfor %}{% endif %}ok';
// Doubles an array until the thread's heap is full.
const devouring =
  "{% if messages[0].content == 'eat' %}{% set ns = namespace(a=[[], []]) %}" +
  '{% for i in range(40) %}{% set ns.a = ns.a + ns.a %}{% endfor %}{% endif %}ok';

describe('text service', () => {
  it('encodes chats, encodes text and decodes tokens on its thread', async () => {
    const service = await open({ template: plain });
    const chat = await service.encodeChat(user('ab<s>'));
    expect(chat.prompt).toBe('<s>ab<s><|im_end|>');
    const tokens = [...chat.tokens];
    expect([tokens[0], tokens.at(-1), tokens.length]).toEqual([0, 1, 6]);
    expect(await service.decode(chat.tokens)).toBe(chat.prompt);
    expect([...(await service.encode('<s>'))]).toEqual(tokens.slice(2, 5));
  });

  it('answers in the order of the questions, each its own', async () => {
    const service = await open({ template: plain });
    const texts = Array.from({ length: 50 }, (_, index) => `text ${index}`);
    const order: number[] = [];
    const decoded = await Promise.all(
      texts.map(async (text, index) => {
        const tokens = await service.encode(text);
        order.push(index);
        return service.decode(tokens);
      }),
    );
    expect(decoded).toEqual(texts);
    expect(order).toEqual(texts.map((_, index) => index));
  });

  it('begins text with a BOS token when the model wants one', async () => {
    const service = await open({ template: plain, addBos: true });
    expect((await service.encode('x'))[0]).toBe(0);
    expect([...(await service.encodeChat(user('x'))).tokens].filter((id) => id === 0)).toEqual([0]);
    const long = await open({ template: plain, addBos: true }, { contextMax: 250_000 });
    expect(await long.encode('x '.repeat(124_000))).toHaveLength(248_001); // it overflowed the stack
    const full = await service.encode('x'.repeat(99));
    expect(full).toHaveLength(100);
    await expect(service.encode('x'.repeat(100))).rejects.toEqual(
      failure('CONTEXT_LENGTH_EXCEEDED', { param: 'prompt' }),
    );
  });

  it('decodes invalid UTF-8 to U+FFFD and refuses tokens that do not exist', async () => {
    const service = await open({ template: plain });
    const tokens = await service.encode('é');
    expect(await service.decode(tokens.slice(0, 1))).toBe('\ufffd');
    for (const token of [-1, 259]) {
      await expect(service.decode(Int32Array.of(token))).rejects.toEqual(
        failure('INVALID_REQUEST', { param: 'tokens' }),
      );
    }
  });

  it('refuses what cannot fit into the context, before and after it is tokenised', async () => {
    const service = await open({ template: plain });
    // The longest token has 10 characters.
    const tooLong = 'x'.repeat(1001);
    const exceeded = (param: string): unknown => failure('CONTEXT_LENGTH_EXCEEDED', { param });
    await expect(service.encode(tooLong)).rejects.toEqual(exceeded('prompt'));
    await expect(service.encodeChat(user(tooLong))).rejects.toEqual(exceeded('messages'));
    await expect(service.encode('x'.repeat(101))).rejects.toEqual(exceeded('prompt'));
    await expect(service.encodeChat(user('x'.repeat(99)))).rejects.toEqual(exceeded('messages'));
    await expect(service.decode(new Int32Array(101))).rejects.toEqual(exceeded('tokens'));
    const manyTurns = Array.from({ length: 101 }, () => user('')[0]!);
    await expect(service.encodeChat(manyTurns)).rejects.toEqual(exceeded('messages'));
    expect(await service.encode('x'.repeat(100))).toHaveLength(100);
  });

  it('refuses more work than it may hold, and takes work again when there is room', async () => {
    const service = await open({ template: plain }, { waitingMax: 2, waitingCharactersMax: 10 });
    const running = service.encode('a');
    const waiting = [service.encode('b'), service.encode('c')];
    await expect(service.encode('d')).rejects.toEqual(failure('CONTENDED', { retryAfterS: 1 }));
    await Promise.all([running, ...waiting]);
    const first = service.encode('x'.repeat(8));
    const second = service.encode('x'.repeat(8));
    await expect(service.encode('xxx')).rejects.toEqual(failure('CONTENDED'));
    await Promise.all([first, second]);
    expect(await service.encode('d')).toHaveLength(1);
  });

  it('gives up on a template that does not end, for that request only', async () => {
    const service = await open({ template: endless }, { taskMsMax: 300 });
    const hanging = service.encodeChat(user('hang'));
    const waiting = service.encodeChat(user('fine'));
    await expect(hanging).rejects.toEqual(
      failure('INTERNAL', { message: 'the text thread took more than 300 ms' }),
    );
    expect((await waiting).prompt).toBe('ok');
  });

  it('survives a template that eats the thread’s memory, and fails that request only', async () => {
    const service = await open({ template: devouring }, { heapMbMax: 64 });
    const eating = service.encodeChat(user('eat'));
    const waiting = service.encodeChat(user('fine'));
    await expect(eating).rejects.toEqual(
      failure('INTERNAL', { message: 'the text thread failed' }),
    );
    expect((await waiting).prompt).toBe('ok');
  });

  it('fails what waits when the thread cannot start again, and recovers when it can', async () => {
    const service = await open({ template: endless }, { taskMsMax: 300 });
    const modelPath = join(dir, `${models}.gguf`);
    const hanging = service.encodeChat(user('hang'));
    const waiting = service.encodeChat(user('fine'));
    writeFileSync(modelPath, 'no model any more');
    await expect(hanging).rejects.toEqual(failure('INTERNAL'));
    await expect(waiting).rejects.toEqual(failure('NO_CAPACITY'));
    await expect(service.encode('x')).rejects.toEqual(failure('NO_CAPACITY'));
    writeTextModel(modelPath, { template: plain });
    expect(await service.encode('x')).toHaveLength(1);
  });

  it('loses as many threads as it takes', async () => {
    const service = await open({ template: devouring }, { heapMbMax: 64 });
    await expect(service.encodeChat(user('eat'))).rejects.toEqual(failure('INTERNAL'));
    await expect(service.encodeChat(user('eat'))).rejects.toEqual(failure('INTERNAL'));
    expect((await service.encodeChat(user('fine'))).prompt).toBe('ok');
  });

  it('says so when the model has no chat template', async () => {
    const service = await open({});
    await expect(service.encodeChat(user('x'))).rejects.toEqual(failure('UNSUPPORTED'));
    expect(await service.encode('x')).toHaveLength(1);
  });

  it('does not open with a model that it cannot use', async () => {
    await expect(open({ pre: 'tekken' })).rejects.toEqual(
      failure('UNSUPPORTED', { message: expect.stringContaining("'tekken'") }),
    );
    await expect(open({ template: '{{ x.__class__ }}' })).rejects.toEqual(
      failure('INVALID_MODEL_FILE'),
    );
    const modelPath = join(dir, 'broken.gguf');
    writeFileSync(modelPath, 'GGUF');
    await expect(createTextService({ modelPath, contextMax: 1 })).rejects.toEqual(
      failure('INVALID_MODEL_FILE'),
    );
  });

  it('refuses everything once it is closed', async () => {
    const service = await open({ template: endless });
    const running = service.encodeChat(user('hang'));
    const waiting = service.encode('x');
    const closing = service.close();
    await expect(running).rejects.toEqual(failure('NO_CAPACITY'));
    await expect(waiting).rejects.toEqual(failure('NO_CAPACITY'));
    await closing;
    await expect(service.encode('x')).rejects.toEqual(failure('NO_CAPACITY'));
  });

  it('keeps the event loop free while it works', async () => {
    const service = await open({ template: plain }, { contextMax: 500_000 });
    let longest = 0;
    let last = performance.now();
    let isDone = false;
    const watch = (): void => {
      const now = performance.now();
      longest = Math.max(longest, now - last);
      last = now;
      if (!isDone) setImmediate(watch);
    };
    watch();
    const begin = performance.now();
    await expect(service.encode('漢'.repeat(4_000_000))).rejects.toEqual(
      failure('CONTEXT_LENGTH_EXCEEDED'),
    );
    const total = performance.now() - begin;
    isDone = true;
    // On this thread the loop would have stood still for all of it.
    expect(longest).toBeLessThan(total / 2);
  });
});
