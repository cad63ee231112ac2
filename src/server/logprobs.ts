// Log-probabilities in OpenAI's two shapes. A token that is not a whole UTF-8 text by itself (half a character) is shown
// by its bytes, as OpenAI does: `\xf0\x9f` in chat, `bytes:\xf0\x9f` in the legacy shape.

import type { GeneratedToken, TokenLogprob } from '../engine/messages.ts';

const strict = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });
/** OpenAI's stand-in for "practically impossible"; JSON has no −Infinity. */
const logprobMin = -9999;

export function chatLogprobs(tokens: readonly GeneratedToken[]): object {
  return {
    content: tokens.map((token) => ({
      ...chatToken(token),
      top_logprobs: token.top.map(chatToken),
    })),
    refusal: null,
  };
}

function chatToken(token: TokenLogprob): object {
  return {
    token: tokenText(token.bytes) ?? escaped(token.bytes),
    logprob: finite(token.logprob),
    bytes: Array.from(token.bytes),
  };
}

/** The legacy shape counts where each token starts in the text, so one object serves one choice from its first token. */
export class LegacyLogprobs {
  /** Characters that are not complete yet stay inside. */
  readonly #decoder = new TextDecoder('utf-8', { ignoreBOM: true });
  /** In Unicode code points, as the Python clients of this shape count. */
  #offset = 0;

  next(tokens: readonly GeneratedToken[]): object {
    const offsets = tokens.map((token) => {
      const offset = this.#offset;
      this.#offset += [...this.#decoder.decode(token.bytes, { stream: true })].length;
      return offset;
    });
    return {
      tokens: tokens.map(legacyText),
      token_logprobs: tokens.map((token) => finite(token.logprob)),
      top_logprobs: tokens.map(legacyTop),
      text_offset: offsets,
    };
  }
}

/** The alternatives and always the token itself, which may not be among them. */
function legacyTop(token: GeneratedToken): object {
  return Object.fromEntries(
    [...token.top, token].map((one) => [legacyText(one), finite(one.logprob)]),
  );
}

function legacyText({ bytes }: TokenLogprob): string {
  return tokenText(bytes) ?? `bytes:${escaped(bytes)}`;
}

function tokenText(bytes: Uint8Array): string | null {
  try {
    return strict.decode(bytes);
  } catch {
    return null;
  }
}

function escaped(bytes: Uint8Array): string {
  return Array.from(bytes, (byte) => `\\x${byte.toString(16).padStart(2, '0')}`).join('');
}

function finite(logprob: number): number {
  return Number.isFinite(logprob) ? logprob : logprobMin;
}
