// Vocabulary and chat template of the real base model, for tests that compare with captures made on it.

import { openGguf } from '../../src/model/gguf.ts';
import { readTokenizerSource, type TokenizerSource } from '../../src/model/tokenizer.ts';
import { baseModelPath } from './base-model.ts';

export async function baseTokenizerSource(): Promise<TokenizerSource> {
  using gguf = openGguf(await baseModelPath());
  return readTokenizerSource(gguf.metadata);
}

export async function baseChatTemplate(): Promise<string> {
  using gguf = openGguf(await baseModelPath());
  return gguf.metadata.string('tokenizer.chat_template');
}
