// Our own kernels (native/*.c), built by the system's compiler for this machine's vector width when they are first wanted, kept
// by the hash of their source and command, and found by name. Without a compiler there are none, and programs are
// composed of ggml's ops; `why` says which it is, for doctor and logs.

import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import koffi, { type LibraryHandle } from 'koffi';
import type { Pointer } from './library.ts';

const functions = [
  'rankgate_linear',
  'rankgate_linear_tiles',
  'rankgate_round',
  'rankgate_embed_tiles',
  'rankgate_shrink',
  'rankgate_expand',
  'rankgate_route_ranks',
  'rankgate_atom_context',
  'rankgate_route_atoms',
  'rankgate_mix_ranks',
  'rankgate_softmax_top',
  'rankgate_attend',
  'rankgate_linear_f32',
  'rankgate_linear_t_f32',
  'rankgate_outer_f32',
] as const;
export type NativeFunction = (typeof functions)[number];

export interface NativeKernels {
  readonly addresses: ReadonlyMap<NativeFunction, Pointer>;
  /** `own kernels for x86-64-v4 by cc (3fa8b21c)`, with the start of their hash, or why there are none. */
  readonly why: string;
  /** Lays rows [N,K] of a weight out as tiles (native/tiles.c). */
  readonly tile?: (tiles: Pointer, rows: Uint8Array, type: number, sizes: TileSizes) => void;
  /** Rounds a page of f16 bits to q8_0 at an address (native/pages.c). */
  readonly roundPage?: (page: bigint, halves: Uint16Array) => void;
  /** Kept: koffi unloads a library that nothing refers to, and its functions with it. */
  readonly library?: LibraryHandle;
}

interface TileSizes {
  readonly rows: number;
  readonly width: number;
  readonly rowBytes: number;
}

const root: string = join(import.meta.dirname, '../../..'); // of src and of dist alike
const buildMsMax = 120_000;

/** The instruction sets that the C files are written for, best first. */
export function instructionFlags(arch: string, cpuFlags: ReadonlySet<string>): readonly string[] {
  if (arch !== 'x64') return [];
  const has = (...names: string[]): boolean => names.every((name) => cpuFlags.has(name));
  if (has('avx512f', 'avx512bw', 'avx512dq', 'avx512vl', 'avx512cd', 'fma')) {
    const octets = has('avx512_vnni') ? ['-mavx512vnni'] : [];
    return ['-march=x86-64-v4', ...octets, '-mprefer-vector-width=512'];
  }
  return has('avx2', 'fma', 'f16c', 'bmi2') ? ['-march=x86-64-v3'] : [];
}

function cpuFlags(): ReadonlySet<string> {
  if (process.platform !== 'linux') return new Set();
  const line = /^flags\s*:(.*)$/m.exec(readFileSync('/proc/cpuinfo', 'latin1'));
  return new Set(line?.[1]?.trim().split(/\s+/));
}

function compile(): { readonly file: string; readonly why: string } {
  const sources = join(root, 'src/kernels/ggml/native');
  const flags = instructionFlags(process.arch, cpuFlags());
  const level =
    flags
      .map((flag) => /^-m(?:arch=)?([^=]+)$/.exec(flag)?.[1] ?? '')
      .join(' ')
      .trim() || `baseline ${process.arch}`;
  const files = readdirSync(sources).sort();
  const arguments_ = [
    ...['-std=gnu11', '-O3', '-fPIC', '-shared', '-ffp-contract=fast', ...flags],
    ...files.filter((name) => name.endsWith('.c')).map((name) => join(sources, name)),
  ];
  const hash = createHash('sha256').update(flags.join());
  for (const name of files) hash.update(name).update(readFileSync(join(sources, name)));
  const folder = join(root, 'build/native');
  const name = hash.digest('hex').slice(0, 32);
  const file = join(folder, `${name}.so`);
  if (!existsSync(file)) {
    mkdirSync(folder, { recursive: true });
    const part = `${file}.${process.pid}.part`; // two engines may build at the same time
    try {
      execFileSync('cc', [...arguments_, '-o', part, '-lm'], {
        stdio: ['ignore', 'ignore', 'pipe'],
        timeout: buildMsMax,
      });
      renameSync(part, file);
    } finally {
      rmSync(part, { force: true });
    }
  }
  return { file, why: `own kernels for ${level} by cc (${name.slice(0, 8)})` };
}

function load(): NativeKernels {
  try {
    const { file, why } = compile();
    const library = koffi.load(file);
    const addresses = new Map<NativeFunction, Pointer>();
    for (const name of functions) {
      addresses.set(name, koffi.address(library.symbol(name)));
    }
    const sizes = 'int64_t N, int64_t K, int64_t rowBytes';
    const tile = library.func(`void rankgate_tile(void *to, const void *from, int type, ${sizes})`);
    const roundPage = library.func(
      'void rankgate_round_page(void *to, const void *from, int64_t blocks)',
    );
    return {
      addresses,
      why,
      roundPage: (page, halves) => {
        roundPage(page, halves, halves.length / 32);
      },
      tile: (to, from, type, { rows, width, rowBytes }) => {
        tile(to, from, type, rows, width, rowBytes);
      },
      library,
    };
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code;
    const reason = code === 'ENOENT' ? 'no compiler named cc' : firstLine(error);
    return { addresses: new Map(), why: `composed of ggml's ops: ${reason}` };
  }
}

function firstLine(error: unknown): string {
  const text = error instanceof Error ? error.message : String(error);
  return text.split('\n')[0]!.replaceAll(root, '.').slice(0, 200);
}

let loaded: NativeKernels | undefined;

/** Builds at most once per process. */
export function nativeKernels(): NativeKernels {
  loaded ??= load();
  return loaded;
}
