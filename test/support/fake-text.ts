import type { ChatMessage, ChatOptions, EncodedChat, TextService } from '../../src/engine/text.ts';

/** One token per UTF-8 byte; a chat is `role: content` lines. Remembers what it was given. */
export class FakeText implements TextService {
  readonly chats: Array<{ messages: readonly ChatMessage[]; options: ChatOptions | undefined }> =
    [];

  async encodeChat(messages: readonly ChatMessage[], options?: ChatOptions): Promise<EncodedChat> {
    this.chats.push({ messages, options });
    const prompt = messages.map(({ role, content }) => `${role}: ${content}\n`).join('');
    return { tokens: await this.encode(prompt), prompt };
  }

  async encode(text: string): Promise<Int32Array> {
    return Int32Array.from(Buffer.from(text, 'utf8'));
  }

  async decode(tokens: Int32Array): Promise<string> {
    return Buffer.from(Uint8Array.from(tokens)).toString('utf8');
  }

  async close(): Promise<void> {}
}
