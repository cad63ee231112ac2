// From a model file and sizes to a loop that can serve: decoder, token table, adapter memory and cells put together.
// The one place that knows which implementations stand behind the loop.

import { cpus } from 'node:os';
import { blobPath } from '../adapters/blobs.ts';
import { createHostTier } from '../adapters/host-tier.ts';
import { createPackReader } from '../adapters/pack-reader.ts';
import { createResidency } from '../adapters/residency.ts';
import { GatewayError } from '../errors.ts';
import type { BackendName } from '../kernels/create-kernels.ts';
import type { DeviceWish } from '../kernels/ggml/select-device.ts';
import { plainRowMath, type RowMath } from '../kernels/row-math.ts';
import { rememberedSha256, sha256OfFile } from '../model/file-hash.ts';
import { openGguf } from '../model/gguf.ts';
import { type OpenedDecoder, openDecoder } from '../model/open-decoder.ts';
import { endTokensOf, readVocabulary, tokenBytes } from '../model/tokenizer.ts';
import type { WeightMode } from '../model/weights.ts';
import type { EngineClock } from './clock.ts';
import { EngineLoop, type LoopLimits } from './engine-loop.ts';
import { contextMaxOf, KvPool } from './kv-pool.ts';
import type { FromEngine } from './messages.ts';
import { PrefixCache } from './prefix-cache.ts';
import type { SpeculationWish } from './speculation.ts';
import { type StepWatch, watchSteps } from './thread-governor.ts';

/** Plain data: it crosses to the engine process as JSON. */
export interface EngineConfig {
  readonly modelPath: string;
  /** SHA-256 of the model file, hex. The file may be another one by the time that an engine is started again. */
  readonly modelHash: string;
  readonly weights: WeightMode;
  readonly backend: BackendName;
  readonly threads: number;
  readonly device: DeviceWish;
  /** null: the libraries that the installed package carries. */
  readonly libraryDirectory: string | null;
  /** Where converted weights are kept; null: nowhere. */
  readonly cacheDirectory: string | null;
  /** Where packed adapters lie. */
  readonly blobDirectory: string;
  readonly cells: number;
  readonly pages: number;
  /** Packed adapters that are kept in memory beside the pages; none when absent. */
  readonly hostBytesMax?: number;
  /** Most tokens, and most sequences, in one step. */
  readonly tokensMax: number;
  readonly segmentsMax: number;
  readonly limits: LoopLimits;
  readonly tenantShareMax: number;
  /** `auto` when absent. */
  readonly speculation?: SpeculationWish;
}

const noBytes = new Uint8Array();

/** In a container these are the host's cores, of which some may be idle and not ours: then a raise is tried in vain. */
function createIdleCores(nowMs: () => number): () => number {
  const idleMs = (): number => cpus().reduce((sum, { times }) => sum + times.idle, 0);
  let [atMs, atIdleMs] = [nowMs(), idleMs()];
  return () => {
    const [fromMs, fromIdleMs] = [atMs, atIdleMs];
    [atMs, atIdleMs] = [nowMs(), idleMs()];
    return (atIdleMs - fromIdleMs) / (atMs - fromMs);
  };
}

function watchThreads(
  threads: number,
  setThreads: OpenedDecoder['setThreads'],
  clock: EngineClock,
): StepWatch {
  if (setThreads === null) return { threads, begin() {}, end() {} };
  const cpuMs = (): number => {
    const { user, system } = process.cpuUsage();
    return (user + system) / 1000;
  };
  const nowMs = (): number => clock.nowMs();
  const idleCores = createIdleCores(nowMs);
  return watchSteps({ threadsMax: threads, setThreads, nowMs, cpuMs, idleCores });
}

async function openRowMath(backend: BackendName): Promise<RowMath> {
  if (backend !== 'ggml') return plainRowMath;
  const { nativeRowMath } = await import('../kernels/ggml/native-row-math.ts');
  return nativeRowMath() ?? plainRowMath;
}

async function checkHash({ modelPath, modelHash, cacheDirectory }: EngineConfig): Promise<void> {
  const found =
    cacheDirectory === null
      ? await sha256OfFile(modelPath)
      : await rememberedSha256(modelPath, cacheDirectory);
  if (found === modelHash) return;
  throw new GatewayError('INVALID_MODEL_FILE', `the model file is ${found}, not ${modelHash}`);
}

export async function openLoop(
  config: EngineConfig,
  clock: EngineClock,
  emit: (message: FromEngine) => void,
): Promise<EngineLoop> {
  const { modelPath, modelHash, libraryDirectory, weights: mode, ...sizes } = config;
  await checkHash(config);
  const { decoder, description, setThreads } = await openDecoder({
    ...sizes,
    modelPath,
    modelHash,
    mode,
    ...(libraryDirectory === null ? {} : { libraryDirectory }),
  });
  try {
    using file = openGguf(modelPath);
    const vocabulary = readVocabulary(file.metadata);
    const bytesOf = tokenBytes(vocabulary);
    const pool = new KvPool(decoder.cells);
    const host = createHostTier({
      bytesMax: config.hostBytesMax ?? 0,
      read: createPackReader((generation) => blobPath(config.blobDirectory, generation)),
    });
    return new EngineLoop({
      base: {
        config: decoder.config,
        hash: modelHash,
        contextMax: contextMaxOf(decoder.config.contextLength, decoder.cells),
        endTokens: endTokensOf(vocabulary),
        backend: description,
      },
      stepper: decoder,
      residency: createResidency({
        stepper: decoder,
        baseHash: modelHash,
        open: (key) => host.open(key),
      }),
      cache: new PrefixCache({ pool, tenantShareMax: config.tenantShareMax }),
      limits: config.limits,
      speculation: config.speculation ?? 'auto',
      bytesOf: (token) => bytesOf(token) ?? noBytes,
      clock,
      rowMath: await openRowMath(config.backend),
      watch: watchThreads(config.threads, setThreads, clock),
      emit,
      hosted: () => host.changed(),
    });
  } catch (error) {
    decoder[Symbol.dispose]();
    throw error;
  }
}
