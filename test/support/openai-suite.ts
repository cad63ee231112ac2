import OpenAI, { type APIError, BadRequestError, NotFoundError } from 'openai';
import { describe, expect, it } from 'vitest';

export interface OpenAiTarget {
  /** Asked inside each test, when the server listens: `http://host:port/v1`. */
  baseUrl(): string;
  readonly apiKey: string;
  readonly models: { readonly base: string; readonly adapter: string };
}

/** What OpenAI's own client needs to work, against any rankgate that listens. Says nothing about what is answered, so
 *  that it holds for the fake engine and for the real one alike. */
export function runOpenAiSuite(target: OpenAiTarget): void {
  const client = (): OpenAI =>
    new OpenAI({ baseURL: target.baseUrl(), apiKey: target.apiKey, maxRetries: 0 });
  const { base, adapter } = target.models;
  const messages = [{ role: 'user' as const, content: 'Name three colours.' }];
  const greedy = { temperature: 0, seed: 1, max_tokens: 12 };

  describe("OpenAI's client", () => {
    it.each([base, adapter])('gets a whole chat answer from %s', async (model) => {
      const answer = await client().chat.completions.create({ model, messages, ...greedy });
      expect(answer.object).toBe('chat.completion');
      expect(answer.model).toBe(model);
      const [choice] = answer.choices;
      expect(choice!.message.role).toBe('assistant');
      expect(choice!.message.content!.length).toBeGreaterThan(0);
      expect(['stop', 'length']).toContain(choice!.finish_reason);
      const usage = answer.usage!;
      expect(usage.completion_tokens).toBeGreaterThan(0);
      expect(usage.completion_tokens).toBeLessThanOrEqual(greedy.max_tokens);
      expect(usage.total_tokens).toBe(usage.prompt_tokens + usage.completion_tokens);
    });

    it.each([base, adapter])('streams the same text from %s, with usage', async (model) => {
      const whole = await client().chat.completions.create({ model, messages, ...greedy });
      const stream = await client().chat.completions.create({
        model,
        messages,
        ...greedy,
        stream: true,
        stream_options: { include_usage: true },
      });
      const chunks = [];
      for await (const chunk of stream) chunks.push(chunk);
      const deltas = chunks.flatMap((chunk) => chunk.choices).map((choice) => choice.delta);
      expect(deltas[0]!.role).toBe('assistant');
      expect(deltas.map((delta) => delta.content ?? '').join('')).toBe(
        whole.choices[0]!.message.content,
      );
      expect(new Set(chunks.map((chunk) => chunk.id)).size).toBe(1);
      expect(chunks.every((chunk) => chunk.object === 'chat.completion.chunk')).toBe(true);
      const reasons = chunks.flatMap((chunk) => chunk.choices).map((one) => one.finish_reason);
      expect(reasons.filter((reason) => reason !== null)).toEqual([
        whole.choices[0]!.finish_reason,
      ]);
      expect(chunks.at(-1)!.choices).toEqual([]);
      expect(chunks.at(-1)!.usage!.completion_tokens).toBe(whole.usage!.completion_tokens);
    });

    it("works with the client's stream helper", async () => {
      const runner = client().chat.completions.stream({ model: adapter, messages, ...greedy });
      const final = await runner.finalChatCompletion();
      expect(final.choices[0]!.message.content).toBe(await runner.finalContent());
    });

    it('gets log-probabilities, with and without alternatives', async () => {
      const ask = { model: base, messages, ...greedy, logprobs: true };
      const plain = await client().chat.completions.create(ask);
      const content = plain.choices[0]!.logprobs!.content!;
      expect(content).toHaveLength(plain.usage!.completion_tokens);
      for (const token of content) {
        expect(token.logprob).toBeLessThanOrEqual(0);
        expect(token.top_logprobs).toEqual([]);
        expect(token.bytes!.length).toBeGreaterThan(0);
      }
      const top = await client().chat.completions.create({ ...ask, top_logprobs: 3 });
      expect(top.choices[0]!.logprobs!.content![0]!.top_logprobs).toHaveLength(3);
    });

    it('gets n choices', async () => {
      const answer = await client().chat.completions.create({
        model: base,
        messages,
        n: 2,
        seed: 3,
        max_tokens: 4,
      });
      expect(answer.choices.map((choice) => choice.index)).toEqual([0, 1]);
    });

    it('stops before a stop string, whole and streamed', async () => {
      const free = await client().chat.completions.create({ model: base, messages, ...greedy });
      const text = free.choices[0]!.message.content!;
      const stop = text.slice(4, 7);
      const ask = { model: base, messages, ...greedy, stop: [stop] };
      const whole = await client().chat.completions.create(ask);
      expect(whole.choices[0]!.message.content).toBe(text.slice(0, text.indexOf(stop)));
      expect(whole.choices[0]!.finish_reason).toBe('stop');
      let streamed = '';
      for await (const chunk of await client().chat.completions.create({ ...ask, stream: true })) {
        streamed += chunk.choices[0]?.delta.content ?? '';
      }
      expect(streamed).toBe(whole.choices[0]!.message.content);
    });

    it('gets legacy completions, whole, streamed and echoed', async () => {
      const ask = { model: base, prompt: 'Once upon a time', ...greedy };
      const whole = await client().completions.create({ ...ask, logprobs: 2 });
      const [choice] = whole.choices;
      expect(whole.object).toBe('text_completion');
      expect(choice!.logprobs!.tokens).toHaveLength(whole.usage!.completion_tokens);
      expect(choice!.logprobs!.text_offset![0]).toBe(0);
      let streamed = '';
      for await (const chunk of await client().completions.create({ ...ask, stream: true })) {
        streamed += chunk.choices[0]?.text ?? '';
      }
      expect(streamed).toBe(choice!.text);
      const echoed = await client().completions.create({ ...ask, echo: true });
      expect(echoed.choices[0]!.text).toBe(ask.prompt + choice!.text);
    });

    it('lists and shows models', async () => {
      const ids: string[] = [];
      for await (const model of client().models.list()) ids.push(model.id);
      expect(ids).toEqual(expect.arrayContaining([base, adapter]));
      expect((await client().models.retrieve(adapter)).id).toBe(adapter);
    });

    it('reads errors as errors', async () => {
      const unknown = client().chat.completions.create({ model: 'no-such-model', messages });
      await expect(unknown).rejects.toBeInstanceOf(NotFoundError);
      const wrong = client().chat.completions.create({ model: base, messages, temperature: 9 });
      const error = await wrong.catch((thrown: unknown) => thrown);
      expect(error).toBeInstanceOf(BadRequestError);
      expect(error).toMatchObject({ param: 'temperature', code: 'invalid_request' });
      expect((error as APIError).requestID).toBeTruthy();
    });

    it('can go away in mid-stream', async () => {
      const stream = await client().chat.completions.create({
        model: base,
        messages,
        temperature: 0,
        max_tokens: 64,
        stream: true,
      });
      for await (const _ of stream) break;
      stream.controller.abort();
      const after = await client().chat.completions.create({
        model: base,
        messages,
        max_tokens: 1,
      });
      expect(after.choices).toHaveLength(1);
    });
  });
}
