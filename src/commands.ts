// The commands of `rankgate`, each a few lines. Output goes through `Terminal`, so that tests read it; results go to
// stdout (one JSON value with --json), everything else to stderr. Exit codes: 0 done, 1 failed or refused, 2 wrong usage,
// 3 no server answers.

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import {
  adapterCommands,
  type Command,
  type Flags,
  type Invocation,
  json,
  usageError,
} from './adapter-commands.ts';
import { compareCommand } from './compare-command.ts';
import { type Config, configFlags, loadConfig } from './config.ts';
import { examine, measureWeights } from './doctor.ts';
import { GatewayError } from './errors.ts';
import { CommandError } from './gateway-client.ts';
import { makeCommands } from './make-commands.ts';
import { findBaseModel } from './model/model-source.ts';
import { placementCommand } from './placement-command.ts';
import { fetchModel, serve } from './serve.ts';
import type { Terminal } from './terminal.ts';
import { trainCommands } from './train-commands.ts';

export const usage = `rankgate serve [--config file] [--model …] [--port 8080] [--threads n] [--weights faithful|fast|parity] …
rankgate adapters add NAME DIRECTORY|hf:OWNER/NAME[@REVISION] [--accept-base-name NAME] [--levels uniform]
                      [--replace [--expect GENERATION]] [--on-server]
rankgate adapters list
rankgate adapters show NAME
rankgate adapters swap NAME GENERATION [--expect GENERATION]
rankgate adapters rollback NAME
rankgate adapters alias ALIAS NAME
rankgate adapters pin NAME
rankgate adapters unpin NAME
rankgate adapters squeeze NAME --rank K | --variance V [--expect GENERATION]
rankgate adapters squeeze DIRECTORY --calib FILE.txt --output DIRECTORY [--rank K | --variance V] [--levels uniform]
                      [--accept-base-name NAME] [--model …] [--config file] …
rankgate adapters export NAME [--rank K] [--output FILE]
rankgate adapters rm NAME [--expect GENERATION]
rankgate adapters extract --from FILE.gguf --base FILE.gguf --rank K | --energy E --output DIRECTORY [--levels uniform]
rankgate adapters compensate --reference FILE.gguf --calib FILE.txt --output DIRECTORY [--method eora] [--rank 32]
                      [--seed N] [--levels uniform] [--model …] [--config file] …
rankgate adapters compare A B --data FILE.jsonl [--ranks 1,2,…] [--examples 256] [--seed N] [--window 256]
                      [--reward KIND|JSON [--answer-tokens 32]] [--model …] [--config file] …
rankgate placement FILE.json [--seed N] [--iterations N]
rankgate train FILE.jsonl [--validation FILE.jsonl] [--model NAME] [--suffix NAME] [--kind K] [--rank K] [--objective O]
                      [--epochs N] [--batch-size WINDOWS] [--learning-rate X] [--seed N] [--recipe FILE.json]
rankgate jobs list [--after ID]
rankgate jobs show ID
rankgate jobs cancel ID
rankgate doctor [--measure] [--config file] …
rankgate --version
A name is shared, or TENANT/NAME. add sends the directory's files; with --on-server it names one inside the server's root.
extract, compensate, compare and squeeze with a text compute here, for minutes; add takes the directory that they make. compare
takes such directories, generations in the data directory, and names. The other adapters commands, train and jobs talk to a
running server: --url, or RANKGATE_URL; RANKGATE_API_KEY. ^C ends the following of a job, not the job.
Every command takes --json.
`;

const loadFrom = ({ flags, terminal }: Invocation): Config =>
  loadConfig({ flags, environment: terminal.environment });

const commands: Readonly<Record<string, Command>> = {
  serve: {
    flags: { ...json, ...configFlags },
    positionals: [],
    async run(invocation) {
      const { flags, terminal } = invocation;
      await serve(loadFrom(invocation), { json: flags.json === true, terminal });
    },
  },
  doctor: {
    flags: { ...json, ...configFlags, measure: { type: 'boolean' } },
    positionals: [],
    async run(invocation) {
      const config = loadFrom(invocation);
      // Without --measure nothing is fetched: doctor also answers where there is no network.
      const isWanted = invocation.flags.measure === true;
      const model = isWanted
        ? await fetchModel(config, invocation.terminal)
        : await findBaseModel(config.model, join(config.dataDir, 'models'));
      if (isWanted) await measureWeights(config, model!);
      const findings = await examine(config, model);
      const lines = Object.entries(findings).map(([what, found]) => `${what}: ${found}\n`);
      const { flags, terminal } = invocation;
      terminal.out(flags.json ? `${JSON.stringify(findings)}\n` : lines.join(''));
    },
  },
  placement: placementCommand,
  ...adapterCommands,
  ...makeCommands,
  'adapters compare': compareCommand,
  ...trainCommands,
};

/** package.json lies one folder above this file, in the source tree and in the built one. */
function version(): string {
  const file = readFileSync(new URL('../package.json', import.meta.url), 'utf8');
  return (JSON.parse(file) as { version: string }).version;
}

function parse(command: Command, args: string[]): { flags: Flags; positionals: string[] } {
  try {
    const parsed = parseArgs({ args, options: command.flags, allowPositionals: true });
    return { flags: parsed.values as Flags, positionals: parsed.positionals };
  } catch (error) {
    throw usageError((error as Error).message);
  }
}

async function dispatch(args: readonly string[], terminal: Terminal): Promise<void> {
  const words = args[0] === 'adapters' || args[0] === 'jobs' ? 2 : 1;
  const name = args.slice(0, words).join(' ');
  const command = Object.hasOwn(commands, name) ? commands[name] : undefined;
  if (command === undefined) throw usageError(name === '' ? 'no command' : `no command ${name}`);
  const { flags, positionals } = parse(command, args.slice(words));
  if (positionals.length !== command.positionals.length) {
    const wanted = command.positionals.join(' ') || 'no arguments';
    throw usageError(`${name}: want ${wanted}, got ${positionals.length} arguments`);
  }
  await command.run({ flags, positionals, terminal });
}

/** Runs one command line (without `node` and the script) and answers its exit code; never throws. */
export async function runCommand(args: readonly string[], terminal: Terminal): Promise<number> {
  if (args[0] === 'help' || args.includes('--help')) {
    terminal.out(usage);
    return 0;
  }
  if (args[0] === '--version') {
    terminal.out(`${version()}\n`);
    return 0;
  }
  const fail = (exitCode: number, code: string, message: string): number => {
    const isJson = args.includes('--json');
    terminal.err(isJson ? `${JSON.stringify({ error: { code, message } })}\n` : `${message}\n`);
    return exitCode;
  };
  try {
    await dispatch(args, terminal);
    return 0;
  } catch (error) {
    if (error instanceof CommandError) {
      const { exitCode, code, message } = error;
      return fail(exitCode, code, exitCode === 2 ? `${message}\n\n${usage}` : message);
    }
    if (error instanceof GatewayError) return fail(1, error.code, error.message);
    return fail(1, 'INTERNAL', error instanceof Error ? error.message : String(error));
  }
}
