// What `rankgate adapters compare` computes: two adapters and the base on the same examples, at every rank. Losses as the gate of
// a refresh reads them, and scores of greedy answers where a reward is asked for. Computed here, not by a server.

import type { Aurac } from './adapters/aurac.ts';
import { baseNamesOf } from './adapters/base-name.ts';
import { createRandom } from './adapters/families/seeded-random.ts';
import { pairKinds } from './adapters/manifest.ts';
import { generationOf, openPacked, type PackedAdapter } from './adapters/pack.ts';
import { packPeft } from './adapters/pack-peft.ts';
import { importPacked } from './adapters/packed-import.ts';
import type { AdapterBase } from './adapters/peft.ts';
import { readPeftDirectory } from './adapters/peft-directory.ts';
import { GatewayError } from './errors.ts';
import type { TrainerSpec } from './jobs/messages.ts';
import { gainOf, mean, playExamples } from './jobs/refresh-gate.ts';
import type { RewardRecipe } from './jobs/reward-recipe.ts';
import { type GgufFile, openGguf } from './model/gguf.ts';
import type { ModelFile } from './model/model-source.ts';
import { LossesAlone } from './trainer/compare.ts';
import { gainAurac } from './trainer/evaluation.ts';
import { createExampleEncoder, type Example } from './trainer/examples.ts';
import { shuffle } from './trainer/packing.ts';
import type { TrainingBase } from './trainer/session.ts';
import { scoringOf, TaskScores } from './trainer/task-scores.ts';
import { taskOf } from './trainer/tasks.ts';
import { openBase, readExampleFile } from './trainer/train-file.ts';

/** A directory as `adapters add` takes it, or what the server has stored. */
export type AdapterSource = { readonly directory: string } | { readonly packed: PackedAdapter };

export interface CompareOptions extends Pick<TrainerSpec, 'backend' | 'threads'> {
  readonly model: ModelFile;
  readonly adapters: readonly [AdapterSource, AdapterSource];
  readonly dataPath: string;
  /** Rising; null: 1, 2, 4, … and all of each. */
  readonly ranks: readonly number[] | null;
  /** Drawn by the seed where there are more. */
  readonly examplesMax: number;
  readonly seed: number;
  readonly windowTokens: number;
  readonly scoring: { readonly reward: RewardRecipe; readonly answerTokens: number } | null;
  /** Before each part. */
  readonly onPart: (part: string) => void;
}

type Pair<T> = readonly [a: T, b: T];

export interface Compared {
  readonly examples: number;
  /** Means over the examples: nats a token, and scores from 0 to 1. */
  readonly base: { readonly loss: number; readonly score: number | null };
  readonly adapters: Pair<{
    readonly generation: string;
    readonly kind: string;
    readonly rankMax: number;
    /** Of the nats gained over the base. */
    readonly aurac: Aurac;
  }>;
  readonly ranks: readonly {
    readonly rank: number;
    readonly losses: Pair<number>;
    readonly scores: Pair<number> | null;
    /** Examples with the smaller loss. */
    readonly won: Pair<number>;
  }[];
  /** Nats that b's AURAC gains over a's; the standard error is v1's. */
  readonly gain: Aurac & { readonly error: number };
  /** At the largest rank: the base, a and b. */
  readonly tournament: {
    readonly games: number;
    readonly isResolved: boolean;
    readonly masses: readonly number[];
  };
  /** Whose AURAC is larger by more than two standard errors, of 16 examples or more. */
  readonly winner: 'a' | 'b' | null;
}

/** Of one pair of the tournament. */
const delta = 0.05;
const errorsMin = 2;
/** As many as a refresh wants: of fewer the spread is unknown. */
const examplesMin = 16;

/** Throws what is wrong with an adapter, the file or a rank. */
export async function compareOn(options: CompareOptions): Promise<Compared> {
  const { model, backend, threads, dataPath, windowTokens } = options;
  using file = openGguf(model.path);
  const encode = createExampleEncoder(file.metadata, windowTokens);
  const all = await readExampleFile(dataPath, encode, { name: dataPath, isLenient: false });
  const heldOut = drawn(all, options);
  if (heldOut.length === 0) throw new GatewayError('INVALID_FILE', `${dataPath} has no example`);
  const base = await openBase({ backend, threads, modelHash: model.sha256 }, file);
  using _ = base.kernels;
  const names = baseNamesOf(model.label, file.metadata);
  const into: AdapterBase = { config: base.config, hash: base.hash, names };
  const adapters = [
    await opened(options.adapters[0], into),
    await opened(options.adapters[1], into),
  ] as const;
  const ranks = options.ranks ?? ranksOf(adapters);
  const losses = await lossesOf(base, { heldOut, adapters, ranks }, options);
  const scores = await scoresOf(base, file, { heldOut, adapters, ranks }, options);
  return reportOf({ adapters, ranks, losses, scores });
}

function drawn(
  all: readonly Example[],
  { examplesMax, seed }: Pick<CompareOptions, 'examplesMax' | 'seed'>,
): Example[] {
  const order = all.map((_, i) => i);
  shuffle(order, createRandom(BigInt(seed)));
  return order.slice(0, examplesMax).map((i) => all[i]!);
}

async function opened(source: AdapterSource, base: AdapterBase): Promise<PackedAdapter> {
  const packed = 'packed' in source ? source.packed : await readDirectory(source.directory, base);
  const { kind, baseHash } = packed.manifest;
  if (baseHash !== base.hash) {
    throw new GatewayError('BASE_MISMATCH', `adapter ${packed.generation} is of another base`);
  }
  if (pairKinds.includes(kind)) return packed;
  const message = `a ${kind} adapter is more than low-rank pairs: it cannot be compared here`;
  throw new GatewayError('UNSUPPORTED', message);
}

async function readDirectory(directory: string, base: AdapterBase): Promise<PackedAdapter> {
  const { format, ...input } = await readPeftDirectory(directory);
  const { bytes } =
    format === 'peft'
      ? packPeft({ ...input, base, acceptBaseName: null }, 'energy')
      : importPacked(input.config, input.weights, base);
  return openPacked(bytes, generationOf(bytes));
}

/** Above an adapter's own ranks nothing is added. */
function ranksOf(adapters: readonly PackedAdapter[]): number[] {
  const own = adapters.map(({ manifest }) => manifest.rankMax);
  const ranks = new Set(own);
  for (let rank = 1; rank < Math.max(...own); rank *= 2) ranks.add(rank);
  return [...ranks].sort((x, y) => x - y);
}

interface Task {
  readonly heldOut: readonly Example[];
  readonly adapters: Pair<PackedAdapter>;
  readonly ranks: readonly number[];
}

/** Of each example. */
interface Measured {
  readonly base: readonly number[];
  readonly byRank: Pair<readonly (readonly number[])[]>;
}

async function lossesOf(
  base: TrainingBase,
  { heldOut, adapters, ranks }: Task,
  { onPart }: CompareOptions,
): Promise<Measured> {
  const options = { base, heldOut, guard: [], breathe: async () => {} };
  using alone = new LossesAlone(options, Math.max(...ranks));
  return eachRank({ adapters, ranks }, (packed, rank, of) => {
    onPart(`losses of ${of}`);
    return packed === null ? alone.ofBase() : alone.heldOutAt(packed, rank);
  });
}

async function scoresOf(
  base: TrainingBase,
  file: GgufFile,
  { heldOut, adapters, ranks }: Task,
  { scoring, onPart }: CompareOptions,
): Promise<Measured | null> {
  if (scoring === null) return null;
  const how = scoringOf(file.metadata, scoring);
  const tasks = heldOut.map((example) => taskOf(example, how.text));
  const scores = new TaskScores(base, tasks, how, Math.max(...ranks));
  return eachRank({ adapters, ranks }, (packed, rank, of) => {
    onPart(`scores of ${of}`);
    return scores.of(packed, rank, async () => {});
  });
}

async function eachRank(
  { adapters, ranks }: Omit<Task, 'heldOut'>,
  measure: (packed: PackedAdapter | null, rank: number, of: string) => Promise<readonly number[]>,
): Promise<Measured> {
  const base = await measure(null, 0, 'the base');
  const [a, b]: (readonly number[])[][] = [[], []];
  for (const rank of ranks) {
    a!.push(await measure(adapters[0], rank, `A at rank ${rank}`));
    b!.push(await measure(adapters[1], rank, `B at rank ${rank}`));
  }
  return { base, byRank: [a!, b!] };
}

function reportOf({
  adapters,
  ranks,
  losses,
  scores,
}: Omit<Task, 'heldOut'> & {
  readonly losses: Measured;
  readonly scores: Measured | null;
}): Compared {
  const [a, b] = losses.byRank;
  const gain = gainOf(ranks, a, b);
  const players = [losses.base, a.at(-1)!, b.at(-1)!];
  const { played: games, isResolved, masses } = playExamples(players, delta);
  const isKnown = losses.base.length >= examplesMin && Math.abs(gain.v1) > errorsMin * gain.error;
  const baseLoss = mean(losses.base);
  const described = ({ generation, manifest }: PackedAdapter, byRank: Measured['base'][]) => {
    const curve = ranks.map((rank, i) => ({ rank, loss: mean(byRank[i]!) }));
    const { kind, rankMax } = manifest;
    return { generation, kind, rankMax, aurac: gainAurac(baseLoss, curve) };
  };
  return {
    examples: losses.base.length,
    base: { loss: baseLoss, score: scores === null ? null : mean(scores.base) },
    adapters: [described(adapters[0], [...a]), described(adapters[1], [...b])],
    ranks: ranks.map((rank, i) => ({
      rank,
      losses: [mean(a[i]!), mean(b[i]!)],
      scores: scores === null ? null : [mean(scores.byRank[0][i]!), mean(scores.byRank[1][i]!)],
      won: [smaller(a[i]!, b[i]!), smaller(b[i]!, a[i]!)],
    })),
    gain,
    tournament: { games, isResolved, masses },
    winner: isKnown ? (gain.v1 > 0 ? 'b' : 'a') : null,
  };
}

function smaller(of: readonly number[], than: readonly number[]): number {
  return of.filter((value, i) => value < than[i]!).length;
}
