// OpenAI's graders of reinforcement fine-tuning → rewards that a recipe can name; what there is no reward for is refused by
// name. Of templates there are the answer, {{sample.output_text}}, and what the line has as its answer: {{item.reference_answer}}
// behind messages, {{item.completion}} behind a prompt.

import { z } from 'zod';
import { GatewayError } from '../errors.ts';
import {
  checkOperations,
  type RewardRecipe,
  type SingleReward,
  similarityMetrics,
} from '../jobs/reward-recipe.ts';
import { invalidRequest } from './problem.ts';
import { fewEntries, parseBody } from './schemas.ts';

type Path = readonly [string, ...string[]];
const where: Path = ['method', 'reinforcement', 'grader'];

const text = z.string().min(1).max(1024);
const compared = {
  type: z.string(),
  name: z.string().min(1).max(64),
  input: text,
  reference: text,
};
const stringCheck = z.strictObject({ ...compared, operation: z.enum(checkOperations) });
const textSimilarity = z.strictObject({ ...compared, evaluation_metric: z.string().max(64) });
const multi = z.strictObject({
  type: z.string(),
  name: z.string().min(1).max(64),
  graders: fewEntries(8),
  calculate_output: text,
});
const typed = z.looseObject({ type: z.string().max(64) });

/** Throws UNSUPPORTED or INVALID_REQUEST that names the field. */
export function rewardOfGrader(grader: unknown): RewardRecipe {
  if (parseBody(typed, grader, where).type !== 'multi') return singleOf(grader, where);
  const { graders, calculate_output: formula } = parseBody(multi, grader, where);
  const weights = weightsOf(formula, Object.keys(graders));
  const parts = Object.entries(graders).map(([name, one]) => ({
    weight: weights.get(name)!,
    reward: singleOf(one, [...where, 'graders', name]),
  }));
  return { kind: 'weighted', parts };
}

function singleOf(grader: unknown, at: Path): SingleReward {
  const { type } = parseBody(typed, grader, at);
  switch (type) {
    case 'string_check': {
      const { operation, ...texts } = parseBody(stringCheck, grader, at);
      return { kind: 'check', operation, reference: referenceOf(texts, at) };
    }
    case 'text_similarity': {
      const { evaluation_metric: name, ...texts } = parseBody(textSimilarity, grader, at);
      const metric = similarityMetrics.find((one) => one === name);
      if (metric !== undefined)
        return { kind: 'similarity', metric, reference: referenceOf(texts, at) };
      throw unsupported([...at, 'evaluation_metric'], name, `want ${similarityMetrics.join(', ')}`);
    }
    default: {
      const more = at === where ? ' or multi' : '';
      const wanted = `want string_check, text_similarity${more}; for a judge, rankgate.method`;
      throw unsupported([...at, 'type'], type, wanted);
    }
  }
}

const answer = /^\s*\{\{\s*sample\.output_text\s*\}\}\s*$/;
const ownAnswer = /^\s*\{\{\s*item\.(?:reference_answer|completion)\s*\}\}\s*$/;

/** null: the line's own. */
function referenceOf(
  { input, reference }: { readonly input: string; readonly reference: string },
  at: Path,
): string | null {
  if (!answer.test(input))
    throw unsupported([...at, 'input'], input, 'want {{sample.output_text}}');
  if (ownAnswer.test(reference)) return null;
  if (!reference.includes('{{')) return reference;
  const wanted = 'want a text, {{item.reference_answer}} or {{item.completion}}';
  throw unsupported([...at, 'reference'], reference, wanted);
}

const factor = String.raw`\d{1,6}(?:\.\d{1,9})?`;
const term = new RegExp(
  String.raw`^(?:(${factor})\s*\*\s*)?([A-Za-z_]\w*)(?:\s*([*/])\s*(${factor}))?$`,
);

/** Of a sum of graders, each by a number. */
function weightsOf(formula: string, names: readonly string[]): ReadonlyMap<string, number> {
  const at: Path = [...where, 'calculate_output'];
  const weights = new Map(names.map((name) => [name, 0]));
  for (const one of formula.split('+')) {
    const [, before = 1, name = '', sign, after = 1] = term.exec(one.trim()) ?? [];
    const known = weights.get(name);
    if (known === undefined) {
      throw unsupported(at, one.trim(), 'want a sum of graders, each by a number');
    }
    const by = sign === '/' ? 1 / Number(after) : Number(after);
    weights.set(name, known + Number(before) * by);
  }
  const idle = names.find((name) => !(weights.get(name)! > 0));
  const total = [...weights.values()].reduce((sum, weight) => sum + weight, 0);
  const refuse = (what: string): GatewayError =>
    invalidRequest(`${at.join('.')}: ${what}`, at.join('.'));
  if (idle !== undefined) throw refuse(`${idle} has no weight`);
  // Scores are 0 to 1, and so is what is made of them.
  if (total > 1 + 1e-9) throw refuse(`weights add up to ${total}, want at most 1`);
  return weights;
}

function unsupported(at: Path, got: string, wanted: string): GatewayError {
  const param = at.join('.');
  return new GatewayError('UNSUPPORTED', `${param}: ${got.slice(0, 64)}: ${wanted}`, { param });
}
