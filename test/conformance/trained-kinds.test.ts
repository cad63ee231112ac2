import { afterAll, describe, expect, it } from 'vitest';
import type { PackedAdapter } from '../../src/adapters/pack.ts';
import { atomLogits } from '../../src/engine/instruction-prior.ts';
import type { RankLoss } from '../../src/jobs/messages.ts';
import { trainedKinds } from '../../src/jobs/recipe.ts';
import { openGguf } from '../../src/model/gguf.ts';
import { createTokenizer, readTokenizerSource } from '../../src/model/tokenizer.ts';
import { priorOf } from '../../src/trainer/atom-bank.ts';
import type { Example } from '../../src/trainer/examples.ts';
import { TrainingSession } from '../../src/trainer/session.ts';
import { openTiny, tinyPath } from '../support/open-test-decoder.ts';
import { importFiles, rowsOf } from '../support/served-adapter.ts';
import { openTinyBase, tinyExamples, tinyRecipe } from '../support/training-base.ts';

// What was trained is what is served: each kind is trained for some steps, published, imported and loaded into a decoder, whose
// probabilities of single tokens are those of the training's own forward pass. A and B are halves in the file, and in that
// pass too.

const served = await openTiny({ native: true, pages: 8 });
afterAll(() => served.decoder[Symbol.dispose]());
const breathe = async (): Promise<void> => {};
const examples = tinyExamples(12, 48);

/** Only its token at `place` is learnt. */
function askedAt({ tokens }: Example, place: number): Example {
  return { tokens, learnt: Uint8Array.from(tokens, (_, i) => Number(i === place)) };
}

const labels = ['one', 'two', 'the model', 'a question', 'four'];
const instruction = { text: 'two answers', strength: 3 };
const bank = { atoms: 5, queryWidth: 6, blockLayers: 1 };
const experts = [2, 6].map((rank) => ({ name: `of ${rank}`, rank }));
const more: Readonly<Record<string, object>> = {
  fly: { scaling: 'none' },
  mora: { topK: 3 },
  svfit: { learningRate: 0.1 },
  flexmore: { experts },
  // Two groups of one block each: the second looks back at the first.
  queryable: { bank, topK: 2 },
};
const cases: ReadonlyArray<readonly [name: string, more: object]> = [
  ...trainedKinds.map((kind) => [kind, { kind, ...more[kind] }] as const),
  ['queryable, all layers at once', { kind: 'queryable', bank: { ...bank, blockLayers: 2 } }],
  ['queryable, no whole page', { kind: 'queryable', bank, rank: 6, topK: 5 }],
  ['queryable, an instruction', { kind: 'queryable', bank: { ...bank, labels, instruction } }],
  ['queryable, few targets', { kind: 'queryable', bank, targets: ['attn_q', 'ffn_down'] }],
];

/** λ·log p of the instruction's words, by what the imported file says of its labels. */
function askedFor({ floats }: PackedAdapter): number[] {
  using file = openGguf(tinyPath);
  const tokenizer = createTokenizer(readTokenizerSource(file.metadata));
  const words = served.decoder.embeddings(tokenizer.encodeText(instruction.text, 64));
  return atomLogits(words, floats.get('labels')!, instruction.strength);
}

describe('a decoder serves what was trained', () => {
  it.each(cases)('%s', async (name, own) => {
    const base = await openTinyBase();
    using _ = base.kernels;
    const recipe = tinyRecipe({
      ...{ rank: 8, stepsMax: 25, learningRate: 3e-2, schedule: 'constant', warmupShare: 0 },
      ...own,
    });
    using file = openGguf(tinyPath);
    const prior = priorOf(recipe, { start: null }, { file, width: base.config.width });
    const open = (heldOut: readonly Example[]): TrainingSession =>
      new TrainingSession({ base, recipe, training: examples, heldOut, start: null, prior });
    using session = open(examples.slice(0, 1));
    while (session.step < 25) await session.takeStep(breathe);
    const imported = await importFiles(session.files(), base);
    const rows = await rowsOf(imported, served.decoder, {
      baseHash: base.hash,
      // As the engine makes it of a request.
      atomBias: prior === null ? null : askedFor(imported.adapter),
    });
    const logOf = (example: Example, place: number, adapter: typeof rows | null): number => {
      const tokens = example.tokens.subarray(0, place);
      const segment = { tokens, cellBase: 16, position: 0, adapter, wantsLogits: true };
      const logits = served.decoder.step([segment]).logits(0);
      const top = Math.max(...logits);
      const mass = logits.reduce((sum, logit) => sum + Math.exp(logit - top), 0);
      return logits[example.tokens[place]!]! - top - Math.log(mass);
    };
    const away: number[] = [];
    // Each session finds its base's singular vectors anew.
    const few = name === 'salt' || name === 'svfit';
    for (const example of examples.slice(0, few ? 1 : 3)) {
      for (const place of few ? [5] : [1, 5, example.tokens.length - 1]) {
        using asked = open([askedAt(example, place)]);
        asked.restore({ ...session.checkpoint(), run: asked.run });
        const [{ loss }] = (await asked.evaluate(asked.files(), breathe)).slice(-1) as [RankLoss];
        const log = logOf(example, place, rows);
        expect(Math.abs(log + loss), `${name} at ${place}`).toBeLessThan(1e-4);
        away.push(Math.abs(log - logOf(example, place, null)));
      }
    }
    // The base alone would be far off.
    expect(Math.max(...away)).toBeGreaterThan(0.2);
    if (prior === null) return;
    // And so would be a request that says nothing of the instruction.
    const silent = await rowsOf(imported, served.decoder, { baseHash: base.hash });
    const [first] = examples as [Example];
    expect(Math.abs(logOf(first, 5, silent) - logOf(first, 5, rows))).toBeGreaterThan(1e-2);
  });
});
