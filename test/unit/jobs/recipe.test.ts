import { describe, expect, it } from 'vitest';
import type { GatewayError } from '../../../src/errors.ts';
import { parseRecipe } from '../../../src/jobs/recipe.ts';

function refusal(json: unknown): Pick<GatewayError, 'code' | 'message'> {
  try {
    parseRecipe(json, 'recipe');
  } catch (error) {
    const { code, message } = error as GatewayError;
    return { code, message };
  }
  throw new Error(`accepted: ${JSON.stringify(json)}`);
}

function lora(more: object): object {
  return { kind: 'lora', ...more };
}

function eggroll(more: object): object {
  return { method: { kind: 'eggroll', reward: { kind: 'full-stop' }, ...more } };
}

describe('a recipe', () => {
  it('has a default for everything, and is its own default once it is whole', () => {
    const recipe = parseRecipe({}, 'recipe');
    expect(recipe).toMatchObject({
      kind: 'matryoshka',
      rank: 16,
      ranks: [1, 2, 4, 8, 16],
      objective: 'diag',
      order: 'svd',
      scaling: 'sqrt',
    });
    expect(parseRecipe(JSON.parse(JSON.stringify(recipe)), 'recipe')).toEqual(recipe);
  });

  it.each([
    ['lora', 'plain', 'svd'],
    ['matryoshka', 'diag', 'svd'],
    ['matryoshka', 'binary', 'svd'],
    ['matryoshka', 'dylora', 'as-trained'],
    ['matryoshka', 'multi', 'as-trained'],
    ['matryoshka', 'sandwich', 'as-trained'],
  ])('orders the ranks of %s %s %s unless told otherwise', (kind, objective, order) => {
    expect(parseRecipe({ kind, objective }, 'recipe').order).toBe(order);
    expect(parseRecipe({ kind, objective, order: 'svd' }, 'recipe').order).toBe('svd');
  });

  it('of queryable has a bank, one rank, and blocks that look back', () => {
    const recipe = parseRecipe({ kind: 'queryable', rank: 8, bank: { atoms: 1 } }, 'recipe');
    expect(recipe).toMatchObject({ ranks: [8], topK: 1, recompute: false });
    const { bank, topK } = parseRecipe({ kind: 'queryable' }, 'recipe');
    const open = { atoms: null, queryWidth: null, blockLayers: null, labels: null };
    const weights = { balance: 1e-2, denseShare: 0.1, instruction: null };
    expect([bank, topK]).toEqual([{ ...open, ...weights }, 2]);
    expect(parseRecipe(JSON.parse(JSON.stringify(recipe)), 'recipe')).toEqual(recipe);
  });

  it('of flexmore has the ranks of its experts together', () => {
    const experts = [3, 9].map((rank) => ({ name: `of ${rank}`, rank }));
    const recipe = parseRecipe({ kind: 'flexmore', experts }, 'recipe');
    expect(recipe).toMatchObject({ rank: 12, ranks: [1, 2, 4, 8, 12], experts, bank: null });
    expect(parseRecipe(JSON.parse(JSON.stringify(recipe)), 'recipe')).toEqual(recipe);
  });

  it('takes S up to a rank that is no power of two', () => {
    expect(parseRecipe({ rank: 12 }, 'recipe').ranks).toEqual([1, 2, 4, 8, 12]);
    expect(parseRecipe({ rank: 1 }, 'recipe').ranks).toEqual([1]);
  });

  it.each([
    [{ kind: 'sara' }, 'recipe.kind: sara'],
    [{ init: { kind: 'meta', anything: 1 } }, 'recipe.init.kind: meta'],
  ])('refuses what is not built by its name: %j', (json, start) => {
    const { code, message } = refusal(json);
    expect(code).toBe('UNSUPPORTED');
    expect(message).toBe(`${start} is not in this build`);
  });

  it.each([
    [{ surprise: 1 }, 'recipe: '],
    [{ rank: 0 }, 'recipe.rank: '],
    [{ rank: 257 }, 'recipe.rank: '],
    [{ rank: '16' }, 'recipe.rank: '],
    [{ learningRate: 0 }, 'recipe.learningRate: '],
    [{ kind: 'fly', rankSelection: { kind: 'codyra' } }, 'recipe.rankSelection.kind: codyra wants'],
    [
      lora({ kind: 'matryoshka', continual: { kind: 'coso' } }),
      'recipe.continual.kind: coso wants',
    ],
    [lora({ squeeze: { kind: 'post', from: 32 }, init: { kind: 'eva' } }), 'recipe.squeeze.kind: '],
    [
      lora({ continual: { kind: 'coso' }, regularizer: { kind: 'trp' } }),
      'recipe.continual.kind: ',
    ],
    [
      lora({ rankSelection: { kind: 'codyra' }, continual: { kind: 'coso' } }),
      'recipe.continual.kind: coso beside codyra',
    ],
    [
      { ...eggroll({}), rankSelection: { kind: 'codyra' } },
      'recipe.rankSelection.kind: codyra wants',
    ],
    [
      lora({ rankSelection: { kind: 'codyra', thresholdMax: 0 } }),
      'recipe.rankSelection.threshold',
    ],
    [
      lora({ rankSelection: { kind: 'codyra' }, optimizer: { name: 'lora-pro' } }),
      'recipe.optimizer.name: ',
    ],
    [lora({ squeeze: { kind: 'anneal' } }), 'recipe.squeeze.from: '],
    [lora({ squeeze: { kind: 'anneal', from: 16 } }), 'recipe.squeeze.from: 16 ranks are to'],
    [lora({ squeeze: { kind: 'in', from: 32 } }), 'recipe.squeeze.kind: '],
    [lora({ squeeze: { kind: 'post', from: 32 }, order: 'as-trained' }), 'recipe.order: '],
    [
      lora({ squeeze: { kind: 'anneal', from: 32 }, optimizer: { name: 'dct-adamw' } }),
      'recipe.optimizer.name: dct-adamw moves ranks together',
    ],
    [lora({ continual: { kind: 'coso' }, optimizer: { name: 'sgd' } }), 'recipe.optimizer.name: '],
    [lora({ continual: { kind: 'coso' }, weightDecay: 0.1 }), 'recipe.weightDecay: '],
    [{ learningRate: Number.NaN }, 'recipe.learningRate: '],
    [{ optimizer: { name: 'adamw', beta1: 1 } }, 'recipe.optimizer.beta1: '],
    [{ optimizer: { name: 'adamw', momentum: 0.5 } }, 'recipe.optimizer: '],
    [{ optimizer: { name: 'adam' } }, 'recipe.optimizer.name: '],
    [{ targets: [] }, 'recipe.targets: '],
    [{ targets: ['attn_q', 'attn_q'] }, 'recipe.targets: '],
    [{ targets: ['lm_head'] }, 'recipe.targets.0: '],
    [{ rank: 8, ranks: [4, 2, 8] }, 'recipe.ranks: '],
    [{ rank: 8, ranks: [1, 2, 4] }, 'recipe.ranks: '],
    [{ rank: 8, ranks: [1, 16] }, 'recipe.ranks: '],
    [{ kind: 'lora', objective: 'multi' }, 'recipe.objective: '],
    [{ kind: 'fly', objective: 'diag' }, 'recipe.objective: '],
    [{ kind: 'fly', rank: 8, topK: 9 }, 'recipe.topK: '],
    [{ kind: 'hydra', rankGrowth: {} }, 'recipe.rankGrowth: '],
    [{ kind: 'triangular', rank: 129, rankGrowth: {} }, 'recipe.rankGrowth: '],
    [{ kind: 'hydra', order: 'as-trained' }, 'recipe.order: '],
    [{ kind: 'lora', bank: {} }, 'recipe.bank: '],
    [{ kind: 'queryable', bank: { atoms: 2 }, topK: 3 }, 'recipe.topK: '],
    [{ kind: 'queryable', bank: { atoms: 257 } }, 'recipe.bank.atoms: '],
    [{ kind: 'queryable', bank: { labels: [''] } }, 'recipe.bank.labels.0: '],
    [{ kind: 'queryable', targets: ['attn_v'] }, 'recipe.targets: '],
    [{ kind: 'queryable', rank: 8, ranks: [1, 8] }, 'recipe.ranks: '],
    [{ kind: 'queryable', recompute: true }, 'recipe.recompute: '],
    [{ kind: 'queryable', init: { kind: 'eva' } }, 'recipe.init.kind: '],
    [{ kind: 'flexmore' }, 'recipe.experts: '],
    [{ kind: 'lora', experts: [{ name: 'one', rank: 16 }] }, 'recipe.experts: '],
    [{ kind: 'flexmore', rank: 8, experts: [{ name: 'one', rank: 4 }] }, 'recipe.rank: '],
    [
      { kind: 'flexmore', experts: [200, 100].map((rank) => ({ name: `${rank}`, rank })) },
      'recipe.experts: ',
    ],
    [{ kind: 'mora', init: { kind: 'eva' } }, 'recipe.init.kind: '],
    [{ kind: 'lora', init: { kind: 'eva', rho: 0.5 } }, 'recipe.init.rho: '],
    [{ modules: { kind: 'diffora' } }, 'recipe.modules.kind: '],
    [
      { kind: 'lora', modules: { kind: 'diffora' }, init: { kind: 'eva' } },
      'recipe.modules.kind: ',
    ],
    [{ objective: 'plain' }, 'recipe.objective: '],
    [{ objective: 'diag', order: 'as-trained' }, 'recipe.order: '],
    [{ objective: 'diag', order: 'as-published', scaling: 'sqrt' }, 'recipe.order: '],
    [{ objective: 'multi', scaling: 'rank' }, 'recipe.order: '],
    [{ kind: 'lora', order: 'as-published' }, 'recipe.order: '],
    [{ objective: 'multi', levels: 'energy' }, 'recipe.levels: '],
    [{ optimizer: { name: 'lora-pro' } }, 'recipe.optimizer.name: '],
    [{ batchWindows: 256, windowTokens: 512 }, 'recipe.batchWindows: '],
    [{ heldOutShare: 0.6 }, 'recipe.heldOutShare: '],
    [{ method: 'eggroll' }, 'recipe.method: '],
    [eggroll({ reward: { kind: 'applause' } }), 'recipe.method'],
    [eggroll({ noiseRank: 3 }), 'recipe.method'],
    [eggroll({ population: 30, groupSize: 3 }), 'recipe.method.groupSize: '],
    [eggroll({ population: 30, groupSize: 8 }), 'recipe.method.groupSize: '],
    [{ ...eggroll({}), kind: 'fly' }, 'recipe.method.kind: '],
    [{ ...eggroll({}), init: { kind: 'eva' } }, 'recipe.method.kind: '],
    [{ ...eggroll({}), modules: { kind: 'diffora' } }, 'recipe.method.kind: '],
    [{ ...eggroll({}), regularizer: { kind: 'trp' } }, 'recipe.method.kind: '],
    [{ ...eggroll({}), scaling: 'sqrt' }, 'recipe.method.kind: '],
    [{ ...eggroll({}), rank: 249 }, 'recipe.rank: '],
    [{ seed: -1 }, 'recipe.seed: '],
    [null, 'recipe: '],
    [[], 'recipe: '],
  ])('refuses %j, naming the field', (json, start) => {
    const { code, message } = refusal(json);
    expect(code).toBe('INVALID_REQUEST');
    expect(message.startsWith(start), message).toBe(true);
  });

  it('has defaults of its own for a run by scores', () => {
    const recipe = parseRecipe(eggroll({}), 'recipe');
    expect(recipe).toMatchObject({ kind: 'lora', objective: 'plain', clipNorm: null });
    expect(recipe).toMatchObject({ stepsMax: 50, optimizer: { name: 'sgd' } });
    expect(recipe.method).toMatchObject({ population: 16, groupSize: 4, noiseRank: 1 });
    expect(parseRecipe(JSON.parse(JSON.stringify(recipe)), 'recipe')).toEqual(recipe);
    expect(parseRecipe({ ...eggroll({}), stepsMax: 7, rank: 8 }, 'recipe')).toMatchObject({
      ...{ stepsMax: 7, ranks: [1, 2, 4, 8] },
    });
  });

  it('has the published numbers of codyra and coso, and codyra’s ranks in the order of their gates', () => {
    const codyra = parseRecipe(lora({ rankSelection: { kind: 'codyra' } }), 'recipe');
    expect(codyra.rankSelection).toEqual({ kind: 'codyra', denseShare: 0.5, thresholdMax: 0.005 });
    expect(codyra.order).toBe('as-trained');
    const coso = parseRecipe(lora({ continual: { kind: 'coso' } }), 'recipe');
    expect(coso.continual).toMatchObject({ directions: 16, gap: 20, energy: 0.98 });
    expect(coso.order).toBe('svd');
    for (const recipe of [codyra, coso]) {
      expect(parseRecipe(JSON.parse(JSON.stringify(recipe)), 'recipe')).toEqual(recipe);
    }
  });

  it('takes lora-pro where all ranks have one scale', () => {
    const { optimizer } = parseRecipe({ kind: 'lora', optimizer: { name: 'lora-pro' } }, 'recipe');
    expect(optimizer).toEqual({
      name: 'lora-pro',
      beta1: 0.9,
      beta2: 0.999,
      epsilon: 1e-8,
      damping: 1e-8,
    });
  });
});
