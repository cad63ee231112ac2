// The loop that keeps captured adapters fresh: what callers said → a job that trains on from the live generation → the gate →
// promotion by compare-and-swap → a watch that goes back when the new generation proves worse. All its notes are in the
// capture store: a gateway that starts again goes on. An adapter learns from its own traffic alone.

import { createHash } from 'node:crypto';
import { mkdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { type Generation, tenantOf } from '../adapters/adapter.ts';
import type { AdapterRecord, Registry } from '../adapters/registry.ts';
import { publish } from '../channels.ts';
import { asGatewayError, GatewayError } from '../errors.ts';
import { writeFileDurably } from '../model/file-hash.ts';
import type { Capture } from './capture.ts';
import type { Job } from './job.ts';
import type { JobStore } from './job-store.ts';
import type { TrainingResult } from './messages.ts';
import { parseRecipe } from './recipe.ts';
import { type RefreshData, selectExamples } from './refresh-data.ts';
import { type Comparison, type GateSettings, judge, type Verdict } from './refresh-gate.ts';
import { type ScheduleSettings, whyNotNow, whyTooLittle } from './refresh-schedule.ts';
import {
  afterGain,
  type Capitals,
  isWorse,
  lossGain,
  lowerBound,
  noCapitals,
  scoreGain,
} from './refresh-watch.ts';
import type { TrainingFiles } from './training-files.ts';

export interface RefreshSettings extends ScheduleSettings, GateSettings {
  /** From which an answer is learnt. */
  readonly scoreMin: number;
  /** Of the questions. */
  readonly heldOutShare: number;
  /** How often a promoted generation that is no worse is put back all the same. */
  readonly alpha: number;
  /** Parts of a recipe. */
  readonly recipe: Readonly<Record<string, unknown>>;
}

export interface RefresherOptions {
  readonly capture: Capture;
  readonly jobs: JobStore;
  readonly files: TrainingFiles;
  readonly registry: Pick<Registry, 'find' | 'swap' | 'durableNow'>;
  readonly settings: RefreshSettings;
  /** For files that are being written; its own. */
  readonly directory: string;
  readonly unixS: () => number;
  readonly after: (ms: number, callback: () => void) => () => void;
  /** A job was created. */
  readonly wake: () => void;
  /** A name left this generation. */
  readonly onLeft: (generation: Generation) => void;
  readonly onFailure: (error: unknown) => void;
}

/** A promoted generation on probation. */
interface Watch {
  readonly generation: Generation;
  readonly earlier: Generation;
  readonly scores: Capitals;
  readonly losses: Capitals;
  /** Under the earlier one's mean score; 0 or less: too few are known. */
  readonly bound: number;
  /** The last job whose losses counted. */
  readonly job: string | null;
}

export interface RefreshEnd {
  readonly outcome: 'promoted' | 'discarded' | 'rolled-back' | 'failed' | 'cancelled';
  readonly job: string | null;
  readonly generation: Generation | null;
  readonly reasons: readonly string[];
  readonly atS: number;
}

export interface RefreshNotes {
  readonly startedS: number | null;
  /** Under way; with what it learns from. */
  readonly job: string | null;
  readonly files: readonly string[];
  readonly watch: Watch | null;
  readonly last: RefreshEnd | null;
}

const noNotes: RefreshNotes = { startedS: null, job: null, files: [], watch: null, last: null };
const tickMs = 2000;

export class Refresher {
  readonly capture: Capture;
  readonly #options: RefresherOptions;
  /** Adapters of which something was said since they were looked at. */
  readonly #due: Set<string>;
  readonly #starting: Set<string> = new Set();
  #cancelTick: () => void = () => {};
  #isClosed = false;
  #looking: Promise<void> = Promise.resolve();

  constructor(options: RefresherOptions) {
    this.#options = options;
    this.capture = options.capture;
    this.#due = new Set(this.capture.adapters);
    parseRecipe(options.settings.recipe, 'refresh.recipe'); // now, not at the first refresh
    rmSync(options.directory, { recursive: true, force: true });
    mkdirSync(options.directory, { recursive: true });
    this.#tick();
  }

  notes(adapter: string): RefreshNotes {
    return this.capture.state<RefreshNotes>(adapter) ?? noNotes;
  }

  /** Starts what is due. */
  async look(): Promise<void> {
    for (const adapter of this.capture.adapters) {
      try {
        await this.#settle(adapter);
        if (this.#due.has(adapter)) await this.start(adapter, false);
      } catch (error) {
        this.#options.onFailure(error);
      }
    }
  }

  /** A refresh's job, or why there is none. `asked`: by somebody, who need not wait for its time. */
  async start(adapter: string, asked: boolean): Promise<Job | string> {
    const { registry, settings, unixS } = this.#options;
    const record = registry.find(adapter);
    if (record === null || !this.capture.isOn(adapter)) return 'its traffic is not captured';
    this.capture.flush();
    const notes = this.notes(adapter);
    const isRunning = notes.job !== null || this.#starting.has(adapter);
    const timing = { nowS: unixS(), lastS: notes.startedS, isRunning };
    const why = whyNotNow(timing, settings, asked);
    if (why !== null) return why;
    const data = selectExamples(this.capture.scored(adapter), settings, notes.startedS ?? 0);
    const { fresh, training, heldOut } = data;
    const counts = { fresh, training: training.length, heldOut: heldOut.length };
    const lacking = whyTooLittle(counts, settings, asked);
    if (lacking === null) return this.#create(record, data);
    // Time alone changes nothing about what there is to learn.
    if (fresh < settings.freshMin) this.#due.delete(adapter);
    return lacking;
  }

  async #create(record: AdapterRecord, data: RefreshData): Promise<Job> {
    const { jobs, unixS, wake } = this.#options;
    const { name, generation } = record;
    this.#starting.add(name);
    try {
      const recipe = this.#recipeOf(record);
      const trainingFile = await this.#write(name, 'training', data.training);
      this.#note(name, { files: [trainingFile] });
      const validationFile = await this.#write(name, 'held-out', data.heldOut);
      this.#note(name, { files: [trainingFile, validationFile] });
      const { watch } = this.notes(name);
      const earlier = watch?.generation === generation ? watch.earlier : null;
      const refresh = { earlier, freshHeldOut: data.freshHeldOut };
      const job = jobs.create(tenantOf(name) ?? '', null, {
        request: {
          model: name,
          startFrom: generation,
          suffix: null,
          recipe,
          adapter: name,
          refresh,
        },
        trainingFile,
        validationFile,
      });
      this.#note(name, { job: job.id, startedS: unixS() });
      wake();
      return job;
    } catch (error) {
      await this.#removeFiles(name);
      throw error;
    } finally {
      this.#starting.delete(name);
    }
  }

  /** As many ranks as it has, unless the settings want more. */
  #recipeOf({ manifest: { rankMax } }: AdapterRecord): Job['request']['recipe'] {
    const { recipe } = this.#options.settings;
    const rank = Math.max(rankMax, typeof recipe.rank === 'number' ? recipe.rank : 0);
    return parseRecipe({ ...recipe, rank }, 'refresh.recipe');
  }

  async #write(adapter: string, kind: string, lines: readonly string[]): Promise<string> {
    const { directory, files } = this.#options;
    const text = lines.map((line) => `${line}\n`).join('');
    const sha256 = createHash('sha256').update(text).digest('hex');
    const path = join(directory, `${sha256}.jsonl`);
    await writeFileDurably(path, text);
    const { id } = await files.add(path, {
      owner: tenantOf(adapter) ?? '',
      filename: `refresh of ${adapter}: ${kind}.jsonl`,
      bytes: Buffer.byteLength(text),
      examples: lines.length,
      sha256,
    });
    return id;
  }

  /** null for a job that is no refresh. */
  judge({ id, request }: Job, { comparison }: TrainingResult): Verdict | null {
    const { refresh, adapter } = request;
    if (refresh === undefined) return null;
    if (comparison === null) throw new GatewayError('INTERNAL', 'a refresh without a comparison');
    const heldOut = comparison.before.byRank[0]?.length ?? 0;
    const known = Math.max(0, heldOut - refresh.freshHeldOut);
    const verdict = judge(comparison, this.#options.settings, known);
    const isBack = this.#watchLosses(id, request, comparison);
    const reasons = isBack
      ? [...verdict.reasons, 'it was trained from a generation that has been rolled back']
      : verdict.reasons;
    if (reasons.length > 0) this.#end(adapter, { outcome: 'discarded', job: id, reasons });
    return { ...verdict, isPromoted: reasons.length === 0, reasons };
  }

  /** Why not; null: the name points at it. Again is as once: the gateway may die in between. */
  promote({ id, request }: Job, generation: Generation): string | null {
    const { adapter, startFrom: earlier } = request;
    if (earlier === null) throw new GatewayError('INTERNAL', 'a refresh without a generation');
    const isThere = this.#options.registry.find(adapter)?.generation === generation;
    if (!isThere && !this.#swap(adapter, { from: earlier, to: generation })) {
      const reason = 'the live generation changed meanwhile';
      this.#end(adapter, { outcome: 'discarded', job: id, reasons: [reason] });
      return reason;
    }
    const scores = this.capture.scoresOf(adapter, earlier);
    const bound = lowerBound(scores, this.#options.settings.alpha / 4);
    const none = { scores: noCapitals, losses: noCapitals };
    const watch = { generation, earlier, ...none, bound, job: null };
    if (this.notes(adapter).watch?.generation !== generation) this.#note(adapter, { watch });
    this.#end(adapter, { outcome: 'promoted', job: id, generation, reasons: [] });
    return null;
  }

  /** Of an answer that was scored for the first time. */
  noteScore(adapter: string, generation: Generation, score: number): void {
    if (!this.capture.isOn(adapter)) return;
    this.#due.add(adapter);
    this.capture.noteScore(adapter, generation, score);
    const { watch } = this.notes(adapter);
    if (watch?.generation !== generation || watch.bound <= 0) return;
    const scores = afterGain(watch.scores, scoreGain(score, watch.bound));
    this.#note(adapter, { watch: { ...watch, scores } });
    this.#weigh(adapter);
  }

  /** Held-out questions that came since the last refresh judge the generation that learnt before it. True: it is put back. */
  #watchLosses(job: string, { adapter, refresh }: Job['request'], comparison: Comparison): boolean {
    const { watch } = this.notes(adapter);
    const { before, earlier } = comparison;
    const isFor = watch !== null && watch.earlier === refresh?.earlier && watch.job !== job;
    if (!isFor || earlier === null) return false;
    const fresh = (losses: readonly number[]): readonly number[] =>
      refresh.freshHeldOut === 0 ? [] : losses.slice(-refresh.freshHeldOut);
    const [old, now] = [fresh(earlier), fresh(before.byRank.at(-1)!)];
    const gains = old.map((loss, i) => lossGain(loss, now[i]!));
    const losses = gains.reduce(afterGain, watch.losses);
    this.#note(adapter, { watch: { ...watch, losses, job } });
    return this.#weigh(adapter);
  }

  /** True: the generation on probation is put back. Of alpha, losses have a half; scores a quarter, and their bound another. */
  #weigh(adapter: string): boolean {
    const { alpha } = this.#options.settings;
    const { watch } = this.notes(adapter);
    if (watch === null) return false;
    const byScores = isWorse(watch.scores, alpha / 4);
    if (!byScores && !isWorse(watch.losses, alpha / 2)) return false;
    const by = byScores ? 'scores' : 'held-out losses';
    const { generation, earlier } = watch;
    const isBack = this.#swap(adapter, { from: generation, to: earlier });
    this.#note(adapter, { watch: null });
    if (!isBack) return false;
    const reasons = [
      `its ${by} are worse than those of ${earlier} (an error at most 1 in ${1 / alpha})`,
    ];
    this.#end(adapter, { outcome: 'rolled-back', job: null, generation, reasons });
    return true;
  }

  /** False when the name has been moved meanwhile, or is gone. */
  #swap(name: string, { from, to }: { from: Generation; to: Generation }): boolean {
    const { registry, onLeft } = this.#options;
    try {
      registry.swap(name, to, from);
    } catch (error) {
      const { code } = asGatewayError(error);
      if (code === 'GENERATION_MISMATCH' || code === 'ADAPTER_NOT_FOUND') return false;
      throw error;
    }
    registry.durableNow();
    onLeft(from);
    return true;
  }

  /** After a job's end, however it came. */
  async #settle(adapter: string): Promise<void> {
    const { jobs, registry } = this.#options;
    if (registry.find(adapter) === null) {
      this.capture.switch(adapter, false);
      return;
    }
    const { job: id, last, files } = this.notes(adapter);
    const job = id === null ? null : jobs.find(id, null);
    if (id === null ? files.length === 0 || this.#starting.has(adapter) : job?.finishedS === null) {
      return;
    }
    await this.#removeFiles(adapter);
    this.#note(adapter, { job: null });
    if (id === null || last?.job === id) return;
    const reasons = [job?.error?.message ?? 'the job is gone'];
    const outcome = job?.state === 'cancelled' ? 'cancelled' : 'failed';
    this.#end(adapter, { outcome, job: id, reasons });
  }

  async #removeFiles(adapter: string): Promise<void> {
    const { files } = this.#options;
    for (const id of this.notes(adapter).files) {
      const file = files.find(id, null);
      if (file !== null) await files.remove(file);
    }
    this.#note(adapter, { files: [] });
  }

  #end(adapter: string, end: Omit<RefreshEnd, 'atS' | 'generation'> & Partial<RefreshEnd>): void {
    const last = { generation: null, ...end, atS: this.#options.unixS() };
    this.#note(adapter, { last });
    publish('refresh-end', { outcome: last.outcome });
  }

  #note(adapter: string, change: Partial<RefreshNotes>): void {
    this.capture.setState(adapter, { ...this.notes(adapter), ...change });
  }

  #tick(): void {
    this.#cancelTick = this.#options.after(tickMs, () => {
      this.#looking = this.look().finally(() => {
        if (!this.#isClosed) this.#tick();
      });
    });
  }

  /** Resolves when it is at rest. */
  async close(): Promise<void> {
    this.#isClosed = true;
    this.#cancelTick();
    await this.#looking;
  }
}
