// The contract of routing: plain data in, a Plan out, no clock and no I/O. The reason is part of the plan: it is what
// the caller reads in x-rank-reason.

/** In milliseconds, finite and > 0; null where nothing is asked. */
export interface BudgetTimes {
  readonly totalMs: number | null;
  readonly ttftMs: number | null;
  readonly perTokenMs: number | null;
}

/** What a tier stands for; also the shape of the default for requests that state nothing. */
export interface TierPolicy extends BudgetTimes {
  /** Refuse (DEADLINE_TOO_SHORT) instead of serving late when even the smallest allowed rank does not fit. */
  readonly strict: boolean;
  readonly rankMin: number;
  /** 0…9, larger first: whose sequences get room in the engine before whose. */
  readonly priority: number;
}

/** A request's latency budget after parsing (budget.ts). */
export interface Budget extends TierPolicy {
  /** Rank fixed by the caller: the budget then only informs. */
  readonly rank: number | null;
}

/** What is known of the work to be done and of the machine, at the moment of the decision. */
export interface RouteInput {
  readonly budget: Budget;
  readonly promptTokens: number;
  readonly tokensMax: number;
  readonly adapter: {
    readonly name: string;
    readonly rankMax: number;
    /** Share of energy kept at uniform rank k (index k-1), non-decreasing. */
    readonly rankCurve: readonly number[];
    /** What a row computes and reads at rank k (index k-1), of all parts of a blend. */
    readonly ranks: readonly number[];
    readonly pages: readonly number[];
  } | null;
  /** The adapter that repairs the base under it, which has one rank. */
  readonly system: { readonly ranks: number; readonly pages: number } | null;
  readonly load: {
    readonly decodeRows: number;
    readonly decodeRanks: number;
    readonly waiting: number;
    readonly waitingPromptTokens: number;
    readonly kvCells: number;
  };
}

export type PlanReason =
  | 'base' // no adapter was named
  | 'full' // no budget: every rank
  | 'fits' // the largest rank whose prediction fits, and it is all of them
  | 'system-dropped' // every rank, but the system adapter does not fit
  | 'reduced' // the largest rank that fits is smaller than the adapter; the system adapter went before
  | 'learned' // smaller than the largest that fits: what came of it says that it is worth more (guarded-policy.ts)
  | 'configured' // the operator's rank or table, and not all of them
  | 'fixed' // the caller fixed the rank
  | 'infeasible'; // not even the smallest allowed (or the configured) rank fits; served at it, without the system adapter (or refused when strict)

export interface Plan {
  readonly rank: number;
  readonly rankMax: number;
  readonly hasSystem: boolean;
  /** Active ranks of all that a row computes. */
  readonly ranks: number;
  readonly reason: PlanReason;
  /** Of that; null while the latency model has seen nothing. */
  readonly prediction: Prediction | null;
}

export interface Prediction {
  readonly ttftMs: number;
  readonly perTokenMs: number;
  readonly totalMs: number;
  /** Deviations of the three above: of the total, of the first token, of the time per token. */
  readonly sigmaMs: number;
  readonly ttftSigmaMs: number;
  readonly perTokenSigmaMs: number;
}

/** Predicts one request with so many active ranks under the given load; null while nothing was learned. */
export type Predict = (input: RouteInput, ranks: number) => Prediction | null;

/** What became of a plan, or how good its answer was: one of the two, or both. */
export interface Outcome {
  readonly input: RouteInput;
  readonly plan: Plan;
  /** Whether every stated time was kept; null: none was stated, or nothing is known. */
  readonly met: boolean | null;
  /** 0…1, of whoever judged the answer; null: nobody did. */
  readonly score: number | null;
}

/** Chooses a plan per request and learns from what became of it. Memory is bounded. */
export interface RankPolicy {
  readonly name: string;
  /** `draw`: uniform in [0, 1). Throws INVALID_BUDGET for a fixed rank that the adapter has not. */
  choose(input: RouteInput, predict: Predict, draw: () => number): Plan;
  settle(outcome: Outcome): void;
  save(): string;
  /** False, and nothing changed, when the text is not one that `save` of the same policy made. */
  restore(text: string): boolean;
}

/** The configuration's `rankPolicy`. */
export type PolicySettings =
  | { readonly kind: 'guarded' | 'largest' }
  | { readonly kind: 'fixed'; readonly rank: number }
  /** Ascending by `fromMs`: a budget of at least that much for the whole answer has the row's rank. */
  | {
      readonly kind: 'table';
      readonly rows: ReadonlyArray<{ readonly fromMs: number; readonly rank: number }>;
    }
  | {
      readonly kind: 'critic';
      /** In [0, 1): how much the outcome of the next decision counts. */
      readonly discount: number;
      readonly regularizer: 'none' | 'beer';
    };
