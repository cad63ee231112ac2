// Packed files of every kind for the tiny base, of seeded numbers: the same options give the same bytes.

import {
  type AdapterManifest,
  type FamilyOptions,
  type Generation,
  noOptions,
  type PackedKind,
} from '../../src/adapters/adapter.ts';
import {
  createPacker,
  type FloatName,
  type Floats,
  generationOf,
  openPacked,
} from '../../src/adapters/pack.ts';
import type { ServedModule } from '../../src/adapters/served.ts';
import { projectionShape, projections } from '../../src/model/decoder-config.ts';
import type { ModuleRef } from '../../src/model/stepper.ts';
import { createRng } from './random.ts';
import { tinyBase } from './tiny-base.ts';

export interface MadeOptions {
  readonly kind: PackedKind;
  readonly rank: number;
  readonly seed: number;
  /** All of the tiny base by default. */
  readonly modules?: readonly ModuleRef[];
  readonly options?: Partial<FamilyOptions>;
  readonly levels?: AdapterManifest['levels'];
  /** Atoms of a bank or of a queryable adapter's labels, and the size of their keys. */
  readonly atoms?: number;
}

export interface MadeFile {
  readonly generation: Generation;
  readonly manifest: AdapterManifest;
  readonly bytes: Uint8Array;
}

export const tinyModules: readonly ModuleRef[] = [0, 1].flatMap((block) =>
  projections.map((projection) => ({ block, projection })),
);
const keySize = 4;

/** What the kinds need beyond numbers, where the test says nothing else. */
function defaultOptions({ kind, rank, seed, atoms = 3 }: MadeOptions): Partial<FamilyOptions> {
  const needs: Generation = `sha256:${'0'.repeat(64)}`;
  switch (kind) {
    case 'fly':
      return { seed: seed.toString(16).padStart(16, '0'), topK: Math.ceil(rank / 4) };
    case 'mora':
      return { topK: Math.ceil(rank / 4), temperature: 0.1 };
    case 'svfit':
      return { needs };
    case 'queryable':
      return { needs, topK: 2, labels: Array.from({ length: atoms }, (_, i) => `label ${i}`) };
    case 'bank':
      return { blockLayers: 1 };
    default:
      return {};
  }
}

export function makePacked(made: MadeOptions): MadeFile {
  const { kind, rank, seed, modules = tinyModules, atoms = 3 } = made;
  const rng = createRng(seed);
  const draw = (length: number): Float64Array =>
    Float64Array.from({ length }, () => 2 * rng.next() - 1);
  const packer = createPacker();
  for (const module of kind === 'bank' ? [] : modules) {
    const sizes = projectionShape(tinyBase.config, module.projection);
    const served: ServedModule = {
      ...module,
      ...sizes,
      rank,
      a: kind === 'fly' || kind === 'svfit' ? null : draw(rank * sizes.in),
      b: kind === 'svfit' ? null : draw(rank * sizes.out),
      gates: kind === 'svfit' ? Float32Array.from(draw(rank)) : null,
      bias: kind === 'fly' ? Float32Array.from(draw(rank)) : null,
    };
    packer.add(served);
  }
  const floats = new Map<FloatName, Floats>();
  const put = (name: FloatName, ...shape: number[]): void => {
    const size = shape.reduce((product, length) => product * length, 1);
    floats.set(name, { shape, values: Float32Array.from(draw(size)) });
  };
  if (kind === 'queryable') {
    put('keys', atoms, keySize);
    put('labels', atoms, tinyBase.config.width);
  } else if (kind === 'bank') {
    put('atoms', atoms, rank, rank);
    put('query', keySize, rank);
    put('summary', rank, rank);
    put('context', keySize, rank);
  }
  const curve = Array.from({ length: rank }, (_, k) => (k + 1) / rank);
  const { bytes, manifest } = packer.finish(
    {
      format: 'rankgate-adapter/3',
      kind,
      describe: `made for a test from seed ${seed}`,
      baseHash: tinyBase.hash,
      rankMax: rank,
      rankCurve: kind === 'bank' ? [] : curve,
      levels: made.levels ?? null,
      options: { ...noOptions, ...defaultOptions(made), ...made.options },
      source: { format: 'rankgate', by: 'test', from: [] },
    },
    floats,
  );
  return { generation: generationOf(bytes), manifest, bytes };
}

/** The bank and `count` atoms more. */
export function grownBank(bank: MadeFile, count: number): MadeFile {
  const { floats, manifest } = openPacked(bank.bytes, bank.generation);
  const { shape, values } = floats.get('atoms')!;
  const [before = 0, r = 0] = shape;
  const rng = createRng(before + count);
  const all = Float32Array.from({ length: (before + count) * r * r }, (_, i) =>
    i < values.length ? values[i]! : 2 * rng.next() - 1,
  );
  const atoms = { shape: [before + count, r, r], values: all };
  const { modules, ...about } = manifest;
  const { bytes, ...made } = createPacker().finish(about, new Map([...floats, ['atoms', atoms]]));
  return { generation: generationOf(bytes), bytes, ...made };
}
