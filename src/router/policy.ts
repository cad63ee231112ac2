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
  | 'fixed' // the caller fixed the rank
  | 'infeasible'; // not even the smallest allowed rank fits; served at it, without the system adapter (or refused when strict)

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
