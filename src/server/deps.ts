// What the HTTP surface needs from the composition root. Time, timers and randomness come from here, so that tests own
// them; nothing in this folder reads the environment, a global clock or Math.random.

import type { Importer, Registry } from '../adapters/registry.ts';
import type { Settings } from '../config-schema.ts';
import type { EngineClock } from '../engine/clock.ts';
import type { Engine } from '../engine/engine.ts';
import type { TextService } from '../engine/text.ts';
import type { JobStore } from '../jobs/job-store.ts';
import type { Refresher } from '../jobs/refresher.ts';
import type { TrainingFiles } from '../jobs/training-files.ts';
import type { Router } from '../router/router.ts';
import type { ArchiveDeps } from './archive.ts';
import type { ApiKey } from './auth.ts';
import type { InFlight } from './in-flight.ts';

export interface Clock extends EngineClock {
  /** Wall clock, Unix milliseconds. */
  unixMs(): number;
}

export interface Random {
  /** Unguessable, unique, [A-Za-z0-9-]. */
  id(): string;
  /** uint32, for requests that bring no seed. */
  seed(): number;
}

/** Set by whoever drains the process; read by every request. */
export interface Lifecycle {
  readonly isDraining: boolean;
  /** Aborts when the grace is over: every answer that still runs is cancelled. */
  readonly cutOff: AbortSignal;
}

/** Settings as configured, and what only a running gateway knows. */
export interface ServerConfig
  extends Pick<
    Settings,
    | (
        | 'tiers'
        | 'latencyDefaults'
        | 'metricsPublic'
        | 'hostsAllowed'
        | 'runtimeLoraUpdating'
        | 'systemAdapter'
        | 'bodyBytesMax'
        | 'uploadBytesMax'
        | 'uploadMsMax'
        | 'uploadsMax'
        | 'fileBytesMax'
        | 'queueRequestsMax'
        | 'hubUrl'
        | 'hubToken'
      )
    | ('chatTokensDefault' | 'completionTokensDefault' | 'pingMs' | 'stallMsMax' | 'tokenAgeMsMax')
  > {
  /** The base model's name at the API. */
  readonly modelName: string;
  /** Unix seconds at which the process started: `created` of the base model's card. */
  readonly startedS: number;
  /** Empty: nothing is asked of inference, and admin routes answer this machine only. */
  readonly apiKeys: readonly ApiKey[];
  /** Directory that adapters may be loaded from. */
  readonly adaptersRoot: string;
  /** Where uploads lie while they are received and imported; empty at the start. */
  readonly uploadRoot: string;
}

export interface Training {
  readonly jobs: JobStore;
  readonly files: TrainingFiles;
  /** Told when a job was created or cancelled. */
  readonly trainers: { wake(): void };
  readonly refresher: Refresher;
}

export interface ServerDeps {
  readonly engine: Engine;
  readonly text: TextService;
  readonly registry: Registry;
  readonly importer: Importer;
  readonly router: Pick<Router, 'route' | 'settle' | 'judge' | 'retryAfterS' | 'tokensLikely'>;
  readonly inFlight: InFlight;
  readonly archive: ArchiveDeps;
  /** null: nothing is trained here. */
  readonly training: Training | null;
  readonly config: ServerConfig;
  readonly clock: Clock;
  readonly random: Random;
  readonly lifecycle: Lifecycle;
  /** The Prometheus page, with the names that its reader may see. */
  readonly metrics: (sees: (name: string) => boolean) => string;
  /** One JSON line without its newline. */
  readonly log: (line: string) => void;
}
