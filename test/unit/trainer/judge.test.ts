import { afterAll, expect, it } from 'vitest';
import { parseRecipe } from '../../../src/jobs/recipe.ts';
import { openGguf } from '../../../src/model/gguf.ts';
import { scrapCells } from '../../../src/model/step-inputs.ts';
import { createTokenizer, readTokenizerSource } from '../../../src/model/tokenizer.ts';
import { EggrollSession } from '../../../src/trainer/eggroll-session.ts';
import { createJudge, verdictOf } from '../../../src/trainer/judge.ts';
import { scoringOf } from '../../../src/trainer/task-scores.ts';
import { openTiny, tinyPath } from '../../support/open-test-decoder.ts';
import { decided, openTinyBase, tinyEncoder, tinyExamples } from '../../support/training-base.ts';

const base = await openTinyBase();
afterAll(() => base.kernels[Symbol.dispose]());
using file = openGguf(tinyPath);
const question = 'Is that right? Say yes or no.';
const judge = createJudge(file.metadata, question);
const breathe = async (): Promise<void> => {};

it('a question stands behind an answer as the template would write it', () => {
  const messages = (turns: readonly string[]) =>
    turns.map((content, i) => {
      const role = i % 2 === 0 ? ('user' as const) : ('assistant' as const);
      return { role, content, learnt: role === 'assistant' };
    });
  const encode = tinyEncoder(1000);
  const whole = encode({ kind: 'chat', messages: messages(['one', 'two', question, 'yes']) });
  const first = encode({ kind: 'chat', messages: messages(['one', 'two']) });
  const answerEnd = first.learnt.lastIndexOf(1); // the token that ends the answer is the question's
  const verdictAt = whole.learnt.lastIndexOf(0) + 1;
  expect([...judge.suffix]).toEqual([...whole.tokens.slice(answerEnd, verdictAt)]);
});

it('a verdict is how probable yes is, of yes and no in any spelling', () => {
  const { encodeText } = createTokenizer(readTokenizerSource(file.metadata));
  const logits = new Float32Array(base.config.vocabSize).fill(-30);
  for (const token of [...judge.yes, ...judge.no]) expect(logits[token]).toBe(-30);
  expect(judge.yes.has(encodeText('yes', 9)[0]!)).toBe(true);
  expect(judge.no.has(encodeText('NO', 9)[0]!)).toBe(true);
  expect([...judge.yes].some((token) => judge.no.has(token))).toBe(false);
  const [yes] = judge.yes;
  const [no] = judge.no;
  logits[yes!] = 2;
  logits[no!] = 1;
  expect(verdictOf(judge, logits)).toBeCloseTo(1 / (1 + Math.exp(-1)), 6);
  logits.fill(1e30); // nothing overflows
  expect(verdictOf(judge, logits)).toBeCloseTo(judge.yes.size / (judge.yes.size + judge.no.size));
});

it('a run is scored by what the base says of each answer, whatever the adapter has become', async () => {
  const reward = { kind: 'judge', question } as const;
  const sizes = { population: 8, groupSize: 4, sigma: 0.3, answerTokens: 6 };
  const method = { kind: 'eggroll', ...sizes, reward } as const;
  const shape = { windowTokens: 48, stepsMax: 2, learningRate: 0.1 };
  const recipe = decided(parseRecipe({ method, ...shape }, 'recipe'));
  const own = scoringOf(file.metadata, { reward, answerTokens: 6 });
  const seen: { said: readonly number[]; verdict: number }[] = [];
  let said: readonly number[] = [];
  const scoring: typeof own = {
    ...own,
    text: {
      ...own.text,
      textOf(tokens) {
        said = [...tokens];
        return '';
      },
    },
    reward({ verdict }) {
      seen.push({ said, verdict: verdict! });
      return verdict!;
    },
  };
  const training = tinyExamples(1, 48);
  const data = { training, heldOut: training, start: null };
  using session = new EggrollSession({ base, recipe, ...data, scoring });
  while (session.step < 2) await session.takeStep(breathe);
  await session.evaluate(session.publish(), breathe);
  expect(seen).toHaveLength(8 + 8 + 3);
  expect(new Set(seen.map(({ said: answer }) => String(answer))).size).toBeGreaterThan(8);
  expect(new Set(seen.map(({ verdict }) => verdict)).size).toBeGreaterThan(8);

  const { decoder } = await openTiny();
  using _ = decoder;
  const prompt = training[0]!.tokens.slice(0, training[0]!.learnt.indexOf(1));
  for (const { said: answer, verdict } of seen) {
    const tokens = Int32Array.from([...prompt, ...answer, ...judge.suffix]);
    let logits = new Float32Array();
    for (let position = 0; position < tokens.length; position += 64) {
      const segment = { cellBase: scrapCells, position, adapter: null, wantsLogits: true };
      const some = tokens.slice(position, position + 64);
      logits = decoder
        .step([{ ...segment, tokens: some }])
        .logits(0)
        .slice();
    }
    expect(verdictOf(judge, logits)).toBeCloseTo(verdict, 2); // its cells are in f16;
  }
});

it('has no judge without turns', () => {
  const metadata = new Proxy(file.metadata, {
    get(target, key) {
      const value: unknown = Reflect.get(target, key);
      if (typeof value !== 'function') return value;
      return (name: string, ...more: unknown[]) =>
        key === 'has' && name === 'tokenizer.chat_template'
          ? false
          : (value as (...all: unknown[]) => unknown).call(target, name, ...more);
    },
  });
  expect(() => createJudge(metadata, 'x')).toThrow('a judge: the model file has no chat template');
});
