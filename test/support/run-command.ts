import { runCommand } from '../../src/commands.ts';

export interface Ran {
  readonly exitCode: number;
  readonly out: string;
  readonly err: string;
}

/** A command as a script runs it, on no terminal. */
export async function runAsScript(
  args: readonly string[],
  environment: NodeJS.ProcessEnv = {},
): Promise<Ran> {
  let [out, err] = ['', ''];
  const exitCode = await runCommand(args, {
    out: (text) => {
      out += text;
    },
    err: (text) => {
      err += text;
    },
    isTerminal: false,
    environment,
  });
  return { exitCode, out, err };
}
