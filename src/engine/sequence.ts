// One request inside the loop: its tokens, what it holds, and what its reader may be shown. Knows its own arithmetic and
// nothing of other sequences. A sequence resumed after an engine death starts with the tokens that its reader already
// has: they are replayed through the detokeniser and the stop matcher without being shown again, so text goes on exactly.

import { blendKey } from '../adapters/blend-key.ts';
import type { ResidentKey, ResidentUse } from '../adapters/residency.ts';
import type { AdapterRows } from '../model/stepper.ts';
import type { Want } from './adapter-loading.ts';
import { createDetokenizer, type Detokenizer } from './detokenizer.ts';
import type { AdapterPart, AdapterUse, FinishReason, GenerateRequest } from './messages.ts';
import { type SampleHistory, usesHistory } from './penalties.ts';
import type { CellAdmission } from './prefix-cache.ts';
import { Drafter } from './speculation.ts';
import { createStopMatcher, type StopMatcher } from './stop-matcher.ts';

export interface SequenceEnd {
  readonly reason: FinishReason;
  readonly stopString: string | null;
}

export interface Accepted {
  readonly text: string;
  readonly end: SequenceEnd | null;
}

/** What a sequence holds while it runs. */
export interface Holdings {
  readonly cells: CellAdmission;
  readonly adapters: readonly ResidentUse[];
  /** The same object at every step: the decoder compares by identity. */
  readonly rows: AdapterRows | null;
}

export interface SequenceOptions {
  readonly request: GenerateRequest;
  /** Tokens of the answer that the reader has. */
  readonly generated: Int32Array;
  readonly arrival: number;
  readonly submittedMs: number;
  readonly bytesOf: (token: number) => Uint8Array;
}

export class Sequence {
  readonly request: GenerateRequest;
  readonly arrival: number;
  readonly submittedMs: number;
  /** Prompt, then answer; room for all of it. */
  readonly tokens: Int32Array;
  readonly history: SampleHistory;
  readonly drafter: Drafter;
  /** Tokens known, of which the first `position` are in cells. */
  count: number;
  position = 0;
  lastStep: number = Number.NEGATIVE_INFINITY;
  firstTokenMs: number | null = null;
  holdings: Holdings | null = null;
  /** null for the base model and for rank 0 of everything, which is the same. */
  readonly use: AdapterUse | null;
  /** Its parts as residents. */
  readonly loadable: readonly Loadable[];
  /** Each resident once, in an order that does not depend on the request's. */
  readonly wants: readonly Want[];
  /** Computed from its prior when it is first tried. */
  atomBias: readonly number[] | null = null;
  /** Sequences behind it that were admitted while it found no cells. */
  passes = 0;
  readonly #counts: Map<number, number> = new Map();
  #atomSums: Float64Array | null = null; // [blocks of layers, K]
  #atomSteps = 0;
  readonly #prefillEnd: number;
  readonly #detokenizer: Detokenizer;
  readonly #matcher: StopMatcher;

  constructor(options: SequenceOptions) {
    const { request, generated } = options;
    this.request = request;
    this.use = activeUse(request.adapter);
    this.loadable = this.use === null ? [] : loadables(this.use);
    this.wants = wantsOf(this.loadable);
    this.arrival = options.arrival;
    this.submittedMs = options.submittedMs;
    this.tokens = new Int32Array(request.tokens.length + request.tokensMax);
    this.tokens.set(request.tokens);
    this.drafter = new Drafter(this.tokens);
    this.count = request.tokens.length;
    this.history = {
      prompt: new Set(usesHistory(request.sampling) ? request.tokens : []),
      counts: this.#counts,
    };
    this.#detokenizer = createDetokenizer(options.bytesOf);
    this.#matcher = createStopMatcher(request.stop);
    for (const token of generated) this.accept(token);
    this.#prefillEnd = this.count;
  }

  get id(): string {
    return this.request.id;
  }

  get tenant(): string {
    return this.request.tenant;
  }

  get generatedCount(): number {
    return this.count - this.request.tokens.length;
  }

  /** Cells it can ever fill: the last token of the answer is never fed back. */
  get cellsMax(): number {
    return this.tokens.length - 1;
  }

  /** Tokens to compute before it decodes. */
  get promptTokensLeft(): number {
    return Math.max(0, this.#prefillEnd - this.position);
  }

  /** Whether the token at `position` was known at the start, prompt or resumed answer. */
  isPrompt(position: number): boolean {
    return position < this.#prefillEnd;
  }

  /** How a token weighted the atoms, [blocks of layers, K]; null: it has none. */
  noteAtoms(weights: Float32Array | null): void {
    if (weights === null) return;
    this.#atomSums ??= new Float64Array(weights.length);
    for (const [i, weight] of weights.entries()) this.#atomSums[i]! += weight;
    this.#atomSteps += 1;
  }

  /** Mean weights, a list a block of layers. */
  get atoms(): number[][] | null {
    const atoms = this.holdings?.rows?.atoms?.bias.length;
    if (atoms === undefined || this.#atomSums === null) return null;
    const means = Array.from(this.#atomSums, (sum) => sum / this.#atomSteps);
    return Array.from({ length: means.length / atoms }, (_, block) =>
      means.slice(block * atoms, (block + 1) * atoms),
    );
  }

  /** Takes the next token of the answer; the end, when it is one, comes with the text that was still held back. */
  accept(token: number): Accepted {
    this.tokens[this.count] = token;
    this.count += 1;
    this.#counts.set(token, (this.#counts.get(token) ?? 0) + 1);
    const { text, stop } = this.#matcher.push(this.#detokenizer.push(token));
    if (stop !== null) return { text, end: { reason: 'stop', stopString: stop } };
    if (this.generatedCount < this.request.tokensMax) return { text, end: null };
    const rest = this.finish('length');
    return { text: text + rest.text, end: rest.end };
  }

  /** The end without another token: gives back what was held as half a character or half a stop string. */
  finish(reason: FinishReason): Accepted & { readonly end: SequenceEnd } {
    const { text, stop } = this.#matcher.push(this.#detokenizer.flush());
    if (stop !== null) return { text, end: { reason: 'stop', stopString: stop } };
    return { text: text + this.#matcher.flush(), end: { reason, stopString: null } };
  }
}

/** The parts, the system adapter last. */
export function allParts({ parts, system }: AdapterUse): readonly AdapterPart[] {
  return system === null ? parts : [...parts, system];
}

/** One resident of a use at a rank: a part, or what parts were merged into. */
export interface Loadable {
  readonly key: ResidentKey;
  /** Infinity: all that it has. */
  readonly rank: number;
  readonly weight: number;
}

function loadables(use: AdapterUse): readonly Loadable[] {
  const { parts, system, merge, density } = use;
  const single = ({ generation: key, rank, weight }: AdapterPart): Loadable => ({
    ...{ key, rank, weight },
  });
  if (merge === 'linear' || parts.length === 0) return allParts(use).map(single);
  const key = blendKey({ merge, density, parts });
  const merged = { key, rank: Number.POSITIVE_INFINITY, weight: 1 };
  return [merged, ...(system === null ? [] : [single(system)])];
}

function wantsOf(loadable: readonly Loadable[]): readonly Want[] {
  const ranks = new Map<ResidentKey, number>();
  for (const { key, rank } of loadable) ranks.set(key, Math.max(rank, ranks.get(key) ?? 0));
  return [...ranks].map(([key, rank]) => ({ key, rank })).sort((a, b) => (a.key < b.key ? -1 : 1));
}

/** Without what has rank 0; null when nothing is left. */
function activeUse(use: AdapterUse | null): AdapterUse | null {
  if (use === null) return null;
  const parts = use.parts.filter((part) => part.rank > 0);
  const system = use.system !== null && use.system.rank > 0 ? use.system : null;
  if (parts.length === 0 && system === null) return null;
  return { ...use, parts, system, prior: parts.length === 0 ? null : use.prior };
}
