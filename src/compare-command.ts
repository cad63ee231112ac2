// `rankgate adapters compare A B`: what they are asked for, and the table that says who is better at each rank. An adapter is a
// directory, a generation that the data directory holds, or a name, whose generation the running server is asked for.

import { stat } from 'node:fs/promises';
import { join } from 'node:path';
import {
  type Command,
  clientOf,
  type Invocation,
  integerOf,
  json,
  text,
  usageError,
  wanted,
} from './adapter-commands.ts';
import { isGeneration, rankMaxLimit } from './adapters/adapter.ts';
import { blobPath } from './adapters/blobs.ts';
import { readPacked } from './adapters/pack.ts';
import type { AdapterSource, Compared } from './compare-adapters.ts';
import { type Config, configFlags, loadConfig } from './config.ts';
import { type RewardRecipe, rewardSchema } from './jobs/reward-recipe.ts';
import { fetchModel } from './serve.ts';

const own = {
  data: { type: 'string' },
  ranks: { type: 'string' },
  examples: { type: 'string' },
  window: { type: 'string' },
  reward: { type: 'string' },
  'answer-tokens': { type: 'string' },
  seed: { type: 'string' },
  url: { type: 'string' },
} as const;

export const compareCommand: Command = {
  flags: { ...configFlags, ...json, ...own },
  positionals: ['A', 'B'],
  async run(invocation) {
    const { flags, positionals, terminal } = invocation;
    const reward = rewardOf(invocation);
    const asked = {
      dataPath: wanted(invocation, 'data'),
      ranks: ranksOf(invocation),
      examplesMax: integerOf(invocation, 'examples', [1, 100_000]) ?? 256,
      windowTokens: integerOf(invocation, 'window', [8, 8192]) ?? 256,
      seed: integerOf(invocation, 'seed', [0, 2 ** 32 - 1]) ?? 0,
      scoring:
        reward === null
          ? null
          : { reward, answerTokens: integerOf(invocation, 'answer-tokens', [1, 1024]) ?? 32 },
    };
    const config = loadConfig({ flags, environment: terminal.environment });
    const adapters = [
      await sourceOf(positionals[0]!, config, invocation),
      await sourceOf(positionals[1]!, config, invocation),
    ] as const;
    const model = await fetchModel(config, terminal);
    const { backend, threads } = config;
    const onPart = (part: string): void => {
      if (!flags.json) terminal.err(`${part}\n`);
    };
    const { compareOn } = await import('./compare-adapters.ts'); // loads the kernels
    const compared = await compareOn({ ...asked, adapters, model, backend, threads, onPart });
    terminal.out(flags.json ? `${JSON.stringify(jsonOf(compared))}\n` : tableOf(compared));
  },
};

async function sourceOf(
  name: string,
  { dataDir }: Config,
  invocation: Invocation,
): Promise<AdapterSource> {
  if ((await stat(name).catch(() => null))?.isDirectory() === true) return { directory: name };
  const given = name.slice(name.indexOf('@') + 1);
  const generation = isGeneration(given) ? given : await presentOf(name, invocation);
  return { packed: await readPacked(blobPath(join(dataDir, 'blobs'), generation), generation) };
}

async function presentOf(name: string, invocation: Invocation): Promise<`sha256:${string}`> {
  const path = `/v1/adapters/${encodeURIComponent(name)}`;
  const answer = await clientOf(invocation)({ method: 'GET', path });
  return ((await answer.json()) as { generation: `sha256:${string}` }).generation;
}

function ranksOf({ flags }: Invocation): number[] | null {
  const given = text(flags.ranks);
  if (given === undefined) return null;
  const ranks = given.split(',').map(Number);
  const rise = (rank: number, i: number): boolean =>
    Number.isInteger(rank) && rank > (ranks[i - 1] ?? 0) && rank <= rankMaxLimit;
  if (ranks.every(rise)) return ranks;
  throw usageError(`--ranks: want rising ranks from 1 to ${rankMaxLimit}, got ${given}`);
}

/** A kind, or a reward as a recipe has it. */
function rewardOf({ flags }: Invocation): RewardRecipe | null {
  const given = text(flags.reward);
  if (given === undefined) return null;
  let value: unknown = { kind: given };
  if (given.startsWith('{')) {
    try {
      value = JSON.parse(given);
    } catch {
      throw usageError('--reward: no JSON');
    }
  }
  const { success, data, error } = rewardSchema.safeParse(value);
  if (success) return data;
  const [{ path, message }] = error.issues as [(typeof error.issues)[0]];
  throw usageError(`--reward: ${path.join('.')}: ${message}`);
}

function jsonOf({ adapters, tournament, ranks, ...compared }: Compared): object {
  const { isResolved: resolved, ...played } = tournament;
  const [a, b] = adapters.map(({ rankMax: rank_max, ...adapter }) => ({ ...adapter, rank_max }));
  return { ...compared, a, b, ranks, tournament: { ...played, resolved } };
}

function tableOf({ examples, base, adapters, ranks, ...compared }: Compared): string {
  const { gain, tournament, winner } = compared;
  const hasScores = base.score !== null;
  const head = ['rank', 'loss of A', 'of B', 'won by A', 'by B'];
  const rows = ranks.map(({ rank, losses, scores, won }) => [
    ...[`${rank}`, ...losses.map((loss) => loss.toFixed(4)), ...won.map(String)],
    ...(scores ?? []).map((score) => score.toFixed(3)),
  ]);
  const none = ['base', base.loss.toFixed(4), base.loss.toFixed(4), '', ''];
  const all = hasScores
    ? [
        [...head, 'score of A', 'of B'],
        [...none, ...[base.score, base.score].map((s) => s!.toFixed(3))],
        ...rows,
      ]
    : [head, none, ...rows];
  const areas = adapters.map(
    ({ kind, rankMax, aurac: { v1, v2 } }, i) =>
      `${'AB'[i]}: ${kind}, rank ${rankMax}, AURAC ${v1.toFixed(4)} (v1), ${v2.toFixed(4)} (v2)\n`,
  );
  const masses = tournament.masses.map((mass) => mass.toFixed(3)).join(', ');
  const end = winner === null ? 'no difference is proven' : `${winner.toUpperCase()} is better`;
  return [
    `${examples} examples; losses in nats a token\n`,
    ...all.map((row) => `${row.map((cell) => cell.padStart(12)).join('')}\n`),
    ...areas,
    `tournament at the largest rank: ${tournament.games} games, ${tournament.isResolved ? 'every' : 'not every'} winner known; `,
    `alpha-Rank of base, A, B: ${masses}\n`,
    `B gains ${gain.v1.toFixed(4)} nats of AURAC over A, standard error ${gain.error.toFixed(4)}: ${end}\n`,
  ].join('');
}
