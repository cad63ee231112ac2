// DiffoRA's search before a run (diffora.ts): pairs in all targets learn from the training examples, their modules' gates from the
// held-out ones, a step each in turn. Only which modules stay is kept; the run begins anew with them. The same recipe, base
// and files give the same modules, so a run that goes on searches again.

import { scaleOf } from '../adapters/families/matryoshka.ts';
import { GatewayError } from '../errors.ts';
import { moduleIndex } from '../model/decoder-config.ts';
import { TrainingDecoder } from '../model/training-decoder.ts';
import { gatedRows, throughGates } from './codyra.ts';
import { ModuleSearch } from './diffora.ts';
import { FamilyTraining } from './family-training.ts';
import { createOptimizer, type Parameter } from './optimizers/optimizer.ts';
import { answersIn, type Layout, layOut, packWindows } from './packing.ts';
import { choiceOf } from './publish.ts';
import type { Breathe, RunRecipe, SessionOptions } from './session.ts';
import { startModules } from './start.ts';
import { inGroups, planSteps } from './step-plan.ts';

/** φ's own, and T. */
const gateRate = 1e-2;
const temperature = 1;
const adamw = { name: 'adamw', beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weightDecay: 0 } as const;

export interface ChosenModules {
  /** moduleIndex of those that stay. */
  readonly kept: ReadonlySet<number>;
  /** g of every module, in the order of the base. */
  readonly gates: Float32Array;
}

/** A pair whose B the decoder reads times its module's gate. */
interface Gated {
  readonly index: number;
  readonly a: Parameter;
  readonly b: Parameter;
  readonly shown: Float32Array; // g·B, and its gradient in turn
}

/** Throws INVALID_REQUEST without held-out examples. */
export async function searchModules(
  options: Omit<SessionOptions, 'modules'>,
  breathe: Breathe,
): Promise<ChosenModules> {
  const { recipe, heldOut } = options;
  if (recipe.modules === 'all') throw new GatewayError('INTERNAL', 'there is nothing to search');
  if (heldOut.length === 0) {
    throw new GatewayError('INVALID_REQUEST', 'diffora chooses modules by held-out examples', {
      param: 'modules',
    });
  }
  using search = new Search(options, recipe.modules.searchShare);
  for (let step = 0; step < search.steps; step++) await search.takeStep(step, breathe);
  return search.chosen(recipe.modules.keepRatio);
}

class Search implements Disposable {
  readonly steps: number;
  readonly #options: Omit<SessionOptions, 'modules'>;
  readonly #modules: readonly Gated[];
  readonly #search: ModuleSearch;
  readonly #decoder: TrainingDecoder;
  readonly #batches: (step: number) => readonly [training: Layout, heldOut: Layout];
  readonly #takePairs: () => void;
  readonly #takeGates: () => void;

  constructor(options: Omit<SessionOptions, 'modules'>, share: number) {
    const { base, recipe, training, heldOut } = options;
    this.#options = options;
    const family = new FamilyTraining(choiceOf(recipe), startModules(options));
    const { parameters } = family;
    this.#modules = family.modules().map(({ site }, i): Gated => {
      const [a, b] = [parameters[2 * i]!, parameters[2 * i + 1]!];
      const index = moduleIndex(site.block, site.projection);
      return { index, a, b, shown: new Float32Array(b.values.length) };
    });
    this.#search = new ModuleSearch(this.#modules.length, temperature);
    const { logits } = this.#search;
    const [pairs, gates] = [createOptimizer(adamw, parameters), createOptimizer(adamw, [logits])];
    this.#takePairs = () => pairs.step(parameters, recipe.learningRate);
    this.#takeGates = () => gates.step([logits], gateRate);
    const plan = planSteps(training, recipe);
    this.steps = Math.max(1, Math.round(share * plan.steps));
    const held = inGroups(packWindows(heldOut, recipe.windowTokens, null), recipe.batchWindows);
    this.#batches = (step) => {
      const [own] = plan.microBatches(step % plan.steps);
      const other = held[step % held.length]!;
      return [batchOf(recipe, training, own!), batchOf(recipe, heldOut, other)];
    };
    const most = held.map((group) => answersIn(heldOut, group));
    const { batchWindows: windows, windowTokens: windowRows, recompute } = recipe;
    const answersMax = Math.max(plan.answersMax, ...most);
    const sizes = { windows, windowRows, answersMax, recompute };
    this.#decoder = new TrainingDecoder({ ...base, ...sizes, delta: family.delta });
  }

  async takeStep(step: number, breathe: Breathe): Promise<void> {
    const [training, heldOut] = this.#batches(step);
    await breathe();
    this.#compute(training);
    this.#takePairs();
    await breathe();
    this.#search.setGradient(this.#compute(heldOut));
    this.#takeGates();
  }

  /** Sets the pairs' gradients; returns each module's gate's, rank by rank. */
  #compute(batch: Layout): Float32Array[] {
    const { rank, scaling } = this.#options.recipe;
    const gates = this.#search.gates();
    const perRank = (i: number): Float32Array => new Float32Array(rank).fill(gates[i]!);
    this.#modules.forEach(({ a, b, shown }, i) => {
      gatedRows(b.values, perRank(i), shown);
      this.#decoder.write(a.name, a.values);
      this.#decoder.write(b.name, shown);
    });
    const gate = new Float32Array(batch.tokens.length * rank).fill(scaleOf(scaling, rank));
    this.#decoder.step({ ...batch, gate });
    return this.#modules.map(({ a, b, shown }, i) => {
      this.#decoder.read(a.name, a.gradient);
      this.#decoder.read(b.name, shown);
      const d = { b: b.gradient, gates: new Float32Array(rank) };
      throughGates({ b: b.values, gates: perRank(i) }, shown, d);
      return d.gates;
    });
  }

  chosen(keepRatio: number): ChosenModules {
    const kept = this.#search.kept(keepRatio).map((i) => this.#modules[i]!.index);
    return { kept: new Set(kept), gates: this.#search.gates() };
  }

  [Symbol.dispose](): void {
    this.#decoder[Symbol.dispose]();
  }
}

function batchOf(
  { batchWindows: windows, windowTokens: windowRows }: RunRecipe,
  examples: SessionOptions['training'],
  group: Parameters<typeof answersIn>[1],
): Layout {
  const weight = 1 / answersIn(examples, group);
  return layOut(examples, group, { windows, windowRows, weight });
}
