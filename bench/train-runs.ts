// Training runs of `bench train`: each is a trainer process as the gateway starts one (src/trainer/trainer-process.ts), as many
// at once as there are threads, one thread each. With one thread a run's numbers are a function of its recipe and its files.

import { mkdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { childEnvironment } from '../src/config.ts';
import { systemClock } from '../src/engine/clock.ts';
import type { FromTrainer, TrainerSpec, TrainingResult } from '../src/jobs/messages.ts';
import type { Recipe } from '../src/jobs/recipe.ts';
import { TrainerChild } from '../src/jobs/trainer-child.ts';
import { entryExecArgv, entryUrl } from '../src/model/spawn-entry.ts';

export interface RunPlace {
  readonly modelPath: string;
  readonly modelHash: string;
  /** Runs write into folders of their own in it, which are gone once they have ended. */
  readonly folder: string;
}

export interface RunRequest {
  /** Unlike all others'. */
  readonly name: string;
  readonly recipe: Recipe;
  readonly trainingPath: string;
  readonly heldOutPath: string | null;
}

export type StepTold = Extract<FromTrainer, { kind: 'progress' }>;

export interface RunResult {
  /** null: training diverged. */
  readonly result: TrainingResult | null;
  readonly steps: readonly StepTold[];
}

let fences = 0;

/** Throws when the trainer fails for another reason than numbers that are not finite. */
export async function runTrainer(
  { modelPath, modelHash, folder }: RunPlace,
  { name, recipe, trainingPath, heldOutPath }: RunRequest,
  threads: number,
): Promise<RunResult> {
  fences += 1;
  const own = join(folder, `run-${fences}`);
  mkdirSync(own);
  const spec: TrainerSpec = {
    ...{ modelPath, modelHash, jobId: name, fence: fences, recipe, trainingPath, heldOutPath },
    ...{ startFrom: null, compare: null, resumeFrom: null },
    ...{ folder: own, backend: 'ggml', threads, cacheDirectory: folder },
  };
  const steps: StepTold[] = [];
  let outcome: FromTrainer | null = null;
  const why = await new Promise<string>((resolve) => {
    const options = {
      entry: entryUrl(import.meta.url, '../src/trainer/trainer-process'),
      execArgv: entryExecArgv(import.meta.url),
      environment: childEnvironment(),
      nice: 0,
      after: systemClock.after,
    };
    new TrainerChild(options, spec, {
      onMessage(message) {
        if (message.kind === 'progress') steps.push(message);
        if (message.kind === 'result' || message.kind === 'failed') outcome = message;
      },
      onEnd: resolve,
    });
  });
  rmSync(own, { recursive: true, force: true });
  return { result: resultOf(name, outcome, why), steps };
}

function resultOf(name: string, outcome: FromTrainer | null, why: string): TrainingResult | null {
  if (outcome?.kind === 'result') return outcome;
  if (outcome?.kind !== 'failed') throw new Error(`${name}: the trainer ended (${why})`);
  // The second is for factors that no packed file holds.
  if (/^training diverged/.test(outcome.message) || outcome.code === 'INVALID_ADAPTER') return null;
  throw new Error(`${name}: ${outcome.message} (${outcome.code})`);
}

export interface RunAll {
  readonly atOnce: number;
  readonly tell: (text: string) => void;
}

/** Passes through the model that a step takes. */
export function passesPerStep({ objective, ranks }: Recipe): number {
  if (objective === 'multi') return ranks.length;
  return objective === 'sandwich' ? 2 : 1;
}

/** The longest first: then processes end at about the same time. */
function byCost(requests: readonly RunRequest[]): RunRequest[] {
  return requests.toSorted((a, b) => passesPerStep(b.recipe) - passesPerStep(a.recipe));
}

/** By name, in the order of the requests. After a failure no other run begins. */
export async function runAll(
  place: RunPlace,
  requests: readonly RunRequest[],
  { atOnce, tell }: RunAll,
): Promise<Map<string, RunResult>> {
  const results = new Map<string, RunResult>();
  const queue = byCost(requests).values();
  const work = async (): Promise<void> => {
    for (const request of queue) {
      const startMs = performance.now();
      const run = await runTrainer(place, request, 1).catch((error: unknown) => {
        while (queue.next().done !== true);
        throw error;
      });
      results.set(request.name, run);
      const seconds = Math.round((performance.now() - startMs) / 1000);
      const losses = run.result?.losses.map(({ loss }) => loss.toFixed(3)) ?? ['diverged'];
      tell(`${results.size}/${requests.length} ${request.name}, ${seconds} s: ${losses.join(' ')}`);
    }
  };
  const ends = await Promise.allSettled(Array.from({ length: atOnce }, work));
  for (const end of ends) if (end.status === 'rejected') throw end.reason;
  return new Map(requests.map(({ name }) => [name, results.get(name)!]));
}
