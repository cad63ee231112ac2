// The numbers of an adapter of any family while it trains: what an optimiser takes as parameters, the graph's constants, and what
// moves without a gradient: fly's balance, ranks that are frozen, and ranks that are not on yet.

import type { Family } from '../adapters/families/family.ts';
import { rebalanced } from '../adapters/families/fly.ts';
import type { Columns } from '../adapters/orthogonal.ts';
import { type TrainedDelta, tensorName } from '../model/trained-delta.ts';
import {
  type FamilyChoice,
  type FamilyGraph,
  familyGraph,
  type TrainedModule,
  type TrainingGraph,
} from './family-graph.ts';
import type { Parameter } from './optimizers/optimizer.ts';
import { type QueryableTraining, queryableGraph } from './queryable-graph.ts';
import { type GrowthOptions, RankGrowth } from './rank-growth.ts';

/** u of algorithms.md 28: how far d moves a step. */
const balanceRate = 1e-3;

export interface QueryableChoice extends QueryableTraining {
  readonly kind: 'queryable';
  /** Of all steps, the first that mix all atoms. */
  readonly denseShare: number;
}
export type TrainingChoice = FamilyChoice | QueryableChoice;

export function graphOf(choice: TrainingChoice): FamilyGraph {
  return choice.kind === 'queryable' ? queryableGraph(choice) : familyGraph(choice);
}

/** A step that was taken. */
export interface Observer {
  /** Counted from 1, of `steps`. */
  readonly step: number;
  readonly steps: number;
  /** Rows of a batch, T. */
  readonly rows: number;
  /** What the last step computed of that name. */
  readonly read: (name: string, out: Float32Array) => void;
}

export class FamilyTraining {
  readonly family: Family;
  readonly delta: TrainedDelta;
  /** By the names of the decoder's tensors, whose values and gradients they are. */
  readonly parameters: readonly Parameter[];
  /** To be written before the first step, and those that are moving after each. */
  readonly constants: ReadonlyMap<string, Float32Array>;
  /** Constants that `afterStep` changes. */
  readonly moving: readonly string[];
  /** All that changes: the parameters' values, and constants that move. */
  readonly state: readonly Float32Array[];
  readonly #modules: readonly TrainedModule[];
  readonly #graph: TrainingGraph;
  readonly #choice: TrainingChoice;
  #dense: TrainedDelta | null = null;
  readonly #byName: ReadonlyMap<string, Parameter>;
  readonly #growth: RankGrowth | null;
  readonly #start: readonly Float32Array[];
  /** Numbers of each parameter that do not train: its first ranks, as they were. */
  readonly #frozen: ReadonlyMap<Parameter, Float32Array>;

  constructor(
    choice: TrainingChoice,
    modules: readonly TrainedModule[],
    growth: GrowthOptions | null = null,
  ) {
    const { family, over } = graphOf(choice);
    this.family = family;
    this.#choice = choice;
    this.#graph = over(modules);
    // Copies: what a family remembers of a site (the base's singular vectors) goes with the caller's.
    this.#modules = modules.map(({ site, tensors }) => ({ site: { ...site }, tensors }));
    this.delta = this.#graph.delta;
    const all = Object.entries(this.#graph.numbers).map(([name, { shape, values }]) => {
      return { name, shape, values, isTrained: this.delta.trained[name] !== undefined };
    });
    this.parameters = all
      .filter(({ isTrained }) => isTrained)
      .map(({ name, shape, values }): Parameter => {
        const [rows, columns] = shape as [number, number];
        return { name, rows, columns, values, gradient: new Float32Array(values.length) };
      });
    this.#byName = new Map(this.parameters.map((parameter) => [parameter.name, parameter]));
    this.constants = new Map(
      all.filter(({ isTrained }) => !isTrained).map(({ name, values }) => [name, values]),
    );
    const balanced = choice.kind === 'fly' ? this.#modules : [];
    const cores = this.parameters.filter(({ name }) => name.endsWith('.c'));
    this.#growth = growth === null ? null : new RankGrowth(growth, cores);
    this.moving = balanced.map(({ site }) => tensorName(site, 'd'));
    this.state = [
      ...this.parameters.map(({ values }) => values),
      ...this.moving.map((name) => this.constants.get(name)!),
      ...(this.#growth === null ? [] : [this.#growth.state]),
    ];
    this.#start = this.state.map((values) => values.slice());
    this.#frozen = new Map(
      this.parameters.map((each) => [each, each.values.slice(0, frozenCount(choice, each))]),
    );
  }

  /** Over the same tensors, with so many of each token's choice; null for families whose tokens choose nothing. */
  withActive(topK: number): TrainedDelta | null {
    return this.#graph.active?.(topK) ?? null;
  }

  /** What step `step` of `steps`, from 0, is computed with. */
  deltaAt(step: number, steps: number): TrainedDelta {
    const choice = this.#choice;
    if (choice.kind !== 'queryable' || choice.topK >= choice.atoms) return this.delta;
    if (step >= choice.denseShare * steps) return this.delta;
    this.#dense ??= this.withActive(choice.atoms);
    return this.#dense!;
  }

  restart(): void {
    this.state.forEach((values, i) => {
      values.set(this.#start[i]!);
    });
  }

  /** Once gradients are there. */
  beforeStep(): void {
    for (const [{ gradient }, { length }] of this.#frozen) gradient.fill(0, 0, length);
    this.#growth?.hold('gradient');
  }

  /** Once the optimiser has stepped. */
  afterStep(observer: Observer): void {
    // Weight decay and momentum move what has no gradient.
    for (const [{ values }, before] of this.#frozen) values.set(before);
    this.#growth?.hold('values');
    this.#growth?.look(observer.step, observer.steps);
    if (this.family.kind !== 'fly') return;
    for (const { site } of this.#modules) {
      const d = this.constants.get(tensorName(site, 'd'))!;
      const kept = new Float32Array(observer.rows * d.length); // [T, R]
      observer.read(tensorName(site, 'kept'), kept);
      const counts = new Float64Array(d.length);
      kept.forEach((share, i) => {
        if (share > 0) counts[i % d.length]! += 1;
      });
      d.set(rebalanced(Float64Array.from(d), counts, balanceRate));
    }
  }

  /** How many there are. */
  get numbers(): { readonly trained: number; readonly constant: number } {
    const sum = (all: readonly Float32Array[]): number =>
      all.reduce((count, { length }) => count + length, 0);
    return {
      trained: sum(this.parameters.map(({ values }) => values)),
      constant: sum([...this.constants.values()]),
    };
  }

  /** The modules with the family's numbers as they are now. */
  modules(): TrainedModule[] {
    return this.#modules.map(({ site, tensors }) => ({
      site,
      tensors: Object.fromEntries(
        Object.entries(tensors).map(([name, start]): [string, Columns] => {
          const full = tensorName(site, name);
          const values = this.#valuesOf(full) ?? this.#valuesOf(name); // what all modules share has its own name
          return [
            name,
            values === undefined ? start : { ...start, data: Float64Array.from(values) },
          ];
        }),
      ),
    }));
  }

  #valuesOf(name: string): Float32Array | undefined {
    return this.#byName.get(name)?.values ?? this.constants.get(name);
  }
}

/** First numbers of a parameter that stay as they are: of ranks, or of atoms and their keys. */
function frozenCount(choice: TrainingChoice, { name, columns }: Parameter): number {
  if (choice.kind === 'mora') return choice.frozen * columns;
  if (choice.kind !== 'queryable' || choice.part !== 'new-atoms') return 0;
  const { kept, rank, queryWidth } = choice;
  return name === 'keys' ? kept * queryWidth : kept * rank * rank;
}
