// What the fields of a recipe may not be together: what could not be trained, or not be published.

import { rankMaxLimit } from '../adapters/adapter.ts';
import type { Recipe } from './recipe.ts';

type Rule = readonly [isKept: boolean, path: string, message: string];

/** Windows × tokens that are computed at once: a guess at what no machine of ours holds more of. */
const batchRowsMax = 65_536;

/** The first rule that is broken: its path and what is wrong. */
export function conflict(recipe: Recipe): readonly [path: string, message: string] | null {
  const { kind, rank: most, ranks, objective, order, scaling, levels, targets } = recipe;
  const { name } = recipe.optimizer;
  const { accumulation, batchSchedule: schedule } = recipe;
  const rows = recipe.batchWindows * recipe.windowTokens;
  const isRising = ranks.every((q, i) => q > (ranks[i - 1] ?? 0)) && ranks.at(-1) === most;
  const trainsSum = objective === 'diag' || objective === 'binary';
  const hasOneScale = kind === 'lora' || scaling === 'none';
  const rules: readonly Rule[] = [
    [isRising, 'ranks', `must rise to rank, ${most}: ranks above them would never train`],
    [new Set(targets).size === targets.length, 'targets', 'names a projection twice'],
    ...rankRules(recipe),
    ...kindRules(recipe),
    ...familyRules(recipe),
    ...eggrollRules(recipe),
    [
      !(order === 'as-trained' && trainsSum),
      'order',
      `as-trained: ${objective} trains a sum of prefixes, and none as it is served`,
    ],
    [!(order === 'as-published' && kind === 'lora'), 'order', 'as-published is matryoshka’s'],
    [
      order === 'svd' || hasOneScale,
      'order',
      `${order} with scaling ${scaling}: packed ranks have no scale of their own`,
    ],
    [order === 'svd' || levels === 'uniform', 'levels', `energy needs order svd, not ${order}`],
    [
      schedule === null || (accumulation >= 2 && accumulation <= schedule.max),
      'accumulation',
      'adadagrad compares 2 micro-batches or more, and at most batchSchedule.max',
    ],
    [
      schedule === null || (objective !== 'multi' && objective !== 'sandwich'),
      'batchSchedule.kind',
      `adadagrad wants one pass a micro-batch, ${objective} has several`,
    ],
    [
      kind === 'lora' || recipe.regularizer === null,
      'regularizer.kind',
      'trp wants one scale for all ranks, as kind lora has',
    ],
    [
      kind === 'lora' || !name.startsWith('lora-pro'),
      'optimizer.name',
      `${name} wants one scale for all ranks, as kind lora has`,
    ],
    [rows <= batchRowsMax, 'batchWindows', `${rows} rows at once, at most ${batchRowsMax}`],
  ];
  const broken = rules.find(([isKept]) => !isKept);
  return broken === undefined ? null : [broken[1], broken[2]];
}

/** What belongs to some kinds only. */
function kindRules(recipe: Recipe): readonly Rule[] {
  const { kind, rank: most, objective, order } = recipe;
  const isPlain = kind !== 'matryoshka';
  return [
    [kind === 'queryable' || recipe.topK <= most, 'topK', `${recipe.topK} of ${most} ranks`],
    [
      recipe.rankGrowth === null ||
        (kind === 'triangular' && most >= 2 && 2 * most <= rankMaxLimit),
      'rankGrowth',
      `is triangular's, of ranks 2 to ${rankMaxLimit / 2}`,
    ],
    [isPlain === (objective === 'plain'), 'objective', `${objective} is not ${kind}'s`],
    [
      kind === 'lora' || recipe.init.kind === 'kaiming',
      'init.kind',
      `eva is lora's, not ${kind}'s`,
    ],
    [
      kind === 'lora' || recipe.modules === 'all',
      'modules.kind',
      `diffora is lora's, not ${kind}'s`,
    ],
    [
      recipe.modules === 'all' || recipe.init.kind === 'kaiming',
      'modules.kind',
      'diffora beside eva, which gives ranks to modules already',
    ],
    [
      kind === 'lora' || !isPlain || order === 'svd',
      'order',
      `${kind} is published in the order of its SVD, not ${order}`,
    ],
  ];
}

/** Of queryable's bank and flexmore's experts. */
function familyRules(recipe: Recipe): readonly Rule[] {
  const { kind, rank, ranks, topK, bank, experts, targets, recompute } = recipe;
  const isQueryable = kind === 'queryable';
  const sum = experts?.reduce((all, expert) => all + expert.rank, 0) ?? rank;
  const atoms = bank?.atoms ?? topK;
  return [
    [isQueryable || bank === null, 'bank', `is queryable's, not ${kind}'s`],
    [!isQueryable || topK <= atoms, 'topK', `${topK} of ${atoms} atoms`],
    [!isQueryable || targets.includes('attn_q'), 'targets', 'queryable chooses by attn_q'],
    [!isQueryable || ranks.length === 1, 'ranks', 'queryable mixes all ranks and has no prefixes'],
    [!isQueryable || !recompute, 'recompute', 'queryable looks back at earlier blocks'],
    [(kind === 'flexmore') === (experts !== null), 'experts', 'flexmore has them, and it alone'],
    [rank === sum, 'rank', `${rank}, the experts have ${sum} together`],
    [rank <= rankMaxLimit, 'experts', `have ${rank} ranks together, at most ${rankMaxLimit}`],
  ];
}

/** What members of a generation are: rows of the serving decoder, with pages of 8 ranks of their own and of noise. */
function eggrollRules({ method, ...recipe }: Recipe): readonly Rule[] {
  if (method === 'gradient') return [];
  const { population, groupSize } = method;
  const { kind, init, modules, regularizer, batchSchedule, scaling } = recipe;
  const isLora = kind === 'lora' && init.kind === 'kaiming' && modules === 'all';
  const isPlain = regularizer === null && batchSchedule === null && scaling === 'none';
  return [
    [
      groupSize % 2 === 0 && population % groupSize === 0,
      'method.groupSize',
      `${population} members are no groups of ${groupSize}, each of whole pairs`,
    ],
    [isLora, 'method.kind', 'eggroll trains kind lora, init kaiming, modules all'],
    [isPlain, 'method.kind', 'eggroll has no regularizer, no batchSchedule, and scaling none'],
    [recipe.rank <= rankMaxLimit - 8, 'rank', 'a row of eggroll has 8 ranks of noise beside it'],
  ];
}

/** codyra, squeeze and coso each want a plain run of plain pairs for themselves. */
function rankRules(recipe: Recipe): readonly Rule[] {
  const { kind, method, init, modules, regularizer, rankSelection, squeeze, continual } = recipe;
  const given = Object.entries({ rankSelection, squeeze, continual }).flatMap(([path, value]) =>
    value === null ? [] : [{ path, name: value.kind }],
  );
  const isPlain =
    kind === 'lora' &&
    method === 'gradient' &&
    init.kind === 'kaiming' &&
    modules === 'all' &&
    regularizer === null;
  const wanted = 'kind lora, method gradient, init kaiming, modules all and no regularizer';
  return [
    ...given.map(({ path, name }): Rule => [isPlain, `${path}.kind`, `${name} wants ${wanted}`]),
    ...given
      .slice(1)
      .map(({ path, name }): Rule => [false, `${path}.kind`, `${name} beside ${given[0]!.name}`]),
    ...optionRules(recipe),
  ];
}

function optionRules(recipe: Recipe): readonly Rule[] {
  const { rank, order, weightDecay, rankSelection, squeeze, continual } = recipe;
  const { name } = recipe.optimizer;
  const isLoraPro = name.startsWith('lora-pro');
  const from = squeeze === null || squeeze.kind === 'cont' ? rank + 1 : squeeze.from;
  return [
    [rankSelection === null || !isLoraPro, 'optimizer.name', `${name} knows no gates: codyra`],
    [from > rank, 'squeeze.from', `${from} ranks are to become ${rank}: more are wanted`],
    [squeeze === null || order === 'svd', 'order', `${order}: what is cut is in the order of svd`],
    [
      squeeze?.kind !== 'anneal' || !(isLoraPro || name === 'dct-adamw'),
      'optimizer.name',
      `${name} moves ranks together: those that anneal takes away would come back`,
    ],
    [continual === null || name === 'adamw', 'optimizer.name', `coso steps as adamw, not ${name}`],
    [continual === null || weightDecay === 0, 'weightDecay', 'would forget what coso keeps'],
  ];
}
