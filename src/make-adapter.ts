// `rankgate adapters extract` and `compensate`: model files → a packed adapter in a directory that `adapters add` takes.
// Computed here, not by a server: it takes minutes of a whole core and reads files that only the operator has.

import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { type AdapterManifest, rankMaxLimit } from './adapters/adapter.ts';
import { baseNamesOf } from './adapters/base-name.ts';
import { type CalibrationInput, calibrate, calibrationTokensMax } from './adapters/calibration.ts';
import { compensateModules } from './adapters/eora.ts';
import {
  changedOutsideModules,
  type ExtractTarget,
  extractModules,
  type FilePair,
} from './adapters/extract.ts';
import {
  type LevelRule,
  type PairSource,
  packPairs,
  type SqueezeTarget,
  squeezeTo,
} from './adapters/pack-pairs.ts';
import { packedConfig } from './adapters/packed-import.ts';
import { type PeftAdapter, readPeft } from './adapters/peft.ts';
import { readPeftDirectory } from './adapters/peft-directory.ts';
import { GatewayError } from './errors.ts';
import { createKernels } from './kernels/create-kernels.ts';
import { readDecoderConfig } from './model/decoder-config.ts';
import { sha256OfFile } from './model/file-hash.ts';
import { type GgufFile, openGguf } from './model/gguf.ts';
import { createTokenizer, readTokenizerSource } from './model/tokenizer.ts';
import { loadWeights } from './model/weights.ts';

export interface MakeOptions {
  readonly basePath: string;
  /** A directory, which is made; an adapter must not be in it. */
  readonly output: string;
  readonly levels: LevelRule;
  /** Before each module, from 0. */
  readonly onModule: (block: number, blocks: number) => void;
}

export interface MadeAdapter {
  readonly directory: string;
  readonly bytes: number;
  readonly manifest: AdapterManifest;
  readonly warnings: readonly string[];
}

export interface ExtractOptions extends MakeOptions {
  readonly fromPath: string;
  readonly target: ExtractTarget;
}

export interface Extraction extends MadeAdapter {
  /** What the adapter holds of Σ(W_from − W_base)² over all modules. */
  readonly share: number;
}

export async function makeExtraction(options: ExtractOptions): Promise<Extraction> {
  using from = openGguf(options.fromPath);
  using base = openGguf(options.basePath);
  const left = changedOutsideModules({ from, base });
  const { target } = options;
  const energy = { held: 0, all: 0 };
  const modules = extractModules({ from, base }, target, (held, all) => {
    energy.held += held;
    energy.all += all;
  });
  const what = 'rank' in target ? `rank ${target.rank}` : `energy ${target.energy}`;
  const made = await make(options, base, modules, {
    kind: 'lora',
    describe: `what a fine-tune changed, ${what} per module`,
    by: `extract at ${what}`,
  });
  const shown = left.slice(0, 3).join(', ');
  const warning = `${left.length} tensors differ that no adapter changes: ${shown}`;
  const share = energy.held / energy.all;
  return { ...made, share, warnings: left.length === 0 ? [] : [warning] };
}

/** A text whose inputs say what matters. */
interface Calibration {
  readonly calibrationPath: string;
  readonly threads: number;
}

export interface CompensationOptions extends MakeOptions, Calibration {
  readonly referencePath: string;
  readonly rank: number;
  readonly seed: number;
}

export async function makeCompensation(options: CompensationOptions): Promise<MadeAdapter> {
  using from = openGguf(options.referencePath);
  using base = openGguf(options.basePath);
  const files: FilePair = { from, base };
  const { rank, seed } = options;
  const input = await calibrationOf(base, options);
  using _kernels = input.kernels;
  const { tokens } = input;
  const modules = compensateModules(files, input, { rank, seed });
  const made = await make(options, base, modules, {
    kind: 'eora',
    describe: `what quantisation took from the base, rank ${rank}, by ${tokens.length} tokens of a text`,
    by: `compensate by eora at rank ${rank}, seed ${seed}`,
  });
  return { ...made, warnings: [] };
}

async function calibrationOf(
  base: GgufFile,
  { calibrationPath, threads }: Calibration,
): Promise<CalibrationInput> {
  const config = readDecoderConfig(base);
  const tokenizer = createTokenizer(readTokenizerSource(base.metadata));
  const text = await readFile(calibrationPath, 'utf8');
  const tokens = tokenizer
    .encodeText(text, Math.max(3 * text.length, 1)) // of UTF-8's bytes, each at most a token
    .subarray(0, calibrationTokensMax);
  const kernels = await createKernels('ggml', { threads, f32Activations: true });
  const weights = loadWeights(base, config, { kernels, mode: 'faithful', cache: null });
  return { config, weights, kernels, tokens };
}

export interface OrderingOptions extends MakeOptions, Calibration {
  /** Of a LoRA as PEFT writes it. */
  readonly directory: string;
  readonly baseLabel: string;
  readonly acceptBaseName: string | null;
  /** null: all ranks stay. */
  readonly target: SqueezeTarget | null;
}

/** The LoRA with its ranks in the order of what they do to outputs on the text. */
export async function makeOrdered(options: OrderingOptions): Promise<MadeAdapter> {
  using base = openGguf(options.basePath);
  const { format, ...files } = await readPeftDirectory(options.directory);
  if (format !== 'peft') {
    throw new GatewayError('UNSUPPORTED', 'only a LoRA as PEFT writes it is ordered by a text');
  }
  const { baseLabel, acceptBaseName, target } = options;
  const names = baseNamesOf(baseLabel, base.metadata);
  const hash = await sha256OfFile(options.basePath);
  const ours = { config: readDecoderConfig(base), hash, names };
  const adapter = readPeft({ ...files, base: ours, acceptBaseName });
  const input = await calibrationOf(base, options);
  using _kernels = input.kernels;
  const made = await make(options, base, orderedModules(adapter, input, target), {
    kind: 'lora',
    describe: `low-rank pairs, ranks ordered by what they do to outputs on ${input.tokens.length} tokens of a text`,
    by: `squeeze by outputs to ${target === null ? 'all ranks' : Object.entries(target)[0]!.join(' ')}`,
  });
  return { ...made, warnings: adapter.warnings };
}

/** Block by block: its inputs are measured when its first module is asked for. */
function* orderedModules(
  adapter: PeftAdapter,
  input: CalibrationInput,
  target: SqueezeTarget | null,
): Generator<PairSource, void> {
  let block = 0;
  for (const covariances of calibrate(input)) {
    for (const module of adapter.modules.filter((one) => one.block === block)) {
      const covariance = covariances[module.projection];
      const all = { rank: rankMaxLimit };
      const squeeze = () => squeezeTo(adapter.read(module), target ?? all, covariance);
      yield { module, squeeze };
    }
    block += 1;
  }
}

interface About {
  readonly kind: 'lora' | 'eora';
  readonly describe: string;
  readonly by: string;
}

async function make(
  { basePath, output, levels, onModule }: MakeOptions,
  base: GgufFile,
  modules: Iterable<PairSource>,
  { kind, describe, by }: About,
): Promise<Omit<MadeAdapter, 'warnings'>> {
  const { blocks } = readDecoderConfig(base);
  function* told(): Generator<PairSource, void> {
    for (const source of modules) {
      onModule(source.module.block, blocks);
      yield source;
    }
  }
  const baseHash = await sha256OfFile(basePath);
  const source = { format: 'rankgate', by, from: [] } as const;
  const { manifest, bytes } = packPairs(told(), { kind, describe, baseHash, source, levels });
  const directory = resolve(output);
  await mkdir(directory, { recursive: true });
  const write = (name: string, contents: string | Uint8Array): Promise<void> =>
    writeFile(join(directory, name), contents, { flag: 'wx' });
  try {
    await write('adapter_model.safetensors', bytes);
    await write('rankgate.json', packedConfig);
  } catch (cause) {
    const code = (cause as NodeJS.ErrnoException).code ?? 'unknown error';
    throw new GatewayError('INVALID_REQUEST', `${output} cannot be written (${code})`, { cause });
  }
  return { directory, bytes: bytes.length, manifest };
}
