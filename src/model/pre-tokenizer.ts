// Cuts text into the words that BPE then merges inside, by the rule that a GGUF names in `tokenizer.ggml.pre`. Cuts
// where llama.cpp v0.4.0 does (src/llama-vocab.cpp, the expressions per pre type; src/unicode.cpp, how they run).

import { GatewayError } from '../errors.ts';

export interface PreTokenizer {
  /** The ends of the words of `text`, in UTF-16 units, ascending; the last one is text.length. */
  wordEnds(text: string): number[];
  /** A word that is itself a token is taken whole, even where the merges would not reach it. */
  readonly ignoresMerges: boolean;
  /** Whether a BOS token comes first when the file does not say. */
  readonly addsBos: boolean;
}

// llama.cpp's \s is Unicode's White_Space. JavaScript's \s differs: it has U+FEFF and lacks U+0085.
const space = '\\p{White_Space}';
const trailingSpace = `${space}+(?!\\P{White_Space})|${space}+`;
const gpt2 = `'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^${space}\\p{L}\\p{N}]+|${trailingSpace}`;
const llama3 = (digits: string): string =>
  `'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}${digits}` +
  `| ?[^${space}\\p{L}\\p{N}]+[\\r\\n]*|${space}*[\\r\\n]+|${trailingSpace}`;

interface Rule {
  /** Each expression cuts inside the pieces that the one before it left; matches and gaps are both pieces. */
  readonly expressions: readonly string[];
  readonly ignoresMerges?: true;
  readonly addsBos?: true;
}

const gpt2Rule: Rule = { expressions: [gpt2] };
const llama3Rule: Rule = { expressions: [llama3('{1,3}')], ignoresMerges: true, addsBos: true };
const qwen2Rule: Rule = { expressions: [llama3('')] };

// Names that share an expression in llama.cpp but change something else there too are left out (e.g. roberta-bpe adds
// a separator).
const rules: ReadonlyMap<string, Rule> = new Map([
  ['smollm', { expressions: ['\\p{N}', gpt2] }],
  ['gpt-2', gpt2Rule],
  ['phi-2', gpt2Rule],
  ['mellum', gpt2Rule],
  ['llama3', llama3Rule],
  ['llama-v3', llama3Rule],
  ['llama-bpe', llama3Rule],
  ['falcon3', llama3Rule],
  ['qwen2', qwen2Rule],
  ['deepseek-r1-qwen', qwen2Rule],
  ['default', { expressions: ['[\\p{P}$+<=>^~|]+', gpt2, '\\p{N}+', '[0-9][0-9][0-9]'] }],
]);

// llama.cpp's table of classes is Unicode 15.1; Node 20.20 has Unicode 17. These letters, numbers and punctuation marks
// came after 15.1 and are no class there, so they are read as private-use characters of the same length.
const sinceUnicode16: RegExp = rangesExpression(
  '88f c5c cdc 1b4e-1b4f 1b7f 1c89-1c8a a7cb-a7cf a7d2 a7d4 a7da-a7dc a7f1 105c0-105f3 ' +
    '10940-10959 10d40-10d65 10d6e-10d85 10ec2-10ec7 10ed0 11380-11389 1138b 1138e ' +
    '11390-113b5 113b7 113d1 113d3-113d5 113d7-113d8 116d0-116e3 11bc0-11be1 11bf0-11bf9 ' +
    '11db0-11ddb 11de0-11de9 13460-143fa 16100-1611d 16130-16139 16d40-16d79 16ea0-16eb8 ' +
    '16ebb-16ed3 16ff2-16ff6 187f8-187ff 18cff 18d09-18d1e 18d80-18df2 1ccf0-1ccf9 ' +
    '1e5d0-1e5ed 1e5f0-1e5fa 1e5ff 1e6c0-1e6de 1e6e0-1e6e2 1e6e4-1e6e5 1e6e7-1e6ed ' +
    '1e6f0-1e6f4 1e6fe-1e6ff 2b73a-2b73f 2cea2-2cead 323b0-33479',
);

function rangesExpression(ranges: string): RegExp {
  const range = (text: string): string =>
    text
      .split('-')
      .map((hex) => `\\u{${hex}}`)
      .join('-');
  return new RegExp(`[${ranges.split(' ').map(range).join('')}]`, 'gu');
}

export function createPreTokenizer(name: string): PreTokenizer {
  const rule = rules.get(name);
  if (rule === undefined) {
    throw new GatewayError(
      'UNSUPPORTED',
      `tokenizer.ggml.pre is '${name}'; supported: ${[...rules.keys()].join(', ')}`,
    );
  }
  const expressions = rule.expressions.map((source) => new RegExp(source, 'gu'));
  return {
    wordEnds(text) {
      const classes = text.replace(sinceUnicode16, (c) =>
        c.length === 1 ? '\ue000' : '\u{f0000}',
      );
      return expressions.reduce(
        (ends, expression) => cut(classes, ends, expression),
        [text.length],
      );
    },
    ignoresMerges: rule.ignoresMerges === true,
    addsBos: rule.addsBos === true,
  };
}

function cut(text: string, ends: readonly number[], expression: RegExp): number[] {
  const result: number[] = [];
  let start = 0;
  for (const end of ends) {
    // A slice, not lastIndex on the whole: the end of a piece is the end of the text to a lookahead.
    const piece = ends.length === 1 ? text : text.slice(start, end);
    let done = 0;
    for (const match of piece.matchAll(expression)) {
      if (match.index > done) result.push(start + match.index);
      done = match.index + match[0].length;
      result.push(start + done);
    }
    if (done < piece.length) result.push(end);
    start = end;
  }
  return result;
}
