// A queryable adapter before and after training (algorithms.md section 6): what of it trains, over which bank, and the directory
// that it becomes (adapters/queryable-directory.ts). From the base it brings a bank of its own. From another adapter it is over
// that one's bank, which stays as it is byte for byte; with more atoms than that has, those and their keys are all that trains.

import { columnsOf } from '../adapters/families/matrices.ts';
import { scaleOf } from '../adapters/families/matryoshka.ts';
import { instructionPrior, priorBias } from '../adapters/families/queryable.ts';
import type { Columns } from '../adapters/orthogonal.ts';
import type { PackedAdapter } from '../adapters/pack.ts';
import { floatTensor, halfTensor, halvesOf } from '../adapters/pack-numbers.ts';
import { embeddedLabels } from '../adapters/queryable-directory.ts';
import { GatewayError } from '../errors.ts';
import type { Recipe } from '../jobs/recipe.ts';
import { earlierMax } from '../kernels/rank-routing.ts';
import type { DecoderConfig } from '../model/decoder-config.ts';
import type { GgufFile } from '../model/gguf.ts';
import { type SafetensorsTensor, writeSafetensors } from '../model/safetensors.ts';
import { tensorName } from '../model/trained-delta.ts';
import type { TrainedModule } from './family-graph.ts';
import type { QueryableChoice } from './family-training.ts';
import type { AdapterFiles } from './publish.ts';
import { groupCount, queryableGraph } from './queryable-graph.ts';

/** What training goes on from. */
export interface QueryableStart {
  readonly adapter: PackedAdapter;
  readonly bank: PackedAdapter;
}

const atomsDefault = 8;
const queryWidthDefault = 16;
const blockLayersDefault = 5;

/** `bias`: of `priorOf`. */
export function queryableChoice(
  recipe: Recipe,
  start: QueryableStart | null,
  bias: readonly number[] | null = null,
): QueryableChoice {
  const { rank, topK, scaling, bank } = recipe;
  const { balance, denseShare, ...wanted } = bank!;
  const known = start === null ? null : sizesOf(start.bank);
  const atoms = wanted.atoms ?? known?.atoms ?? atomsDefault;
  const isGrown = known !== null && atoms > known.atoms;
  return {
    kind: 'queryable',
    rank,
    alpha: rank * scaleOf(scaling, rank),
    atoms,
    topK: Math.min(topK, atoms),
    queryWidth: known?.queryWidth ?? wanted.queryWidth ?? queryWidthDefault,
    blockLayers: known?.blockLayers ?? wanted.blockLayers ?? blockLayersDefault,
    part: known === null ? 'bank' : isGrown ? 'new-atoms' : 'adapter',
    kept: known?.atoms ?? 0,
    balance,
    denseShare,
    bias,
  };
}

/** What the recipe's instruction adds to the atoms' logits, as the engine has it (engine/instruction-prior.ts). */
export function priorOf(
  recipe: Recipe,
  from: StartOptions,
  { file, width }: { readonly file: GgufFile; readonly width: number },
): readonly number[] | null {
  const { instruction = null } = recipe.bank ?? {};
  if (instruction === null) return null;
  const start = queryableStart(from);
  const { atoms } = queryableChoice(recipe, start);
  const labels = labelsOf(recipe, atoms, from.start);
  const { values } = embeddedLabels([...labels, instruction.text], file, width);
  const all = { rows: width, columns: atoms + 1, data: Float64Array.from(values) };
  const e = columnsOf(all, atoms, 1).data;
  return priorBias(instructionPrior(e, columnsOf(all, 0, atoms), 1), instruction.strength);
}

interface BankSizes {
  readonly atoms: number;
  readonly queryWidth: number;
  readonly blockLayers: number;
}

function sizesOf({ floats, manifest }: PackedAdapter): BankSizes {
  return {
    atoms: floats.get('atoms')!.shape[0]!,
    queryWidth: floats.get('query')!.shape[0]!,
    blockLayers: manifest.options.blockLayers!,
  };
}

/** Throws INVALID_REQUEST for what could not be served, or does not go with what training goes on from. */
export function checkQueryable(
  recipe: Recipe,
  { blocks }: Pick<DecoderConfig, 'blocks'>,
  { prior = null, ...from }: StartOptions & { readonly prior?: readonly number[] | null },
): void {
  const start = queryableStart(from);
  const { atoms, blockLayers } = queryableChoice(recipe, start);
  const { labels, instruction } = recipe.bank!;
  if ((instruction === null) !== (prior === null)) {
    throw new GatewayError('INTERNAL', 'queryable: an instruction and its prior go together');
  }
  const groups = groupCount([{ block: blocks - 1, projection: 'attn_q' }], blockLayers);
  if (groups > earlierMax + 1) {
    const most = `at most ${earlierMax + 1} are served`;
    refuse('bank.blockLayers', `${blockLayers} makes ${groups} blocks of layers, ${most}`);
  }
  if (labels !== null && labels.length !== atoms) {
    refuse('bank.labels', `${labels.length} labels of ${atoms} atoms`);
  }
  if (start === null) return;
  const { rankMax, modules } = start.adapter.manifest;
  const known = sizesOf(start.bank);
  const keys = start.adapter.floats.get('keys')!.shape[0]!;
  if (rankMax !== recipe.rank) refuse('rank', `${recipe.rank}, the adapter's is ${rankMax}`);
  if (modules.length !== blocks * recipe.targets.length) {
    refuse('targets', `the adapter changes ${modules.length} modules, others than these`);
  }
  if (keys !== known.atoms) {
    refuse('bank', `the adapter has keys for ${keys} of its bank's ${known.atoms} atoms`);
  }
  if (atoms < known.atoms) refuse('bank.atoms', `${atoms}, the bank has ${known.atoms}`);
  for (const name of ['queryWidth', 'blockLayers'] as const) {
    const wanted = recipe.bank![name];
    if (wanted !== null && wanted !== known[name]) {
      refuse(`bank.${name}`, `${wanted}, the bank's is ${known[name]}`);
    }
  }
}

function refuse(param: string, what: string): never {
  throw new GatewayError('INVALID_REQUEST', `${param}: ${what}`, { param });
}

/** Of an adapter whose labels these are. Throws INVALID_ADAPTER where a number is beyond what packed files hold. */
export function queryableFiles(
  choice: QueryableChoice,
  modules: readonly TrainedModule[],
  { labels, baseHash }: { readonly labels: readonly string[]; readonly baseHash: string },
): AdapterFiles {
  const { rank, topK, atoms, queryWidth, blockLayers } = choice;
  const { serve } = queryableGraph(choice).family;
  const tensors = new Map<string, SafetensorsTensor>();
  const put = (name: string, { data }: Columns, shape: readonly number[]): void => {
    tensors.set(name, floatTensor(Float32Array.from(data), shape));
  };
  for (const { site, tensors: own } of modules) {
    const { a, b } = serve(site, own);
    for (const [side, values, width] of [
      ['a', a!, site.in] as const,
      ['b', b!, site.out] as const,
    ]) {
      const name = tensorName(site, side);
      tensors.set(name, halfTensor(halvesOf(values, values.length, name), [rank, width]));
    }
  }
  const { keys, atoms: maps, query, summary, context } = modules[0]!.tensors;
  put('keys', keys!, [atoms, queryWidth]);
  put('bank.atoms', maps!, [atoms, rank, rank]);
  put('bank.query', query!, [queryWidth, rank]);
  put('bank.summary', summary!, [rank, rank]);
  put('bank.context', context!, [queryWidth, rank]);
  const config = {
    ...{ kind: 'queryable', format: 'queryable/1', base_hash: baseHash },
    // α/r is in B.
    ...{ rank, alpha: rank, top_k: topK, labels, bank: { block_layers: blockLayers } },
  };
  return { config: `${JSON.stringify(config)}\n`, bytes: writeSafetensors(tensors) };
}

/** The recipe's, else those that there are; atoms without one are numbered from 1. */
export function labelsOf({ bank }: Recipe, atoms: number, start: PackedAdapter | null): string[] {
  const known = bank!.labels ?? start?.manifest.options.labels ?? [];
  return Array.from({ length: atoms }, (_, k) => known[k] ?? `atom ${k + 1}`);
}

interface StartOptions {
  readonly start: PackedAdapter | null;
  readonly bank?: PackedAdapter | null;
}

/** null where training begins anew. */
export function queryableStart({ start, bank = null }: StartOptions): QueryableStart | null {
  if (start?.manifest.kind !== 'queryable') return null;
  if (bank === null) throw new GatewayError('INTERNAL', 'queryable: an adapter without its bank');
  return { adapter: start, bank };
}
