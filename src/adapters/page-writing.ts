// A packed adapter's pages → a stepper's, a module at a time; after a last check that it was made for this base.

import { GatewayError } from '../errors.ts';
import { type Projection, projectionShape, projections } from '../model/decoder-config.ts';
import type { AtomBank, ModuleRef, Stepper } from '../model/stepper.ts';
import { type AdaptedModule, type AdapterManifest, pageRanks } from './adapter.ts';
import type { FloatName, PackedAdapter } from './pack.ts';
import type { ResidentKey } from './residency.ts';

export type PageMemory = Pick<Stepper, 'config' | 'pages' | 'pageBytes' | 'writePage'>;

/** Writes from the adapter's page `first` on to `pages`, and yields the bytes of the file that each module's page took.
 *  Every module of the base, also those that the adapter lacks: the pages may hold another adapter's ranks. */
export function* writePages(
  stepper: PageMemory,
  packed: Pick<PackedAdapter, 'page'>,
  first: number,
  pages: readonly number[],
): Generator<number, void> {
  const bytes = moduleBytes(stepper);
  for (const [i, page] of pages.entries()) {
    for (const module of allModules(stepper)) {
      stepper.writePage(page, module, packed.page(module, first + i));
      yield bytes(module);
    }
  }
}

/** Shapes again, although import checked them: a wrong page would be written over a neighbour's memory. */
export function checkBase(
  manifest: AdapterManifest,
  { config }: Pick<Stepper, 'config'>,
  baseHash: string,
): void {
  if (manifest.baseHash !== baseHash) {
    throw new GatewayError(
      'BASE_MISMATCH',
      `the adapter is for base ${manifest.baseHash}, the engine runs ${baseHash}`,
    );
  }
  for (const { block, projection, in: width, out } of manifest.modules) {
    const want = projectionShape(config, projection);
    if (block < config.blocks && width === want.in && out === want.out) continue;
    throw new GatewayError(
      'BASE_MISMATCH',
      `blk.${block}.${projection}: got ${width} → ${out}, the base has ${want.in} → ${want.out} ` +
        `and ${config.blocks} blocks`,
    );
  }
}

/** svfit's gates are of its basis' ranks. */
export function checkBasis(tenant: AdapterManifest, basis: AdapterManifest): void {
  if (isCovered(tenant.modules, basis)) return;
  throw new GatewayError('ADAPTER_CORRUPT', 'the adapter has ranks that its basis lacks');
}

export function isCovered(
  modules: readonly Omit<AdaptedModule, 'in' | 'out'>[],
  basis: AdapterManifest,
): boolean {
  const ranks = new Map(basis.modules.map((m) => [`${m.block}.${m.projection}`, m.rank]));
  const has = ({ block, projection, rank }: Omit<AdaptedModule, 'in' | 'out'>): boolean =>
    rank <= (ranks.get(`${block}.${projection}`) ?? 0);
  return basis.kind === 'basis' && modules.every(has);
}

export function atomBankOf({ generation, manifest, floats }: PackedAdapter<ResidentKey>): AtomBank {
  if (manifest.kind !== 'bank') {
    throw new GatewayError('ADAPTER_CORRUPT', `${generation} is a ${manifest.kind}, not a bank`);
  }
  const values = (name: FloatName): Float32Array => floats.get(name)!.values;
  return {
    id: generation,
    atoms: values('atoms'),
    query: values('query'),
    summary: values('summary'),
    context: values('context'),
    r: manifest.rankMax,
    dq: floats.get('query')!.shape[0]!,
    K: floats.get('atoms')!.shape[0]!,
    blockLayers: manifest.options.blockLayers!,
  };
}

/** Whether `bank` is `other`, or `other` and more atoms: then what routes among the atoms of `other` needs no other bank. */
export function beginsWith(bank: AtomBank, other: AtomBank): boolean {
  const isSame = (x: Float32Array, y: Float32Array): boolean =>
    x.length === y.length && x.every((value, i) => value === y[i]);
  return (
    bank.blockLayers === other.blockLayers &&
    (['query', 'summary', 'context'] as const).every((name) => isSame(bank[name], other[name])) &&
    isSame(bank.atoms.subarray(0, other.atoms.length), other.atoms)
  );
}

function allModules({ config }: Pick<Stepper, 'config'>): readonly ModuleRef[] {
  const modules: ModuleRef[] = [];
  for (let block = 0; block < config.blocks; block++) {
    for (const projection of projections) modules.push({ block, projection });
  }
  return modules;
}

function moduleBytes({ config }: Pick<Stepper, 'config'>): (module: ModuleRef) => number {
  const sizes = new Map<Projection, number>();
  for (const projection of projections) {
    const shape = projectionShape(config, projection);
    sizes.set(projection, 2 * pageRanks * (shape.in + shape.out));
  }
  return ({ projection }) => sizes.get(projection) ?? 0;
}
