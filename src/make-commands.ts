// `rankgate adapters extract` and `compensate`: what they are asked for, and what they print.

import {
  type Command,
  type Invocation,
  json,
  numberOf,
  text,
  usageError,
} from './adapter-commands.ts';
import { rankMaxLimit } from './adapters/adapter.ts';
import type { ExtractTarget } from './adapters/extract.ts';
import { configFlags, loadConfig } from './config.ts';
import type { MadeAdapter, MakeOptions } from './make-adapter.ts';
import { fetchModel } from './serve.ts';

const making = {
  ...json,
  output: { type: 'string' },
  levels: { type: 'string' },
} as const;

function wanted({ flags }: Invocation, flag: string): string {
  const value = text(flags[flag]);
  if (value === undefined) throw usageError(`--${flag} is wanted`);
  return value;
}

function countOf({ flags }: Invocation, flag: string, max: number): number | undefined {
  const count = numberOf(flags[flag], `--${flag}`);
  if (count === undefined || (Number.isInteger(count) && count >= 0 && count <= max)) return count;
  throw usageError(`--${flag}: want an integer up to ${max}, got ${count}`);
}

function rankOf(invocation: Invocation): number | undefined {
  const rank = countOf(invocation, 'rank', rankMaxLimit);
  if (rank === 0) throw usageError('--rank: want at least 1');
  return rank;
}

function makeOptions(invocation: Invocation): Omit<MakeOptions, 'basePath'> {
  const { flags, terminal } = invocation;
  const levels = text(flags.levels) ?? 'energy';
  if (levels !== 'energy' && levels !== 'uniform')
    throw usageError(`--levels: ${levels} is neither uniform nor energy`);
  let shown = -1;
  const onModule = (block: number, blocks: number): void => {
    if (block !== shown && !flags.json) terminal.err(`block ${block + 1} of ${blocks}\n`);
    shown = block;
  };
  return { output: wanted(invocation, 'output'), levels, onModule };
}

function targetOf(invocation: Invocation): ExtractTarget {
  const rank = rankOf(invocation);
  const energy = numberOf(invocation.flags.energy, '--energy');
  if ((rank === undefined) === (energy === undefined))
    throw usageError('one of --rank and --energy is wanted');
  if (rank !== undefined) return { rank };
  if (!(energy! > 0 && energy! <= 1))
    throw usageError(`--energy: want more than 0 and at most 1, got ${energy}`);
  return { energy: energy! };
}

/** `more` is of the JSON, `line` of the text. */
function show(
  made: MadeAdapter,
  { flags, terminal }: Invocation,
  more: object,
  line: string,
): void {
  const { directory, bytes, manifest, warnings } = made;
  const { kind, rankMax, rankCurve, modules } = manifest;
  const result = {
    directory,
    bytes,
    kind,
    modules: modules.length,
    rank_max: rankMax,
    rank_curve: rankCurve,
  };
  if (flags.json) {
    terminal.out(`${JSON.stringify({ ...result, ...more, warnings })}\n`);
    return;
  }
  const size = `${(bytes / 1e6).toFixed(1)} MB`;
  terminal.out(
    `${directory}: ${kind}, ${modules.length} modules, rank ${rankMax}, ${size}\n${line}`,
  );
  for (const warning of warnings) terminal.err(`warning: ${warning}\n`);
}

/** The lowest level that holds this share of what the fine-tune changed, null when none does. */
function rankFor(share: number, { manifest }: MadeAdapter, whole: number): number | null {
  const level = manifest.rankCurve.findIndex((kept) => kept * whole >= share);
  return level < 0 ? null : level + 1;
}

export const makeCommands: Readonly<Record<string, Command>> = {
  'adapters extract': {
    flags: {
      ...making,
      from: { type: 'string' },
      base: { type: 'string' },
      rank: { type: 'string' },
      energy: { type: 'string' },
    },
    positionals: [],
    async run(invocation) {
      const [fromPath, basePath] = [wanted(invocation, 'from'), wanted(invocation, 'base')];
      const options = {
        ...makeOptions(invocation),
        fromPath,
        basePath,
        target: targetOf(invocation),
      };
      const { makeExtraction } = await import('./make-adapter.ts'); // loads the kernels
      const made = await makeExtraction(options);
      const ranks = [0.5, 0.9, 0.99].map((share) => ({
        share,
        rank: rankFor(share, made, made.share),
      }));
      const found = ranks.map(
        ({ share, rank }) =>
          `${share * 100} % ${rank === null ? 'is not in it' : `at rank ${rank}`}`,
      );
      const line = `it holds ${(made.share * 100).toFixed(1)} % of what was changed: ${found.join(', ')}\n`;
      show(made, invocation, { share: made.share, ranks }, line);
    },
  },
  'adapters compensate': {
    flags: {
      ...configFlags,
      ...making,
      reference: { type: 'string' },
      calib: { type: 'string' },
      method: { type: 'string' },
      rank: { type: 'string' },
      seed: { type: 'string' },
    },
    positionals: [],
    async run(invocation) {
      const { flags, terminal } = invocation;
      const method = text(flags.method) ?? 'eora';
      if (method !== 'eora') throw usageError(`--method: eora is there, ${method} is not`);
      const own = ['output', 'levels', 'reference', 'calib', 'method', 'rank', 'seed'];
      const settings = Object.fromEntries(
        Object.entries(flags).filter(([name]) => !own.includes(name)),
      );
      const options = {
        ...makeOptions(invocation),
        referencePath: wanted(invocation, 'reference'),
        calibrationPath: wanted(invocation, 'calib'),
        rank: rankOf(invocation) ?? 32,
        seed: countOf(invocation, 'seed', 2 ** 32 - 1) ?? 0,
      };
      const config = loadConfig({ flags: settings, environment: terminal.environment });
      const { path: basePath } = await fetchModel(config, terminal);
      const { threads } = config;
      const { makeCompensation } = await import('./make-adapter.ts'); // loads the kernels
      show(await makeCompensation({ ...options, basePath, threads }), invocation, {}, '');
    },
  },
};
