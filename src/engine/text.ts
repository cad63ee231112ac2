// The contract for text work in the gateway: templates and tokens. Implemented on a worker thread (text-worker.ts), so
// that a long prompt never holds the event loop (figures.md: 50,000 underscores take 608 ms).

import type { TemplateArguments } from '../model/chat-template.ts';

export interface ChatMessage {
  readonly role: 'system' | 'user' | 'assistant';
  readonly content: string;
}

export interface TextService {
  /** Renders the base model's chat template and tokenises it. Special tokens come from the template only: user text
   *  that spells one stays text (faults.md B56). Throws CONTEXT_LENGTH_EXCEEDED beyond `charactersMax`. */
  encodeChat(messages: readonly ChatMessage[], options?: ChatOptions): Promise<EncodedChat>;
  /** Plain text, special tokens never parsed; a BOS token first when the model wants one. */
  encode(text: string): Promise<Int32Array>;
  /** The text of a token sequence; invalid UTF-8 becomes U+FFFD. */
  decode(tokens: Int32Array): Promise<string>;
  close(): Promise<void>;
}

export interface ChatOptions {
  /** Passed to the template as variables. */
  readonly templateArguments?: TemplateArguments;
}

export interface EncodedChat {
  readonly tokens: Int32Array;
  /** What the template rendered, for /apply-template and tests. */
  readonly prompt: string;
}
