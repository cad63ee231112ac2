// What a packed adapter says to a step at a rank (stepper.ts, AdapterRows), and several adapters as one: their ranks one
// after another, so that the sum of the deltas is one delta. The same use gives the same object for as long as it is kept,
// by which the decoder knows that it has met it before.

import { LRUCache } from 'lru-cache';
import { GatewayError } from '../errors.ts';
import { moduleIndex, projections } from '../model/decoder-config.ts';
import {
  type AdapterRows,
  type AtomBank,
  type AtomRouting,
  type RankGroup,
  type RankRouting,
  uniformRows,
} from '../model/stepper.ts';
import { type AdapterManifest, type PackedKind, pageRanks } from './adapter.ts';
import type { FloatName, Floats, PackedAdapter } from './pack.ts';
import { ranksAt } from './pack-pairs.ts';

/** Pages that one row may read: rank 256 (decoder). */
const pagesPerRowMax = 32;
/** Added to a score: chosen after everything else. Finite, so that no product with it is NaN. */
const never = -1e30;

export interface RowMaker {
  readonly manifest: AdapterManifest;
  /** Pages from the first on that `rank` needs. Where a token chooses its ranks or atoms that is all of them. */
  pagesFor(rank: number): number;
  make(rank: number, pages: readonly number[]): AdapterRows;
  /** Of what it keeps of the packed file. */
  readonly bytes: number;
}

export type BankSizes = Pick<AtomBank, 'K' | 'dq'>;

/** Whether a rank computes its first ranks only. Of the others a token chooses among all. */
export function hasPrefixes(kind: PackedKind): boolean {
  return kind !== 'fly' && kind !== 'mora' && kind !== 'queryable';
}

/** Keeps the packed file's floats and nothing of its pages. `bank`: queryable's. */
export function createRowMaker(
  { manifest, floats }: Pick<PackedAdapter, 'manifest' | 'floats'>,
  blocks: number,
  bank: BankSizes | null = null,
): RowMaker {
  const { kind, modules, rankMax, options } = manifest;
  const isPrefix = hasPrefixes(kind);
  const ranksOn = (module: number, rank: number): number => ranksAt(manifest, module, rank);
  const widest = (rank: number): number => Math.max(...modules.map((_, i) => ranksOn(i, rank)));
  const perRank = { modules, moduleCount: blocks * projections.length };
  const atoms = bank === null ? null : atomsOf(manifest, floats, bank);
  let bytes = 0;
  for (const { values } of floats.values()) bytes += values.byteLength;
  return {
    manifest,
    bytes,
    pagesFor: (rank) => Math.ceil((isPrefix ? widest(rank) : rankMax) / pageRanks),
    make(rank, pages) {
      if (!isPrefix) {
        const whole = uniformRows(pages, rankMax);
        if (kind === 'queryable') return { ...whole, atoms };
        const chosen = chosenRanks(options, rank, pages.length);
        const [unchosen, bias] = [kind === 'fly' ? never : 0, floats.get('bias')!.values];
        const spread = { fill: unchosen, pages: pages.length, on: (i: number) => modules[i]!.rank };
        return { ...whole, routing: { groups: [chosen], bias: spreadOut(perRank, bias, spread) } };
      }
      const rows = uniformRows(pages, Math.min(rank, pages.length * pageRanks));
      const values = floats.get('gates')?.values ?? null;
      const isUniform = modules.every(
        ({ rank: own }, i) => ranksOn(i, rank) === Math.min(rank, own),
      );
      if (values === null && isUniform) return rows;
      const spread = { fill: 0, pages: pages.length, on: (i: number) => ranksOn(i, rank) };
      return { ...rows, gates: spreadOut(perRank, values, spread) };
    },
  };
}

/** A rank below the adapter's own k is a smaller k; above, the adapter's own. */
function chosenRanks(
  { topK, temperature }: AdapterManifest['options'],
  rank: number,
  pages: number,
): RankGroup {
  return { firstPage: 0, pages, topK: Math.min(rank, topK!), temperature: temperature ?? 0 };
}

interface PerRank {
  readonly modules: AdapterManifest['modules'];
  readonly moduleCount: number;
}

/** Numbers of ranks, module after module (null: ones), to where the kernels look for them: [M, 8·pages]. */
function spreadOut(
  { modules, moduleCount }: PerRank,
  values: Float32Array | null,
  { fill, pages, on }: { fill: number; pages: number; on: (module: number) => number },
): Float32Array {
  const width = pageRanks * pages;
  const spread = new Float32Array(moduleCount * width).fill(fill);
  let from = 0;
  for (const [i, { block, projection, rank }] of modules.entries()) {
    const to = moduleIndex(block, projection) * width;
    const count = Math.min(on(i), width);
    if (values === null) spread.fill(1, to, to + count);
    else spread.set(values.subarray(from, from + count), to);
    from += rank;
  }
  return spread;
}

/** Keys may be fewer than atoms: those that came to the bank later are no choice of the adapter's. */
function atomsOf(
  { options }: AdapterManifest,
  floats: ReadonlyMap<FloatName, Floats>,
  { K, dq }: BankSizes,
): AtomRouting {
  const keys = floats.get('keys')!;
  const own = keys.shape[0]!;
  if (keys.shape[1] !== dq || own > K) {
    const message = `keys [${keys.shape.join(', ')}] do not fit a bank of [${K}, ${dq}]`;
    throw new GatewayError('ADAPTER_CORRUPT', message);
  }
  const bias = new Float32Array(own);
  return { bank: options.needs!, keys: keys.values, bias, topK: Math.min(options.topK!, own) };
}

/** Something that has rows at each of its ranks: a resident in use (residency.ts). */
export interface RowsSource {
  /** 7 · blocks. */
  readonly moduleCount: number;
  rows(rank: number): AdapterRows;
}

export interface RowsPart {
  readonly use: RowsSource;
  readonly rank: number;
  readonly weight: number;
}

export interface ComposeOptions {
  /** Ranks that fly's parts keep, instead of their own number. */
  readonly flyTopK: number | null;
  /** Added to the logits of a queryable part's atoms, in the order of its labels. */
  readonly atomBias: ArrayLike<number> | null;
}

interface Part {
  readonly rows: AdapterRows;
  readonly weight: number;
}

/** By the first part's rows: what is made of rows that nobody keeps is not kept either. */
const composed: WeakMap<AdapterRows, LRUCache<string, AdapterRows>> = new WeakMap();
const composedMax = 64;
const serials: WeakMap<AdapterRows, number> = new WeakMap();
let serialLast = 0;

/** Names the object, not what it says. */
function serialOf(rows: AdapterRows): number {
  const serial = serials.get(rows) ?? ++serialLast;
  serials.set(rows, serial);
  return serial;
}

/** The parts' deltas, each times its weight, as one. Throws UNSUPPORTED for more pages than a row may have, and for
 *  queryable parts that are more than one or weighted: their atoms are chosen by what the weight would change. */
export function composeRows(
  given: readonly RowsPart[],
  options: ComposeOptions = { flyTopK: null, atomBias: null },
): AdapterRows {
  const parts = given.map(({ use, rank, weight }) => ({ rows: use.rows(rank), weight }));
  const [first] = parts;
  if (first === undefined) throw new GatewayError('INTERNAL', 'a blend of nothing');
  const { flyTopK, atomBias } = options;
  if (parts.length === 1 && first.weight === 1 && flyTopK === null && atomBias === null) {
    return first.rows;
  }
  const cache = composed.get(first.rows) ?? new LRUCache({ max: composedMax });
  composed.set(first.rows, cache);
  const bias = atomBias === null ? null : Array.from(atomBias);
  const names = parts.map(({ rows, weight }) => [serialOf(rows), weight]);
  const key = JSON.stringify([names, flyTopK, bias]);
  const known = cache.get(key);
  if (known !== undefined) return known;
  const made = compose(parts, given[0]!.use.moduleCount, { flyTopK, atomBias: bias });
  cache.set(key, made);
  return made;
}

function compose(
  parts: readonly Part[],
  moduleCount: number,
  { flyTopK, atomBias }: ComposeOptions,
): AdapterRows {
  const queryable = parts.filter(({ rows }) => rows.atoms !== null);
  if (queryable.length > 1 || queryable.some(({ weight }) => weight !== 1)) {
    const message = 'a queryable adapter can be in a blend once, and with weight 1 only';
    throw new GatewayError('UNSUPPORTED', message);
  }
  // A bank mixes the first ranks of a use.
  const ordered = [...queryable, ...parts.filter(({ rows }) => rows.atoms === null)];
  const pages = ordered.flatMap(({ rows }) => pagesRead(rows));
  if (pages.length > pagesPerRowMax) {
    const [got, most] = [pages.length * pageRanks, pagesPerRowMax * pageRanks];
    throw new GatewayError('UNSUPPORTED', `a blend of ${got} ranks, at most ${most} are served`);
  }
  const [first] = ordered as [Part];
  const isOne = ordered.length === 1;
  const atoms = first.rows.atoms;
  return {
    pages,
    rank: ordered.reduce((sum, { rows }) => sum + rows.rank, 0),
    scale: isOne ? first.rows.scale * first.weight : 1,
    gates: isOne && first.rows.gates === null ? null : gatesOf(ordered, moduleCount),
    routing: routingOf(ordered, moduleCount, flyTopK),
    atoms: atoms === null || atomBias === null ? atoms : withBias(atoms, atomBias),
  };
}

/** A plain row's list may be longer than what its rank needs. */
function pagesRead({ pages, rank, gates, routing, atoms }: AdapterRows): readonly number[] {
  const isPlain = gates === null && routing === null && atoms === null;
  return isPlain ? pages.slice(0, Math.ceil(rank / pageRanks)) : pages;
}

/** `write(part, to, module)` fills one module's numbers of one part; all of them are [M, 8·pages]. */
function perModule(
  parts: readonly Part[],
  moduleCount: number,
  write: (part: Part, to: Float32Array, module: number) => void,
): Float32Array {
  const widths = parts.map(({ rows }) => pageRanks * pagesRead(rows).length);
  const all = new Float32Array(moduleCount * widths.reduce((sum, width) => sum + width, 0));
  let at = 0;
  for (let module = 0; module < moduleCount; module++) {
    for (const [i, part] of parts.entries()) {
      write(part, all.subarray(at, at + widths[i]!), module);
      at += widths[i]!;
    }
  }
  return all;
}

function gatesOf(parts: readonly Part[], moduleCount: number): Float32Array {
  return perModule(parts, moduleCount, ({ rows, weight }, to, module) => {
    if (rows.gates === null) to.fill(rows.scale * weight, 0, rows.rank);
    else for (let r = 0; r < to.length; r++) to[r] = weight * rows.gates[module * to.length + r]!;
  });
}

/** A weight is in the gates, so in h, by which ranks are chosen: the bias goes along, and the choice stays what it was. */
function routingOf(
  parts: readonly Part[],
  moduleCount: number,
  flyTopK: number | null,
): RankRouting | null {
  if (parts.every(({ rows }) => rows.routing === null)) return null;
  const groups: RankGroup[] = [];
  let firstPage = 0;
  for (const { rows } of parts) {
    for (const group of rows.routing?.groups ?? []) {
      const isFly = group.temperature === 0;
      const topK = isFly && flyTopK !== null ? Math.min(flyTopK, rows.rank) : group.topK;
      groups.push({ ...group, firstPage: firstPage + group.firstPage, topK });
    }
    firstPage += pagesRead(rows).length;
  }
  const bias = perModule(parts, moduleCount, ({ rows: { routing }, weight }, to, module) => {
    if (routing === null) return;
    const isFly = routing.groups[0]!.temperature === 0;
    const size = Math.abs(weight);
    const factor = isFly ? size : size === 0 ? 0 : 1 / size;
    for (let r = 0; r < to.length; r++) to[r] = factor * routing.bias[module * to.length + r]!;
  });
  return { groups, bias };
}

function withBias(atoms: AtomRouting, added: ArrayLike<number>): AtomRouting {
  return { ...atoms, bias: atoms.bias.map((value, k) => value + (added[k] ?? 0)) };
}
