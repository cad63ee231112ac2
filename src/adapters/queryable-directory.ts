// A queryable adapter as a directory, format `queryable/1` (algorithms.md section 6). rankgate.json: rank, alpha, top_k, the
// text of each atom's label, and the bank. adapter_model.safetensors: `blk.{block}.{projection}.a` [r, in] and `.b` [r, out]
// of each module, rows in the base's own order; `keys` [K, dq]; and the bank, either whole (`bank.atoms` [K, r, r],
// `bank.query` [dq, r], `bank.summary` [r, r], `bank.context` [dq, r]) or named by its generation: then `bank.atoms`, if
// there, are more atoms for its end. Equal banks are one stored file, whoever brings them; keys may be fewer than atoms.

import { z } from 'zod';
import { GatewayError } from '../errors.ts';
import { earlierMax, routedMax } from '../kernels/rank-routing.ts';
import type { GgufFile } from '../model/gguf.ts';
import {
  readSafetensors,
  type SafetensorsTensor,
  toFloat32,
  writeSafetensors,
} from '../model/safetensors.ts';
import { createTokenizer, readTokenizerSource } from '../model/tokenizer.ts';
import {
  type AdapterManifest,
  type Generation,
  isGeneration,
  noOptions,
  pageRanks,
} from './adapter.ts';
import { numbersOf } from './extract.ts';
import { refuse } from './families/family.ts';
import { scaled } from './families/matrices.ts';
import { alpha, type NativeInput, parseOptions, rank, readModules } from './native-import.ts';
import { createPacker, type FloatName, type Floats, type PackedAdapter } from './pack.ts';
import { floatTensor } from './pack-numbers.ts';
import type { Packed } from './pack-pairs.ts';
import type { ExportedFiles } from './registry.ts';
import { servedPair } from './served.ts';

const labelLengthMax = 1000;
const schema = z.strictObject({
  kind: z.literal('queryable'),
  format: z.literal('queryable/1'),
  /** SHA-256 of the base's file; when absent, whatever the base is. */
  base_hash: z
    .string()
    .regex(/^[0-9a-f]{64}$/)
    .exactOptional(),
  rank,
  alpha,
  /** Atoms that are mixed for a token. */
  top_k: rank,
  labels: z.array(z.string().min(1).max(labelLengthMax)).min(1).max(routedMax),
  bank: z.union([
    z.strictObject({ block_layers: z.int().min(1).max(9_999) }),
    z.custom<Generation>((value) => typeof value === 'string' && isGeneration(value)),
  ]),
});
type Options = z.infer<typeof schema>;

export interface QueryableInput
  extends Pick<NativeInput, 'config' | 'weights' | 'base' | 'baseFile'> {
  /** null: there is no such bank of this base. */
  readonly readBank: (generation: Generation) => Promise<PackedAdapter | null>;
  readonly storeShared: (bank: Packed) => Promise<Generation>;
}

/** Whether rankgate.json says so; what is no JSON says nothing. */
export function isQueryable(config: string): boolean {
  try {
    return (JSON.parse(config) as { readonly kind?: unknown } | null)?.kind === 'queryable';
  } catch {
    return false;
  }
}

/** Throws INVALID_ADAPTER or BASE_MISMATCH. */
export async function packQueryable(input: QueryableInput): Promise<Packed> {
  const options = parseOptions(input.config, schema);
  const { rank: r, top_k: topK, labels, base_hash: theirs } = options;
  const { hash: ours, config } = input.base;
  if (theirs !== undefined && theirs !== ours) {
    const [a, b] = [theirs, ours].map((hash) => hash.slice(0, 12));
    throw new GatewayError('BASE_MISMATCH', `made for the base ${a}…, this one is ${b}…`);
  }
  if (topK > labels.length) invalid(`top_k is ${topK}, and there are ${labels.length} labels`);
  const left = new Map(readSafetensors(input.weights).tensors);
  const bank = await bankOf(options, left, input);
  if (labels.length > bank.K) invalid(`${labels.length} labels for ${bank.K} atoms`);
  const keys = takeFloats(left, 'keys', [labels.length, bank.dq]);
  const axes = { a: [r, 'in'], b: [r, 'out'] } as const;
  const modules = readModules(input, { kind: 'queryable', axes }, left);
  for (let block = 0; block < config.blocks; block += bank.blockLayers) {
    if (modules.some(({ site }) => site.block === block && site.projection === 'attn_q')) continue;
    invalid(`blk.${block}.attn_q is not there: it routes its block of layers`);
  }
  const packer = createPacker();
  for (const { site, tensors } of modules) {
    const b = scaled(tensors.b!, options.alpha / r).data;
    packer.add(servedPair(site, { rank: r, a: tensors.a!.data, b }));
  }
  return packer.finish(
    {
      ...manifestOf('queryable', r, input),
      describe: `Queryable LoRA of rank ${r}: ${topK} of ${labels.length} shared atoms a token`,
      rankCurve: new Array<number>(r).fill(1), // every rank is mixed, whatever level is asked for
      options: { ...noOptions, needs: bank.generation, topK, labels },
    },
    new Map([
      ['keys', keys],
      ['labels', embeddedLabels(labels, input.baseFile, config.width)],
    ]),
  );
}

function manifestOf(
  kind: 'queryable' | 'bank',
  rankMax: number,
  { base }: QueryableInput,
): Pick<AdapterManifest, 'format' | 'kind' | 'baseHash' | 'rankMax' | 'levels' | 'source'> {
  return {
    format: 'rankgate-adapter/3',
    kind,
    baseHash: base.hash,
    rankMax,
    levels: null,
    source: { format: 'rankgate', by: 'queryable/1', from: [] },
  };
}

function invalid(what: string): never {
  return refuse('queryable:', what);
}

type Tensors = Map<string, SafetensorsTensor>;

/** Takes a tensor of these axes, null where any size will do. Throws unless it is there and finite. */
function takeFloats(left: Tensors, name: string, axes: readonly (number | null)[]): Floats {
  const tensor = left.get(name);
  left.delete(name);
  if (tensor === undefined) invalid(`lacks the tensor ${name}`);
  const { shape } = tensor;
  const fits = axes.every((size, i) => (size === null ? (shape[i] ?? 0) >= 1 : shape[i] === size));
  if (!fits || shape.length !== axes.length) {
    const want = axes.map((size) => size ?? 'any').join(', ');
    invalid(`${name} is [${shape.join(', ')}], want [${want}]`);
  }
  const values = toFloat32(tensor);
  if (!values.every(Number.isFinite)) invalid(`${name} has a value that is not finite`);
  return { shape, values };
}

interface Bank {
  readonly generation: Generation;
  readonly K: number;
  readonly dq: number;
  readonly blockLayers: number;
}

/** The bank that the adapter is for, stored. */
async function bankOf(
  { rank: r, bank }: Options,
  left: Tensors,
  input: QueryableInput,
): Promise<Bank> {
  if (typeof bank !== 'string') {
    const atoms = takeFloats(left, 'bank.atoms', [null, r, r]);
    const query = takeFloats(left, 'bank.query', [null, r]);
    const summary = takeFloats(left, 'bank.summary', [r, r]);
    const context = takeFloats(left, 'bank.context', [query.shape[0]!, r]);
    const floats = new Map(Object.entries({ atoms, query, summary, context }));
    return storeBank(floats as BankFloats, bank.block_layers, input);
  }
  const known = await input.readBank(bank);
  if (known === null) invalid(`no atom bank of this base has the generation ${bank}`);
  const { floats, manifest } = known;
  const { shape, values } = floats.get('atoms')!;
  if (shape[1] !== r) invalid(`rank is ${r}, the bank's atoms are of ${shape[1]} ranks`);
  const blockLayers = manifest.options.blockLayers!;
  if (!left.has('bank.atoms')) return { generation: bank, ...sizesOf(floats), blockLayers };
  const more = takeFloats(left, 'bank.atoms', [null, r, r]);
  const all = new Float32Array(values.length + more.values.length);
  all.set(values);
  all.set(more.values, values.length);
  const atoms = { shape: [shape[0]! + more.shape[0]!, r, r], values: all };
  return storeBank(new Map([...floats, ['atoms', atoms]]), blockLayers, input);
}

type BankFloats = ReadonlyMap<FloatName, Floats>;

function sizesOf(floats: BankFloats): { readonly K: number; readonly dq: number } {
  return { K: floats.get('atoms')!.shape[0]!, dq: floats.get('query')!.shape[0]! };
}

/** A function of its numbers alone: what two tenants bring is one file. */
async function storeBank(
  floats: BankFloats,
  blockLayers: number,
  input: QueryableInput,
): Promise<Bank> {
  const { K, dq } = sizesOf(floats);
  const r = floats.get('summary')!.shape[0]!;
  const groups = Math.ceil(input.base.config.blocks / blockLayers);
  if (Math.max(K, dq) > routedMax) {
    invalid(`a bank of ${K} atoms and queries of ${dq} numbers, at most ${routedMax} are served`);
  }
  if (groups > earlierMax + 1) {
    invalid(
      `block_layers ${blockLayers} makes ${groups} blocks, at most ${earlierMax + 1} are served`,
    );
  }
  const describe = `${K} atoms of ${r} ranks, queries of ${dq} numbers, one choice for ${blockLayers} layers`;
  const about = { ...manifestOf('bank', r, input), describe, rankCurve: [] };
  const packed = createPacker().finish(
    { ...about, options: { ...noOptions, blockLayers } },
    floats,
  );
  return { generation: await input.storeShared(packed), K, dq, blockLayers };
}

/** τ_k: the mean of the label's token embeddings, as the engine makes one of an instruction (engine/instruction-prior.ts). */
export function embeddedLabels(labels: readonly string[], file: GgufFile, width: number): Floats {
  const tokenizer = createTokenizer(readTokenizerSource(file.metadata));
  const values = new Float32Array(labels.length * width);
  for (const [k, label] of labels.entries()) {
    const tokens = tokenizer.encodeText(label, 3 * label.length); // of UTF-8's bytes, each at most a token
    if (tokens.length === 0) invalid(`labels.${k} has no tokens`);
    for (const token of tokens) {
      const embedding = numbersOf(file, 'token_embd.weight', token);
      for (let i = 0; i < width; i++) values[k * width + i]! += embedding[i]! / tokens.length;
    }
  }
  return { shape: [labels.length, width], values };
}

/** The directory that imports as the same generation, its bank in it. */
export function exportQueryable(packed: PackedAdapter, bank: PackedAdapter): ExportedFiles {
  const { modules, rankMax, options, baseHash } = packed.manifest;
  const tensors = new Map<string, SafetensorsTensor>();
  for (const module of modules) {
    for (const side of ['a', 'b'] as const) {
      const width = side === 'a' ? module.in : module.out;
      const halves = new Uint16Array(packed.pages * pageRanks * width);
      for (let page = 0; page < packed.pages; page++) {
        halves.set(packed.page(module, page)![side], page * pageRanks * width);
      }
      const data = new Uint8Array(halves.buffer, 0, 2 * rankMax * width);
      const name = `blk.${module.block}.${module.projection}.${side}`;
      tensors.set(name, { dtype: 'F16', shape: [rankMax, width], data });
    }
  }
  const { shape, values } = packed.floats.get('keys')!;
  tensors.set('keys', floatTensor(values, shape));
  for (const [name, floats] of bank.floats) {
    tensors.set(`bank.${name}`, floatTensor(floats.values, floats.shape));
  }
  const config: Options = {
    ...{ kind: 'queryable', format: 'queryable/1', base_hash: baseHash },
    ...{ rank: rankMax, alpha: rankMax, top_k: options.topK!, labels: [...options.labels!] },
    bank: { block_layers: bank.manifest.options.blockLayers! },
  };
  const text = `${JSON.stringify(config, null, 2)}\n`;
  return { configName: 'rankgate.json', config: text, weights: writeSafetensors(tensors) };
}
