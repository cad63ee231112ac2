// What the next step computes: continuous batching with chunked prefill. Pure functions from plain data to a plan; the
// loop executes it. Every decoding sequence gets its row, prompts fill what is left, earliest arrival first. Deadlines
// are not covered here: all sequences weigh the same.

export interface StepLimits {
  readonly tokensMax: number;
  readonly segmentsMax: number;
  /** Prompt tokens per step: bounds how long a decoding stream waits for someone else's prompt. */
  readonly prefillTokensMax: number;
}

/** One admitted sequence as the scheduler sees it. */
export interface Runnable {
  readonly id: string;
  /** Order of admission. */
  readonly arrival: number;
  /** Prompt tokens not yet in its cells; 0 = it decodes one token a step. */
  readonly promptTokensLeft: number;
  /** The step that last computed it; -Infinity before the first. */
  readonly lastStep: number;
}

export interface PlannedSegment {
  readonly id: string;
  readonly count: number;
}

export function planStep(runnables: readonly Runnable[], limits: StepLimits): PlannedSegment[] {
  const decoding = runnables.filter((one) => one.promptTokensLeft === 0);
  const prompts = runnables.filter((one) => one.promptTokensLeft > 0);
  // With more rows than fit, the longest-waiting go first, and one place stays for a prompt: neither kind starves.
  const spare = prompts.length > 0 ? 1 : 0;
  const rowsMax = Math.max(1, Math.min(limits.segmentsMax, limits.tokensMax) - spare);
  const plan: PlannedSegment[] = decoding
    .sort((a, b) => a.lastStep - b.lastStep || a.arrival - b.arrival)
    .slice(0, rowsMax)
    .map(({ id }) => ({ id, count: 1 }));

  let tokens = Math.min(limits.tokensMax - plan.length, limits.prefillTokensMax);
  for (const prompt of prompts.sort((a, b) => a.arrival - b.arrival)) {
    if (tokens < 1 || plan.length >= limits.segmentsMax) break;
    const count = Math.min(tokens, prompt.promptTokensLeft);
    plan.push({ id: prompt.id, count });
    tokens -= count;
  }
  return plan;
}

/** One sequence that waits for cells or pages. */
export interface Candidate {
  readonly id: string;
  readonly tenant: string;
  readonly arrival: number;
}

/** The order in which waiting sequences are offered room. A tenant's k-th waiting sequence ranks as if k were running
 *  besides those that are: whoever holds least goes first, then whoever came first. A tenant that floods the queue only
 *  waits behind itself. */
export function planAdmission<T extends Candidate>(
  waiting: readonly T[],
  runningByTenant: ReadonlyMap<string, number>,
): T[] {
  const seen = new Map(runningByTenant);
  return [...waiting]
    .sort((a, b) => a.arrival - b.arrival)
    .map((one) => {
      const share = seen.get(one.tenant) ?? 0;
      seen.set(one.tenant, share + 1);
      return { one, share };
    })
    .sort((a, b) => a.share - b.share || a.one.arrival - b.one.arrival)
    .map(({ one }) => one);
}
