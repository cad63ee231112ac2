// multipart/form-data (RFC 7578) as it arrives: one part after another, its body in pieces, nothing held but the bytes in
// which the next boundary could hide. Strict: no preamble, one Content-Disposition a part, no transfer encodings. A part's
// filename is a label that names nothing on disk (faults.md B65).

import { invalidRequest } from './problem.ts';

export interface Part {
  readonly name: string;
  /** As its sender wrote it, shortened; null without one. */
  readonly filename: string | null;
  /** To be read to its end before the next part is asked for. */
  readonly body: AsyncIterable<Uint8Array>;
}

const partsMax = 16;
const headBytesMax = 2048;
const headEnd = Buffer.from('\r\n\r\n');

/** null when the content type is not multipart/form-data with a boundary. */
export function boundaryOf(contentType: string): string | null {
  const pattern =
    /^multipart\/form-data\s*;\s*boundary=(?:"([\w'()+,./:=? -]{1,70})"|([\w'+.-]{1,70}))$/i;
  const match = pattern.exec(contentType.trim());
  return match === null ? null : (match[1] ?? match[2]!);
}

/** Throws INVALID_REQUEST, and whatever `source` throws. */
export async function* readMultipart(
  source: AsyncIterable<Uint8Array>,
  boundary: string,
): AsyncGenerator<Part, void> {
  const input = new Input(source);
  const delimiter = Buffer.from(`\r\n--${boundary}`, 'latin1');
  try {
    // The first boundary has no line before it that it could end.
    const preamble = await input.collect(delimiter.subarray(2), delimiter.length);
    if (preamble.length > 0) throw malformed();
    for (let count = 0; ; count++) {
      const next = (await input.take(2)).toString('latin1');
      if (next === '--') return;
      if (next !== '\r\n') throw malformed();
      if (count === partsMax) throw invalidRequest(`the body has more than ${partsMax} parts`);
      const head = await input.collect(headEnd, headBytesMax);
      const body = input.until(delimiter);
      yield { ...labelsOf(head.toString('utf8')), body };
      if ((await body.next()).done !== true) throw new Error('a part was not read to its end');
    }
  } finally {
    await input.close();
  }
}

/** The text of a part that is no file. */
export async function readText(part: Part, bytesMax: number): Promise<string> {
  const chunks: Uint8Array[] = [];
  let count = 0;
  for await (const chunk of part.body) {
    count += chunk.length;
    if (count > bytesMax) {
      throw invalidRequest(`${part.name}: at most ${bytesMax} bytes`, part.name);
    }
    chunks.push(chunk);
  }
  return Buffer.concat(chunks).toString('utf8');
}

function labelsOf(head: string): Pick<Part, 'name' | 'filename'> {
  const fields = head.split('\r\n').map((line) => {
    const [, name = '', value = ''] = /^([\w-]+):[ \t]*(.*)$/.exec(line) ?? [];
    return [name.toLowerCase(), value] as const;
  });
  const encoding = fields.find(([name]) => name === 'content-transfer-encoding')?.[1] ?? 'binary';
  const dispositions = fields.filter(([name]) => name === 'content-disposition');
  const match = /^form-data;[ \t]*name="([\w.-]{1,64})"(;.*)?$/i.exec(dispositions[0]?.[1] ?? '');
  const isPlain = /^(?:binary|7bit|8bit)$/i.test(encoding);
  if (match === null || dispositions.length !== 1 || !isPlain) throw malformed();
  // Percent-encoded quotes, as browsers and Node send them, stay as they are: it is a label.
  const [, filename = null] = /;[ \t]*filename="([^"]*)"/i.exec(match[2] ?? '') ?? [];
  return { name: match[1]!, filename: filename?.replace(/\p{Cc}/gu, '').slice(0, 256) ?? null };
}

function malformed(): Error {
  return invalidRequest('the body is not well-formed multipart/form-data');
}

class Input {
  readonly #source: AsyncIterator<Uint8Array>;
  #held: Buffer = Buffer.alloc(0);

  constructor(source: AsyncIterable<Uint8Array>) {
    this.#source = source[Symbol.asyncIterator]();
  }

  async take(count: number): Promise<Buffer> {
    while (this.#held.length < count) await this.#more();
    const taken = this.#held.subarray(0, count);
    this.#held = this.#held.subarray(count);
    return taken;
  }

  /** What comes before `mark`, and takes the mark away. */
  async *until(mark: Buffer): AsyncGenerator<Uint8Array, void> {
    for (;;) {
      const at = this.#held.indexOf(mark);
      // Without the mark all but its possible beginning is passed on.
      const end = at >= 0 ? at : Math.max(0, this.#held.length - mark.length + 1);
      const piece = this.#held.subarray(0, end);
      this.#held = this.#held.subarray(at >= 0 ? at + mark.length : end);
      if (piece.length > 0) yield piece;
      if (at >= 0) return;
      await this.#more();
    }
  }

  async collect(mark: Buffer, bytesMax: number): Promise<Buffer> {
    const pieces: Uint8Array[] = [];
    let count = 0;
    for await (const piece of this.until(mark)) {
      count += piece.length;
      if (count > bytesMax) throw malformed();
      pieces.push(piece);
    }
    return Buffer.concat(pieces);
  }

  async close(): Promise<void> {
    await this.#source.return?.();
  }

  async #more(): Promise<void> {
    const { done, value } = await this.#source.next();
    if (done === true) throw malformed();
    this.#held = Buffer.concat([this.#held, value]);
  }
}
