// What the rows' adapters say to a program: one entry of a table per use, entry 0 for rows without an adapter. Checked
// before anything native runs. Uses are told apart by identity: a program's table is written again only when they are not
// those of its run before.

import { GatewayError } from '../errors.ts';
import { type Ops, type Program, ranksPerPage, type Tensor } from '../kernels/kernels.ts';
import { type DecoderConfig, moduleIndex, type Projection, projections } from './decoder-config.ts';
import type { AdapterRows, AtomBank } from './stepper.ts';

/** Pages of a row: rank 256. */
export const pagesPerRowMax = 32;

/** Sizes of a program's table; all zero and false where no row has an adapter. */
export interface UseTableSize {
  readonly uses: number; // G, entry 0 included
  readonly pages: number; // P per row
  /** One row of gates for all modules, or one for each. */
  readonly gates: 'shared' | 'modules';
  /** Whether some ranks choose themselves, and whether some are mixed by atoms. */
  readonly isRouted: boolean;
  readonly hasAtoms: boolean;
}

export type BankSizes = Pick<AtomBank, 'id' | 'covers' | 'r' | 'dq' | 'K'>;
/** Added to the logit of an atom that is no choice. Finite, so that no product with it is NaN. */
const never = -1e30;

export interface UseLimits {
  readonly config: Pick<DecoderConfig, 'blocks'>;
  /** Pages of the decoder. */
  readonly pages: number;
  readonly bank: BankSizes | null;
}

/** How many pages of its list a row reads: what the rank needs, or all of them where modules or groups differ. */
export function pagesOf(adapter: AdapterRows | null): number {
  if (adapter === null) return 0;
  const { pages, rank, gates, routing, atoms } = adapter;
  const isPlain = gates === null && routing === null && atoms === null;
  return isPlain ? Math.ceil(rank / ranksPerPage) : pages.length;
}

function refuse(message: string): never {
  throw new GatewayError('SHAPE_MISMATCH', `step: ${message}`);
}

function isCount(value: number, from: number, to: number): boolean {
  return Number.isInteger(value) && value >= from && value <= to;
}

/** Throws SHAPE_MISMATCH. */
export function checkUse(adapter: AdapterRows, limits: UseLimits): void {
  const { pages, rank, scale, gates, routing, atoms } = adapter;
  const count = pagesOf(adapter);
  if (!isCount(rank, 1, count * ranksPerPage) || count > Math.min(pagesPerRowMax, pages.length)) {
    refuse(`rank ${rank} needs ${Math.ceil(rank / ranksPerPage)} pages, got ${pages.length}`);
  }
  if (!pages.every((page) => isCount(page, 1, limits.pages - 1))) {
    refuse(`pages ${pages.join()} are not all within 1…${limits.pages - 1}`);
  }
  if (!Number.isFinite(scale)) refuse(`a scale of ${scale}`);
  const numbers = limits.config.blocks * projections.length * ranksPerPage * pages.length;
  for (const [name, values] of Object.entries({ gates, bias: routing?.bias ?? null })) {
    if (values !== null && values.length !== numbers) {
      refuse(`${name} of ${pages.length} pages are ${numbers} numbers, got ${values.length}`);
    }
  }
  let free = 0; // the first page that no group has yet
  if (atoms !== null) {
    checkAtoms(adapter, limits.bank);
    free = Math.ceil(limits.bank!.r / ranksPerPage);
  }
  for (const group of routing?.groups ?? []) {
    const { firstPage, topK, temperature } = group;
    const end = firstPage + group.pages;
    const fits =
      isCount(firstPage, free, pages.length) && isCount(end, firstPage + 1, pages.length);
    if (!fits || !isCount(topK, 1, group.pages * ranksPerPage)) {
      refuse(
        `${topK} ranks of pages ${firstPage}…${end - 1} of ${pages.length}, free from ${free}`,
      );
    }
    if (!(Number.isFinite(temperature) && temperature >= 0)) refuse(`temperature ${temperature}`);
    free = end;
  }
}

function checkAtoms({ pages, atoms }: AdapterRows, bank: BankSizes | null): void {
  if (bank === null || (atoms!.bank !== bank.id && bank.covers?.has(atoms!.bank) !== true)) {
    refuse(`atoms of bank ${atoms!.bank}, the bank here is ${bank?.id ?? 'none'}`);
  }
  const { keys, bias, topK } = atoms!;
  const fits = bias.length <= bank.K && keys.length === bias.length * bank.dq;
  if (!fits || !isCount(topK, 1, bias.length) || bank.r > pages.length * ranksPerPage) {
    refuse(
      `${topK} of ${bank.K} atoms of rank ${bank.r} with keys of ${bank.dq}: got ${keys.length} numbers of keys, ` +
        `${bias.length} of bias, ${pages.length} pages`,
    );
  }
}

/** The table's inputs, as a program is recorded. */
export interface UseInputs {
  readonly pages: Tensor; // [T, P]
  readonly uses: Tensor; // [T]
  gate(block: number, projection: Projection): Tensor; // [G, 8P]
  readonly routing: {
    readonly groups: Tensor; // [G, P]
    readonly temperatures: Tensor; // [G, P]
    bias(block: number, projection: Projection): Tensor; // [G, 8P]
  } | null;
  readonly atoms: {
    readonly uses: Tensor; // [T]
    readonly keys: Tensor; // [G, K, dq]
    readonly bias: Tensor; // [G, K]
    readonly topK: Tensor; // [G]
  } | null;
}

export function declareUses(
  ops: Ops,
  size: UseTableSize & { readonly rows: number },
  { config, bank }: UseLimits,
): UseInputs {
  const { rows, uses: entries, pages } = size;
  const modules = config.blocks * projections.length;
  const ranks = pages * ranksPerPage;
  const uses = ops.input('uses', 'i32', [rows]);
  const perModule = (name: string): UseInputs['gate'] => {
    const all = ops.input(name, 'f32', [modules, entries, ranks]);
    return (block, projection) => ops.slice(all, moduleIndex(block, projection));
  };
  const shared = (): UseInputs['gate'] => {
    const gate = ops.input('gates', 'f32', [entries, ranks]);
    return () => gate;
  };
  const own = (name: string, dtype: 'f32' | 'i32', ...shape: number[]): Tensor =>
    ops.input(name, dtype, [entries, ...shape]);
  return {
    pages: ops.input('pages', 'i32', [rows, pages]),
    uses,
    gate: size.gates === 'shared' ? shared() : perModule('gates'),
    routing: size.isRouted
      ? {
          groups: own('groups', 'i32', pages),
          temperatures: own('temperatures', 'f32', pages),
          bias: perModule('bias'),
        }
      : null,
    atoms:
      size.hasAtoms && bank !== null
        ? {
            uses,
            keys: own('keys', 'f32', bank.K, bank.dq),
            bias: own('atomBias', 'f32', bank.K),
            topK: own('topK', 'i32'),
          }
        : null,
  };
}

/** Of the inputs per module, which are nearly all of a table. */
export function tableBytes(
  { uses, pages, gates, isRouted }: UseTableSize,
  { blocks }: Pick<DecoderConfig, 'blocks'>,
): number {
  const inputs = (gates === 'modules' ? 1 : 0) + (isRouted ? 1 : 0);
  return inputs * blocks * projections.length * uses * pages * ranksPerPage * 4;
}

/** Entry g of the table is `uses[g - 1]`. */
export function writeUses(
  program: Program,
  uses: readonly AdapterRows[],
  size: UseTableSize,
  { config, bank }: UseLimits,
): void {
  const { pages, uses: entries } = size;
  const modules = config.blocks * projections.length;
  const ranks = pages * ranksPerPage;
  /** `fill` writes entry g of module m from `at` on. */
  const perEntry = (
    count: number,
    fill: (use: AdapterRows, to: Float32Array, at: number, module: number) => void,
  ): Float32Array => {
    const all = new Float32Array(count * entries * ranks);
    for (let module = 0; module < count; module++) {
      for (const [i, use] of uses.entries()) {
        fill(use, all, (module * entries + i + 1) * ranks, module);
      }
    }
    return all;
  };
  const copyModule = (from: Float32Array, to: Float32Array, at: number, module: number): void => {
    const width = from.length / modules;
    to.set(from.subarray(module * width, (module + 1) * width), at);
  };
  program.write(
    'gates',
    perEntry(size.gates === 'shared' ? 1 : modules, (use, to, at, module) => {
      if (use.gates === null) to.fill(use.scale, at, at + use.rank);
      else copyModule(use.gates, to, at, module);
    }),
  );
  if (size.isRouted) {
    const bias = perEntry(modules, ({ routing }, to, at, module) => {
      if (routing !== null) copyModule(routing.bias, to, at, module);
    });
    program.write('bias', bias);
    writeGroups(program, uses, size);
  }
  if (size.hasAtoms) writeAtoms(program, uses, entries, bank!);
}

function writeGroups(
  program: Program,
  uses: readonly AdapterRows[],
  { uses: entries, pages }: UseTableSize,
): void {
  const groups = new Int32Array(entries * pages);
  const temperatures = new Float32Array(entries * pages);
  uses.forEach(({ routing }, i) => {
    for (const group of routing?.groups ?? []) {
      const start = (i + 1) * pages + group.firstPage;
      groups.fill(-1, start, start + group.pages); // continues the group before it
      groups[start] = group.topK;
      temperatures.fill(group.temperature, start, start + group.pages);
    }
  });
  program.write('groups', groups);
  program.write('temperatures', temperatures);
}

function writeAtoms(
  program: Program,
  uses: readonly AdapterRows[],
  entries: number,
  { K, dq }: BankSizes,
): void {
  const keys = new Float32Array(entries * K * dq);
  const bias = new Float32Array(entries * K);
  const topK = new Int32Array(entries); // 0: the row's ranks stay as they are
  uses.forEach(({ atoms }, i) => {
    if (atoms === null) return;
    keys.set(atoms.keys, (i + 1) * K * dq);
    bias.fill(never, (i + 1) * K, (i + 2) * K);
    bias.set(atoms.bias, (i + 1) * K);
    topK[i + 1] = atoms.topK;
  });
  program.write('keys', keys);
  program.write('atomBias', bias);
  program.write('topK', topK);
}
