// Tokens of one sequence → text as it streams. Half a character is held back; bytes that are no UTF-8 become U+FFFD
// exactly as if the whole answer had been decoded at once.

export interface Detokenizer {
  /** The text that this token makes certain; often empty while a character is incomplete. */
  push(token: number): string;
  /** What is left at the end: U+FFFD for a character that never completed, else empty. */
  flush(): string;
}

export function createDetokenizer(bytesOf: (token: number) => Uint8Array): Detokenizer {
  // ignoreBOM keeps U+FEFF: a model may write one, and TextDecoder would drop it at the start only.
  const decoder = new TextDecoder('utf-8', { ignoreBOM: true });
  return {
    push: (token) => decoder.decode(bytesOf(token), { stream: true }),
    flush: () => decoder.decode(),
  };
}
