import { describe, expect, it } from 'vitest';
import { parseRecipe, type Recipe } from '../../../src/jobs/recipe.ts';
import { GgmlKernels } from '../../../src/kernels/ggml/ggml-kernels.ts';
import type { StoredTensor } from '../../../src/kernels/kernels.ts';
import type { BlockWeights } from '../../../src/model/decoder.ts';
import {
  type DecoderConfig,
  type Projection,
  projectionShape,
  projections,
} from '../../../src/model/decoder-config.ts';
import { TrainingDecoder } from '../../../src/model/training-decoder.ts';
import { FamilyTraining } from '../../../src/trainer/family-training.ts';
import { bytesOfWeights, estimateMemory } from '../../../src/trainer/memory-estimate.ts';
import { choiceOf, initialTensors } from '../../../src/trainer/publish.ts';

interface Case {
  readonly kind: Recipe['kind'];
  readonly blocks: number;
  readonly width: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly ffnWidth: number;
  readonly vocabSize: number;
  readonly rank: number;
  readonly rankSelection?: Recipe['rankSelection'];
  readonly batchWindows: number;
  readonly windowTokens: number;
  readonly answersMax: number;
  readonly targets: readonly Projection[];
}

const middle: Case = {
  ...{ blocks: 6, width: 192, heads: 6, kvHeads: 2, ffnWidth: 512, vocabSize: 4096 },
  ...{
    kind: 'lora',
    rank: 16,
    batchWindows: 2,
    windowTokens: 128,
    answersMax: 256,
    targets: projections,
  },
};
const cases: Readonly<Record<string, Partial<Case>>> = {
  'a middling model': {},
  'few logits': { answersMax: 16 },
  'a large vocabulary': { vocabSize: 20_000 },
  'long windows': { windowTokens: 512, batchWindows: 1, answersMax: 64 },
  'many ranks': { rank: 64, answersMax: 32 },
  'one block': { blocks: 1, ffnWidth: 256 },
  'few targets': { targets: ['attn_q', 'attn_v'], answersMax: 32 },
  'many blocks': { blocks: 16, kvHeads: 6, answersMax: 100 },
  'a lora with gates': { rankSelection: { kind: 'codyra', denseShare: 0, thresholdMax: 1 } },
  hydra: { kind: 'hydra' },
  triangular: { kind: 'triangular' },
  fly: { kind: 'fly', rank: 32 },
  mora: { kind: 'mora' },
  flexmore: { kind: 'flexmore' },
  queryable: { kind: 'queryable', answersMax: 32 },
  'queryable, many ranks': { kind: 'queryable', rank: 64 },
};

function measure(sizes: Case, recompute: boolean): { estimate: number; measured: number } {
  const { kind, rank, batchWindows, windowTokens, answersMax, targets, ...more } = sizes;
  const { rankSelection = null, ...model } = more;
  const headSize = sizes.width / sizes.heads;
  const config: DecoderConfig = {
    ...{ ...model, headSize, family: 'llama', name: 'sizes', contextLength: 4096 },
    ...{ ropeSize: headSize, ropeBase: 1e4, ropeStyle: 'norm', normEps: 1e-5 },
    tiedEmbeddings: true,
  };
  using kernels = new GgmlKernels({ threads: 1 });
  const store = (...shape: number[]): StoredTensor => kernels.store('f32', shape);
  const blocks = Array.from({ length: config.blocks }, () => {
    const matrices = projections.map((name) => {
      const shape = projectionShape(config, name);
      return [name, store(shape.out, shape.in)];
    });
    const norms = ['attn_norm', 'ffn_norm'].map((name) => [name, store(config.width)]);
    return Object.fromEntries([...matrices, ...norms]) as BlockWeights;
  });
  const tokenEmbedding = store(config.vocabSize, config.width);
  const outputNorm = store(config.width);
  const weights = { tokenEmbedding, output: tokenEmbedding, outputNorm, blocks };
  const recipe = { kind, rank, rankSelection, targets, batchWindows, windowTokens, recompute };
  const { delta, numbers } = trained(config, recipe);
  using _ = new TrainingDecoder({
    ...{ config, weights, kernels, answersMax, recompute },
    delta,
    ...{ windows: batchWindows, windowRows: windowTokens },
  });
  const weightBytes = bytesOfWeights(weights);
  const { scratch } = estimateMemory({
    config,
    recipe,
    answersMax,
    weightBytes,
    optimizerBytes: 0,
    numbers,
  });
  return { estimate: scratch, measured: kernels.scratchBytes };
}

/** As the recipe's session makes it. */
function trained(
  config: DecoderConfig,
  {
    kind,
    rank,
    rankSelection,
    targets,
  }: Pick<Recipe, 'kind' | 'rank' | 'rankSelection' | 'targets'>,
): FamilyTraining {
  const experts = [3, 1].map((part) => ({ name: `of ${part}`, rank: (part * rank) / 4 }));
  const more = { topK: Math.ceil(rank / 4), ...(kind === 'flexmore' ? { experts } : {}) };
  const recipe = parseRecipe(
    { kind, rank, rankSelection, ...(kind === 'queryable' ? {} : more) },
    'recipe',
  );
  const weight = (): never => {
    throw new Error('no weight is wanted');
  };
  const modules = Array.from({ length: config.blocks }, (_, block) =>
    targets.map((projection) => {
      const site = { block, projection, ...projectionShape(config, projection), weight };
      return { site, tensors: initialTensors(recipe, site) };
    }),
  ).flat();
  return new FamilyTraining(choiceOf(recipe), modules);
}

describe('the memory of training, before it is taken', () => {
  for (const [name, more] of Object.entries(cases)) {
    for (const recompute of more.kind === 'queryable' ? [false] : [false, true]) {
      it(`is within a tenth: ${name}, ${recompute ? 'computed again' : 'kept'}`, () => {
        const { estimate, measured } = measure({ ...middle, ...more }, recompute);
        expect(Math.abs(estimate / measured - 1), `${estimate} for ${measured}`).toBeLessThan(0.1);
      });
    }
  }
});
