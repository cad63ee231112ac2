// What a stream must be equal to: an idle, teacher-forced run of the generation, rank and prompt that it says it had
// (design.md section 4). Used over the tiny model and the real one.

import { readFileSync } from 'node:fs';
import type { Generation } from '../../src/adapters/adapter.ts';
import { blobPath } from '../../src/adapters/blobs.ts';
import { openPacked } from '../../src/adapters/pack.ts';
import type { Decoder } from '../../src/model/decoder.ts';
import { openGguf } from '../../src/model/gguf.ts';
import { scrapCells } from '../../src/model/step-inputs.ts';
import type { AdapterRows } from '../../src/model/stepper.ts';
import { readVocabulary, tokenBytes } from '../../src/model/tokenizer.ts';
import { readEvents } from './gateway-process.ts';
import { writeAdapter } from './load-adapter.ts';

export interface Heard {
  /** null: the base model. */
  readonly generation: Generation | null;
  readonly rank: number;
  readonly prompt: readonly number[];
  /** The bytes of every token, from the log-probabilities. */
  readonly tokens: readonly Buffer[];
}

export interface Choices {
  readonly generation: Generation;
  readonly rank: number;
  /** Per choice, the bytes of every token. */
  readonly tokens: ReadonlyArray<readonly Buffer[]>;
}

/** A streamed completion with `logprobs`, `n` choices of it; null after chunk `cancelAt`. Throws when it breaks or ends without
 *  [DONE]. `onChunk` hears every chunk that has tokens. */
export async function readTokens(
  response: Response,
  n: number,
  cancelAt: number | null = null,
  onChunk: () => void = () => {},
): Promise<Choices | null> {
  const tokens = Array.from({ length: n }, (): Buffer[] => []);
  let [generation, rank, chunks] = ['', 0, 0];
  for await (const data of readEvents(response)) {
    if (data === '[DONE]') return { generation: generation as Generation, rank, tokens };
    const chunk = JSON.parse(data) as {
      error?: unknown;
      rankgate?: { generation: string; rank: number };
      choices: ReadonlyArray<{ index: number; logprobs?: { tokens: string[] } | null }>;
    };
    if (chunk.error !== undefined) throw new Error(data);
    generation = chunk.rankgate?.generation ?? generation;
    rank = chunk.rankgate?.rank ?? rank;
    for (const { index, logprobs } of chunk.choices) {
      for (const token of logprobs?.tokens ?? []) tokens[index]!.push(bytesOf(token));
      if (logprobs) onChunk();
    }
    chunks += 1;
    if (chunks === cancelAt) return null;
  }
  throw new Error('the stream ended without [DONE]');
}

/** The legacy shape writes a token that is no whole text as `bytes:\x..`; everything else is the text itself. */
function bytesOf(text: string): Buffer {
  if (!text.startsWith('bytes:')) return Buffer.from(text);
  return Buffer.from(text.slice('bytes:'.length).replaceAll('\\x', ''), 'hex');
}

/** The model alone: how far below the best token of a teacher-forced run a stream's worst token is, in nats. */
export class IdleOracle implements Disposable {
  readonly #decoder: Decoder;
  readonly #rowsOf: Map<Generation, (rank: number) => AdapterRows | null> = new Map();
  readonly #bytes: readonly Uint8Array[];

  private constructor(decoder: Decoder, bytes: readonly Uint8Array[]) {
    this.#decoder = decoder;
    this.#bytes = bytes;
  }

  /** Takes over the decoder, which must have pages for all: the adapters' one after another, from page 1. */
  static open(
    decoder: Decoder,
    modelPath: string,
    blobs: string,
    generations: readonly Generation[],
  ): IdleOracle {
    using file = openGguf(modelPath);
    const vocabulary = readVocabulary(file.metadata);
    const bytesOfToken = tokenBytes(vocabulary);
    const oracle = new IdleOracle(
      decoder,
      vocabulary.tokens.map((_, token) => bytesOfToken(token) ?? new Uint8Array()),
    );
    let page = 1;
    for (const generation of generations) {
      const packed = openPacked(readFileSync(blobPath(blobs, generation)), generation);
      oracle.#rowsOf.set(generation, writeAdapter(decoder, packed, page));
      page += packed.pages;
    }
    return oracle;
  }

  /** `as`: another generation or rank than the stream's own, to plant a fault. */
  worstGap(
    { prompt, tokens, ...own }: Heard,
    as: Partial<Pick<Heard, 'generation' | 'rank'>> = {},
  ): number {
    const { generation, rank } = { ...own, ...as };
    const adapter = generation === null ? null : this.#rowsOf.get(generation)!(rank);
    let [worst, position] = [0, 0];
    let next: readonly number[] = prompt;
    for (const bytes of tokens) {
      const at = { cellBase: scrapCells, position, adapter, wantsLogits: true };
      const logits = this.#decoder.step([{ ...at, tokens: Int32Array.from(next) }]).logits(0);
      const best = logits.reduce((most, logit) => Math.max(most, logit));
      const chosen = this.#likeliest(logits, bytes);
      worst = Math.max(worst, best - logits[chosen]!);
      position += next.length;
      next = [chosen];
    }
    return worst;
  }

  /** The likeliest token with these bytes. */
  #likeliest(logits: Float32Array, bytes: Buffer): number {
    let best = -1;
    logits.forEach((logit, token) => {
      if ((best < 0 || logit > logits[best]!) && bytes.equals(this.#bytes[token]!)) best = token;
    });
    if (best < 0) throw new Error(`no token has the bytes ${bytes.toString('hex')}`);
    return best;
  }

  [Symbol.dispose](): void {
    this.#decoder[Symbol.dispose]();
  }
}
