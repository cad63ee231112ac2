// `rankgate adapters extract`, `squeeze` by a text, and `compensate`: what they are asked for, and what they print.

import {
  adapterCommands,
  type Command,
  type Invocation,
  integerOf,
  json,
  numberOf,
  text,
  usageError,
  wanted,
} from './adapter-commands.ts';
import { rankMaxLimit } from './adapters/adapter.ts';
import type { ExtractTarget } from './adapters/extract.ts';
import { type Config, configFlags, loadConfig } from './config.ts';
import type { MadeAdapter, MakeOptions } from './make-adapter.ts';
import { fetchModel } from './serve.ts';

const making = {
  ...json,
  output: { type: 'string' },
  levels: { type: 'string' },
} as const;

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

function rankOf(invocation: Invocation): number | undefined {
  const rank = integerOf(invocation, 'rank', [0, rankMaxLimit]);
  if (rank === 0) throw usageError('--rank: want at least 1');
  return rank;
}

/** By `--rank` or by a share of what there is; null: neither is given. */
function targetOf<Share extends 'energy' | 'variance'>(
  invocation: Invocation,
  flag: Share,
): { readonly rank: number } | Readonly<Record<Share, number>> | null {
  const rank = rankOf(invocation);
  const share = numberOf(invocation.flags[flag], `--${flag}`);
  if (rank !== undefined && share !== undefined)
    throw usageError(`one of --rank and --${flag} is wanted`);
  if (rank !== undefined) return { rank };
  if (share === undefined) return null;
  if (share > 0 && share <= 1) return { [flag]: share } as Record<Share, number>;
  throw usageError(`--${flag}: want more than 0 and at most 1, got ${share}`);
}

function extractTargetOf(invocation: Invocation): ExtractTarget {
  const target = targetOf(invocation, 'energy');
  if (target === null) throw usageError('one of --rank and --energy is wanted');
  return target;
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

/** What is left of the flags when a command has taken its own. */
function configOf({ flags, terminal }: Invocation): Config {
  const settings = Object.entries(flags).filter(([name]) => Object.hasOwn(configFlags, name));
  return loadConfig({ flags: Object.fromEntries(settings), environment: terminal.environment });
}

/** With a text it is squeezed here, from a directory; else by the server, by name. */
const squeezeByName = adapterCommands['adapters squeeze']!;
const textFlags = {
  ...configFlags,
  ...making,
  rank: { type: 'string' },
  variance: { type: 'string' },
  calib: { type: 'string' },
  'accept-base-name': { type: 'string' },
} as const;

async function squeezeByText(invocation: Invocation): Promise<void> {
  const { flags, positionals, terminal } = invocation;
  const options = {
    ...makeOptions(invocation),
    directory: positionals[0]!,
    calibrationPath: wanted(invocation, 'calib'),
    acceptBaseName: text(flags['accept-base-name']) ?? null,
    target: targetOf(invocation, 'variance'),
  };
  const config = configOf(invocation);
  const { path: basePath, label: baseLabel } = await fetchModel(config, terminal);
  const { threads } = config;
  const { makeOrdered } = await import('./make-adapter.ts'); // loads the kernels
  show(await makeOrdered({ ...options, basePath, baseLabel, threads }), invocation, {}, '');
}

export const makeCommands: Readonly<Record<string, Command>> = {
  'adapters squeeze': {
    flags: { ...squeezeByName.flags, ...textFlags },
    positionals: squeezeByName.positionals,
    async run(invocation) {
      const isByText = invocation.flags.calib !== undefined;
      const own = isByText ? textFlags : squeezeByName.flags;
      const stranger = Object.keys(invocation.flags).find((name) => !Object.hasOwn(own, name));
      if (stranger !== undefined)
        throw usageError(`--${stranger} does not go ${isByText ? 'with' : 'without'} --calib`);
      await (isByText ? squeezeByText(invocation) : squeezeByName.run(invocation));
    },
  },
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
        target: extractTargetOf(invocation),
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
      const options = {
        ...makeOptions(invocation),
        referencePath: wanted(invocation, 'reference'),
        calibrationPath: wanted(invocation, 'calib'),
        rank: rankOf(invocation) ?? 32,
        seed: integerOf(invocation, 'seed', [0, 2 ** 32 - 1]) ?? 0,
      };
      const config = configOf(invocation);
      const { path: basePath } = await fetchModel(config, terminal);
      const { threads } = config;
      const { makeCompensation } = await import('./make-adapter.ts'); // loads the kernels
      show(await makeCompensation({ ...options, basePath, threads }), invocation, {}, '');
    },
  },
};
