// What a kind of adapter is: y += B·f(A·x) with its own A, B and f (design.md section 3), for one module, in f64. This is the
// definition that kernels and trainer are held to, not how they compute. Matrices are orthogonal.ts's, a token a column: a
// file's row-major tensor [count, length] is `count` columns of `length`, so A is [in, R] here and x is [in, T].

import { GatewayError } from '../../errors.ts';
import { moduleIndex } from '../../model/decoder-config.ts';
import type { ModuleRef } from '../../model/stepper.ts';
import { type AdapterKind, type FamilyOptions, noOptions } from '../adapter.ts';
import { type Columns, multiplyTransposed, transpose } from '../orthogonal.ts';
import { type ServedModule, servedPair } from '../served.ts';
import { type LoraModule, squeezeModule } from '../squeeze.ts';
import { added, corner, scaled, times, transposedTimes } from './matrices.ts';
import type { Random } from './seeded-random.ts';

/** A module's numbers by name, as the family's own file has them. */
export type Tensors = Readonly<Record<string, Columns>>;

/** A module of the base. */
export interface Site extends ModuleRef {
  readonly in: number;
  readonly out: number;
  /** The base's weight, one row after another: [in, out]. Asked for by svfit, salt and hydra only. */
  weight(): Columns;
}

/** The low-rank pair that a family's numbers stand for, y += B·(gates ⊙ A·x), and the way back. */
export interface Pair {
  readonly a: Columns; // [in, R]
  readonly b: Columns; // [out, R]
  readonly gates: Float64Array; // [R]
  gradient(d: Readonly<{ a: Columns; b: Columns; gates: Float64Array }>): Tensors;
}

export interface RouteInput {
  readonly h: Columns; // [R, T], gated
  readonly x: Columns; // [in, T]
  readonly tensors: Tensors;
  /** null: all that the family has. */
  readonly rank: number | null;
}
/** f where it depends on the token, and the way back. */
export interface Routed {
  readonly g: Columns; // [R, T]
  gradient(dg: Columns): { readonly dh: Columns; readonly dx?: Columns; readonly tensors: Tensors };
}

/** A LoRA as PEFT has it: its scale is alpha/r, or alpha/√r with rsLoRA. */
export interface PeftPair {
  readonly rank: number;
  readonly alpha: number;
  readonly rslora: boolean;
  readonly a: Float64Array; // [rank, in]
  readonly b: Float64Array; // [out, rank]
}

export interface Family {
  readonly kind: AdapterKind;
  /** What it is, for people. */
  readonly describe: string;
  /** What the packed file's manifest says of it. */
  readonly options: FamilyOptions;
  /** What a rank k is: the first k ranks; k ranks of the token's choice; or nothing, as all ranks are mixed. */
  readonly slicing: 'prefix' | 'active' | 'whole';
  /** Every tensor of a module as [count, length]: numbers, `in`, `out`, or a name that is one size throughout. */
  readonly axes: Readonly<Record<string, readonly [Axis, Axis]>>;
  readonly trained: readonly string[];
  /** Changes nothing: the delta is exactly 0 for every x. */
  init(site: Site, random: Random): Tensors;
  /** `rank` null: the function that is trained, else as it is served at that rank. */
  pair(site: Site, tensors: Tensors, rank: number | null): Pair;
  readonly route: ((input: RouteInput) => Routed) | null;
  serve(site: Site, tensors: Tensors): ServedModule;
  /** The pair that PEFT applies with the same result at that rank, or why there is none. */
  toPeft(site: Site, tensors: Tensors, rank: number): PeftPair | string;
  /** The family's numbers for a LoRA, or why there are none. */
  fromPeft(site: Site, module: LoraModule): Tensors | string;
}
export type Axis = string | number;

export interface Pass {
  readonly y: Columns; // [out, T]
  gradient(dy: Columns): { readonly dx: Columns; readonly tensors: Tensors };
}

/** What the module adds to the base's output for the tokens x [in, T], at a rank or as it is trained. */
export function forward(
  family: Family,
  site: Site,
  tensors: Tensors,
  { x, rank }: { readonly x: Columns; readonly rank: number | null },
): Pass {
  const pair = family.pair(site, tensors, rank);
  const plain = transposedTimes(pair.a, x); // [R, T]
  const h = gated(plain, pair.gates);
  const routed = family.route?.({ h, x, tensors, rank }) ?? identity(h);
  return {
    y: times(pair.b, routed.g),
    gradient(dy) {
      const back = routed.gradient(transposedTimes(pair.b, dy));
      const dh = gated(back.dh, pair.gates);
      const gates = new Float64Array(pair.gates.length);
      plain.data.forEach((value, i) => {
        gates[i % plain.rows]! += value * back.dh.data[i]!;
      });
      const d = { a: multiplyTransposed(x, dh), b: multiplyTransposed(dy, routed.g), gates };
      const own = times(pair.a, dh);
      return {
        dx: back.dx === undefined ? own : added(own, back.dx),
        tensors: sumTensors(pair.gradient(d), back.tensors),
      };
    },
  };
}

function identity(h: Columns): Routed {
  return { g: h, gradient: (dg) => ({ dh: dg, tensors: {} }) };
}

/** Each row times its gate. */
function gated({ rows, columns, data }: Columns, gates: Float64Array): Columns {
  return { rows, columns, data: data.map((value, i) => value * gates[i % rows]!) };
}

function sumTensors(x: Tensors, y: Tensors): Tensors {
  const result = { ...x };
  for (const [name, tensor] of Object.entries(y)) {
    result[name] = x[name] === undefined ? tensor : added(x[name], tensor);
  }
  return result;
}

/** The numbers that rank k needs: its prefix, or everything where the token chooses. */
export function slice(family: Family, tensors: Tensors, rank: number): Tensors {
  if (family.slicing !== 'prefix') return tensors;
  const cut = (axis: Axis, size: number): number => (axis === 'rank' ? Math.min(rank, size) : size);
  return Object.fromEntries(
    Object.entries(tensors).map(([name, x]) => {
      const [count, length] = family.axes[name]!;
      return [name, corner(x, cut(count, x.columns), cut(length, x.rows))];
    }),
  );
}

/** Throws INVALID_ADAPTER unless the module has the family's tensors, all of fitting sizes and finite. */
export function checkTensors(
  family: Pick<Family, 'kind' | 'axes'>,
  site: Site,
  tensors: Tensors,
): void {
  const sizes = new Map<Axis, number>([
    ['in', site.in],
    ['out', site.out],
  ]);
  const where = `${family.kind}: blk.${site.block}.${site.projection}`;
  const wanted = Object.entries(family.axes);
  const stranger = Object.keys(tensors).find((name) => family.axes[name] === undefined);
  if (stranger !== undefined) refuse(where, `has an unknown tensor ${JSON.stringify(stranger)}`);
  for (const [name, axes] of wanted) {
    const tensor = tensors[name];
    if (tensor === undefined) refuse(where, `lacks the tensor ${name}`);
    const shape = [tensor.columns, tensor.rows];
    const fits = axes.every((axis, i) => {
      const size = typeof axis === 'number' ? axis : (sizes.get(axis) ?? shape[i]!);
      sizes.set(axis, size);
      return size === shape[i];
    });
    if (!fits) refuse(where, `${name} is [${shape.join(', ')}], want [${axes.join(', ')}]`);
    if (!tensor.data.every(Number.isFinite))
      refuse(where, `${name} has a value that is not finite`);
  }
}

export function refuse(where: string, what: string): never {
  throw new GatewayError('INVALID_ADAPTER', `${where} ${what}`);
}

export function parameterCount(family: Family, tensors: Tensors): number {
  return family.trained.reduce((count, name) => count + tensors[name]!.data.length, 0);
}

/** What a module's own numbers take as stored: f16 factors, f32 gates and biases. The last page's padding is not in it. */
export function bytesOf(module: ServedModule): number {
  const halves = (module.a?.length ?? 0) + (module.b?.length ?? 0);
  return 2 * halves + 4 * ((module.gates?.length ?? 0) + (module.bias?.length ?? 0));
}

/** How a plain pair's ranks are ordered when it is published: by its SVD, or as they are. */
export type RankOrder = 'svd' | 'as-trained';

interface PairCore
  extends Pick<Family, 'kind' | 'describe' | 'axes' | 'trained' | 'init' | 'pair'> {
  readonly order?: RankOrder;
  readonly toPeft?: Family['toPeft'];
  readonly fromPeft?: Family['fromPeft'];
}

/** A family without routing: published, its gates are folded into B and it is a LoRA like any other. */
export function pairFamily(core: PairCore): Family {
  const family: Family = {
    fromPeft: () => `a LoRA alone does not say what ${core.kind}'s numbers are`,
    toPeft: (site, tensors, rank) => peftOf(family.pair(site, tensors, rank)),
    ...core,
    options: noOptions,
    slicing: 'prefix',
    route: null,
    serve(site, tensors) {
      const { rank, a, b } = peftOf(core.pair(site, tensors, null));
      if (core.order === 'as-trained') {
        return servedPair(site, {
          rank,
          a,
          b: transpose({ rows: rank, columns: site.out, data: b }).data,
        });
      }
      return servedPair(site, squeezeModule({ rank, in: site.in, out: site.out, a, b, scale: 1 }));
    },
  };
  return family;
}

/** A and B as they are stored, every rank times the same. */
export function constantGates(a: Columns, b: Columns, scale: number): Pair {
  const gates = new Float64Array(a.columns).fill(scale);
  return { a, b, gates, gradient: (d) => ({ a: d.a, b: d.b }) };
}

/** alpha = r: PEFT's scale is 1, ours is in B. */
export function peftOf({ a, b, gates }: Pair): PeftPair {
  const folded = b.data.map((value, i) => value * gates[Math.floor(i / b.rows)]!);
  const rank = a.columns;
  return { rank, alpha: rank, rslora: false, a: a.data, b: transpose({ ...b, data: folded }).data };
}

/** A and B of a LoRA as tensors, B times its scale. */
export function tensorsOf({
  rank,
  in: width,
  out,
  a,
  b,
  scale,
}: LoraModule): Record<'a' | 'b', Columns> {
  const rankMajor = transpose({ rows: rank, columns: out, data: b }); // [out, rank]
  return { a: { rows: width, columns: rank, data: a }, b: scaled(rankMajor, scale) };
}

/** Keeps apart what modules draw from one seed. */
export function streamOf(site: ModuleRef): number {
  return moduleIndex(site.block, site.projection);
}
