// The thread that owns a model's vocabulary and chat template: one task at a time, each answered once. It may be
// terminated at any moment (text-service.ts does so with a template that does not end) and keeps nothing between tasks.

import { parentPort, workerData } from 'node:worker_threads';
import { asGatewayError, type ErrorCode, GatewayError } from '../errors.ts';
import {
  type ChatTemplate,
  createChatTemplate,
  type TemplateArguments,
} from '../model/chat-template.ts';
import { openGguf } from '../model/gguf.ts';
import {
  createTokenizer,
  readTokenizerSource,
  type TokenizerSource,
  tokenBytes,
} from '../model/tokenizer.ts';
import type { ChatMessage, EncodedChat } from './text.ts';

export interface TextWorkerData {
  readonly modelPath: string;
  readonly contextMax: number;
}

export type TextTask =
  | {
      readonly kind: 'encode-chat';
      readonly messages: readonly ChatMessage[];
      readonly templateArguments: TemplateArguments;
    }
  | { readonly kind: 'encode'; readonly text: string }
  | { readonly kind: 'decode'; readonly tokens: Int32Array };

export type TextResult = EncodedChat | Int32Array | string;

export type FromTextWorker =
  | {
      readonly kind: 'ready';
      /** No longer text fits into the context, however it is written. */
      readonly charactersMax: number;
    }
  /** The model cannot be used; the thread ends. */
  | ({ readonly kind: 'refused' } & PlainError)
  | { readonly kind: 'done'; readonly result: TextResult }
  | ({ readonly kind: 'failed' } & PlainError);

export interface PlainError {
  readonly code: ErrorCode;
  readonly message: string;
  readonly param: string | undefined;
}

interface Desk {
  readonly charactersMax: number;
  work(task: TextTask): TextResult;
}

function readModel(path: string): { source: TokenizerSource; templateText: string | null } {
  using gguf = openGguf(path);
  const key = 'tokenizer.chat_template';
  return {
    source: readTokenizerSource(gguf.metadata),
    templateText: gguf.metadata.has(key) ? gguf.metadata.string(key) : null,
  };
}

function openDesk({ modelPath, contextMax }: TextWorkerData): Desk {
  const { source, templateText } = readModel(modelPath);
  const tokenizer = createTokenizer(source);
  const bytesOf = tokenBytes(source, 'shown');
  const charactersMax = contextMax * tokenizer.tokenCharactersMax;
  let template: ChatTemplate | null = null;
  if (templateText !== null) {
    template = createChatTemplate({
      template: templateText,
      bosText: tokenizer.bos === null ? '' : tokenizer.textOf(tokenizer.bos),
      eosText: tokenizer.eos === null ? '' : tokenizer.textOf(tokenizer.eos),
      specials: tokenizer.specials,
    });
  }

  const encode = (text: string): Int32Array => {
    if (!tokenizer.addsBos || tokenizer.bos === null) return tokenizer.encodeText(text, contextMax);
    const tokens = tokenizer.encodeText(text, contextMax - 1);
    // Not a spread: 200,000 arguments overflow the stack.
    const all = new Int32Array(tokens.length + 1);
    all[0] = tokenizer.bos;
    all.set(tokens, 1);
    return all;
  };
  const decode = (tokens: Int32Array): string => {
    const parts = Array.from(tokens, (token) => bytesOf(token) ?? unknownToken(token));
    return new TextDecoder('utf-8', { ignoreBOM: true }).decode(Buffer.concat(parts));
  };
  return {
    charactersMax,
    work(task) {
      switch (task.kind) {
        case 'encode-chat': {
          if (template === null) {
            throw new GatewayError('UNSUPPORTED', 'the model file has no chat template');
          }
          const { messages, templateArguments } = task;
          const now = new Date();
          const chat = template.render({ messages, templateArguments, now, charactersMax });
          const tokens = tokenizer.encodePrompt(chat.marked, chat.mark, contextMax);
          return { tokens, prompt: chat.prompt };
        }
        case 'encode':
          return encode(task.text);
        case 'decode':
          return decode(task.tokens);
      }
    },
  };
}

function unknownToken(token: number): never {
  throw new GatewayError('INVALID_REQUEST', `the vocabulary has no token ${token}`, {
    param: 'tokens',
  });
}

function plainError(error: unknown): PlainError {
  const { code, message, param } = asGatewayError(error);
  return { code, message, param };
}

function serve(port: NonNullable<typeof parentPort>): void {
  const send = (message: FromTextWorker): void => port.postMessage(message);
  let desk: Desk;
  try {
    desk = openDesk(workerData as TextWorkerData);
  } catch (error) {
    send({ kind: 'refused', ...plainError(error) });
    port.close();
    return;
  }
  port.on('message', (task: TextTask) => {
    try {
      send({ kind: 'done', result: desk.work(task) });
    } catch (error) {
      send({ kind: 'failed', ...plainError(error) });
    }
  });
  send({ kind: 'ready', charactersMax: desk.charactersMax });
}

if (parentPort !== null) serve(parentPort);
