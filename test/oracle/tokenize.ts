// Captures what llama.cpp makes of the corpus and of the chats that chat-template.py rendered:
// test/golden/tokenizer/smollm2.json. Run from the repository root:
//   mkdir DIR && cd DIR && npm init -y && npm install --ignore-scripts node-llama-cpp@3.21.1   (once, anywhere)
//   npx tsx test/oracle/tokenize.ts DIR path/to/SmolLM2-135M-Instruct.Q4_1.gguf
// node-llama-cpp carries llama.cpp prebuilt; nothing here shares code with src/.

import { createHash } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { corpus, planeText, sweptPlanes } from './tokenize-corpus.ts';

const seed = 20261125;
const preTypes = ['smollm', 'gpt-2', 'qwen2', 'llama3', 'default'] as const;

interface Model {
  tokenize(text: string, parseSpecial: boolean): number[];
  dispose(): Promise<void>;
}

const [oracleDir, modelPath] = process.argv.slice(2);
if (oracleDir === undefined || modelPath === undefined) throw new Error('usage: see the header');

const moduleDir = join(oracleDir, 'node_modules/node-llama-cpp');
const library = await import(pathToFileURL(join(moduleDir, 'dist/index.js')).href);
const llama = await library.getLlama({ build: 'never', gpu: false, logLevel: 'error' });
const original = readFileSync(modelPath);

/** The model with another tokenizer.ggml.pre: the vocabulary stays, the words are cut differently. */
function withPre(pre: string): Buffer {
  const key = 'tokenizer.ggml.pre';
  const at = original.indexOf(key) + key.length + 4; // key, value type, then the string's length
  const length = Number(original.readBigUInt64LE(at));
  const size = Buffer.alloc(8);
  size.writeBigUInt64LE(BigInt(pre.length));
  return Buffer.concat([
    original.subarray(0, at),
    size,
    Buffer.from(pre),
    original.subarray(at + 8 + length),
    Buffer.alloc(64), // room for the alignment of the tensors after a longer header; nobody reads them
  ]);
}

async function open(pre: string): Promise<Model> {
  const dir = mkdtempSync(join(tmpdir(), 'tokenize-'));
  const path = join(dir, 'model.gguf');
  writeFileSync(path, withPre(pre));
  const model = await llama.loadModel({ modelPath: path, vocabOnly: true });
  rmSync(dir, { recursive: true });
  return model;
}

const pack = (ids: readonly number[]): string =>
  Buffer.from(Uint16Array.from(ids).buffer).toString('base64');
const hash = (ids: readonly number[]): string =>
  createHash('sha256')
    .update(Buffer.from(Int32Array.from(ids).buffer))
    .digest('hex');

// The control tokens of the vocabulary; each is checked below to parse to one id.
const specials = (
  '<|endoftext|> <|im_start|> <|im_end|> <repo_name> <reponame> <file_sep> <filename> <gh_stars> <issue_start> ' +
  '<issue_comment> <issue_closed> <jupyter_start> <jupyter_text> <jupyter_code> <jupyter_output> <jupyter_script> ' +
  '<empty_output>'
).split(' ');

const goldenDir = join(import.meta.dirname, '../golden/tokenizer');
const { chats } = JSON.parse(readFileSync(join(goldenDir, 'chats.json'), 'utf8'));
const prompts: string[] = chats.map((chat: { prompt: string }) => chat.prompt);
let chatIds: string[] = [];
const texts = corpus(specials, seed);
const ids: Record<string, { text: string[]; prompt: Record<number, string>; planes: string[] }> =
  {};
for (const pre of preTypes) {
  const model = await open(pre);
  const prompt: Record<number, string> = {};
  const text = texts.map((sample, index) => {
    const plain = pack(model.tokenize(sample, false));
    const parsed = pack(model.tokenize(sample, true));
    if (parsed !== plain) prompt[index] = parsed;
    return plain;
  });
  if (specials.some((special) => model.tokenize(special, true).length !== 1)) {
    throw new Error('a special token does not parse to one id');
  }
  const planes = sweptPlanes.map((plane) => hash(model.tokenize(planeText(plane), false)));
  ids[pre] = { text, prompt, planes };
  if (pre === 'smollm') chatIds = prompts.map((text) => pack(model.tokenize(text, true)));
  await model.dispose();
}

const { version } = JSON.parse(readFileSync(join(moduleDir, 'package.json'), 'utf8'));
const golden = {
  about:
    'Token ids by llama.cpp. ids.PRE.text: special tokens not parsed; .prompt: parsed, where that differs.',
  madeBy: `node-llama-cpp ${version} (llama.cpp ${llama.llamaCppRelease.release}), test/oracle/tokenize.ts`,
  modelSha256: createHash('sha256').update(original).digest('hex'),
  seed,
  specials,
  texts,
  ids,
  chatIds,
};
writeFileSync(join(goldenDir, 'smollm2.json'), `${JSON.stringify(golden)}\n`);
process.exit(0); // llama.cpp's threads keep the process alive
