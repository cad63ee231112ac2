// Everything that crosses between the gateway and a trainer process: plain data. One process lives for one claim of one
// job; what it writes on disk lies in a folder of that claim alone, and counts only once the job store has taken the
// message that names it (fencing: a trainer that lost its lease can overwrite nothing that another one reads).

import type { ErrorCode } from '../errors.ts';
import type { Recipe } from './recipe.ts';
import type { Comparison } from './refresh-gate.ts';

/** The trainer's only argument, as JSON. */
export interface TrainerSpec {
  readonly modelPath: string;
  /** SHA-256 of the model file, hex. */
  readonly modelHash: string;
  readonly jobId: string;
  /** The number of the claim: grows with each. */
  readonly fence: number;
  readonly recipe: Recipe;
  readonly trainingPath: string;
  readonly heldOutPath: string | null;
  /** Packed file of the generation that training goes on from; null: from the recipe's initialisation. What it
   *  needs lies beside it. */
  readonly startFrom: string | null;
  /** A refresh: its result is compared with `startFrom`, and that with the generation before it, if `earlier` names its packed
   *  file. null: none. */
  readonly compare: { readonly earlier: string | null } | null;
  /** Checkpoint of an earlier claim that this one goes on from. */
  readonly resumeFrom: string | null;
  /** This claim's own, empty: checkpoints and the result go here. */
  readonly folder: string;
  /** What computes. Another one than an earlier claim's goes on from its checkpoint, with other last bits. */
  readonly backend: 'ggml' | 'tfjs';
  readonly threads: number;
  readonly cacheDirectory: string;
}

/** There is no message to cancel: a trainer whose job is over is killed, also in the middle of a step. */
export type ToTrainer =
  /** Write a checkpoint and end: the gateway is closing. */
  | { readonly kind: 'stop' }
  /** Of the time it may compute, 0…1. */
  | { readonly kind: 'pace'; readonly share: number };

export interface RankLoss {
  readonly rank: number;
  readonly loss: number;
}

export interface TrainingResult {
  /** A packed adapter as `adapters add` takes it. */
  readonly directory: string;
  /** Held-out loss by rank, as served; empty without held-out examples. */
  readonly losses: readonly RankLoss[];
  readonly baseLoss: number | null;
  readonly aurac: number | null;
  readonly comparison: Comparison | null;
}

/** Of failures that are the machine's, not the job's: another attempt may fare better. */
export const passingCodes: readonly ErrorCode[] = [
  'DISK_FULL',
  'CONTENDED',
  'NO_CAPACITY',
  'INTERNAL',
];

export type FromTrainer =
  /** Between two others: its event loop turns. */
  | { readonly kind: 'alive' }
  | {
      readonly kind: 'started';
      readonly steps: number;
      /** Bytes by what they are for. */
      readonly memory: Readonly<Record<string, number>>;
      /** Directions that older data use and that stay as they are; null: the recipe keeps none. */
      readonly kept: number | null;
      /** What computes, as kernels describe themselves. */
      readonly kernels: string;
    }
  | {
      readonly kind: 'progress';
      readonly step: number;
      readonly steps: number;
      readonly loss: number;
      readonly learningRate: number;
      /** Tokens of this step, and what it took. */
      readonly tokens: number;
      readonly ms: number;
    }
  | { readonly kind: 'evaluation'; readonly step: number; readonly losses: readonly RankLoss[] }
  | { readonly kind: 'checkpoint'; readonly step: number; readonly path: string }
  | ({ readonly kind: 'result' } & TrainingResult)
  /** After `stop`: what was computed is in the last checkpoint. */
  | { readonly kind: 'stopped' }
  | {
      readonly kind: 'failed';
      readonly code: ErrorCode;
      readonly message: string;
      /** Whether another attempt may fare better. */
      readonly retry: boolean;
    };
