// What was answered by adapters whose traffic may be learnt from, and what callers said of it, in SQLite. Nothing is captured
// unless an adapter's owner switches it on; a request's `store: false` and a tenant's refusal win over that. Lossy by
// design: an answer waits for nothing here. It goes into a bounded queue, is written a little later, and dropped, and
// counted, when the queue or the disk is full.
//
// An answer that nobody scored waits as one of the newest; one that is scored joins the adapter's reservoir. Equal answers to
// equal prompts are one. Everything is bounded per adapter: examples, bytes, age.

import { createHash } from 'node:crypto';
import type { Generation } from '../adapters/adapter.ts';
import { createRandom } from '../adapters/families/seeded-random.ts';
import { type OwnDatabase, openDatabase } from '../database.ts';
import { GatewayError } from '../errors.ts';
import type { CapturedPrompt, ScoredAnswer } from './refresh-data.ts';
import { placeNext, withoutOld } from './reservoir.ts';

export interface CapturedAnswer {
  readonly id: string;
  readonly tenant: string;
  readonly adapter: string;
  readonly generation: Generation;
  readonly rank: number;
  readonly prompt: CapturedPrompt;
  readonly answer: string;
  /** Not cut off: it may be learnt as it is. */
  readonly isWhole: boolean;
}

export interface Feedback {
  /** 0…1. */
  readonly score: number;
  readonly comment: string | null;
  readonly correction: string | null;
}

export interface CaptureLimits {
  /** Scored ones of an adapter; as many may wait for a score. */
  readonly examplesMax: number;
  readonly bytesMax: number;
  readonly ageS: number;
}

export interface CaptureOptions {
  readonly db: OwnDatabase;
  readonly limits: CaptureLimits;
  readonly seed: bigint;
  readonly unixS: () => number;
  readonly after: (ms: number, callback: () => void) => () => void;
  readonly onFailure: (error: unknown) => void;
}

export interface CaptureFigures {
  readonly scored: number;
  readonly waiting: number;
  readonly bytes: number;
  /** Scored since capture was switched on. */
  readonly seen: number;
}

const tables = `
  CREATE TABLE adapters (
    name TEXT PRIMARY KEY,
    seen INTEGER NOT NULL DEFAULT 0,
    state TEXT -- the refresh loop's, JSON
  ) STRICT, WITHOUT ROWID;
  CREATE TABLE examples (
    adapter TEXT NOT NULL REFERENCES adapters (name) ON DELETE CASCADE,
    hash TEXT NOT NULL, -- of prompt and answer
    id TEXT NOT NULL, -- of the last such answer, as the next four
    tenant TEXT NOT NULL,
    generation TEXT NOT NULL,
    rank INTEGER NOT NULL,
    created_s INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    is_scored INTEGER NOT NULL DEFAULT 0,
    prompt TEXT NOT NULL, -- JSON
    answer TEXT NOT NULL,
    is_whole INTEGER NOT NULL,
    score REAL,
    comment TEXT,
    correction TEXT,
    scored_s INTEGER,
    PRIMARY KEY (adapter, hash)
  ) STRICT;
  CREATE INDEX examples_by_id ON examples (id);
  CREATE INDEX examples_by_state ON examples (adapter, is_scored, created_s, bytes, hash);
  CREATE TABLE refusals (tenant TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;
  CREATE TABLE scores (
    number INTEGER PRIMARY KEY,
    adapter TEXT NOT NULL REFERENCES adapters (name) ON DELETE CASCADE,
    generation TEXT NOT NULL,
    score REAL NOT NULL
  ) STRICT;
  CREATE INDEX scores_of ON scores (adapter, number);
`;

/** Throws as `openDatabase` does. */
export function openCaptureDatabase(path: string): OwnDatabase {
  const schema = { what: 'capture store', version: 1, tables };
  return openDatabase({ path, bytesMax: 2 ** 32, schema });
}

const queueMax = 512;
const flushMs = 250;
/** Of one example, prompt and answer: a training line has no more. */
const exampleBytesMax = 256 * 1024;
const adaptersMax = 256;
const refusalsMax = 10_000;
/** Of an adapter, remembered for comparison with those of its next generation. */
export const scoresMax = 512;

export class Capture {
  readonly #options: CaptureOptions;
  readonly #db: OwnDatabase;
  readonly #on: Set<string>;
  readonly #refused: Set<string>;
  #queue: CapturedAnswer[] = [];
  #cancelFlush: (() => void) | null = null;
  #dropped = 0;

  constructor(options: CaptureOptions) {
    this.#options = options;
    this.#db = options.db;
    const column = (sql: string): string[] =>
      (this.#db.sql(sql).all() as { text: string }[]).map(({ text }) => text);
    this.#on = new Set(column('SELECT name AS text FROM adapters'));
    this.#refused = new Set(column('SELECT tenant AS text FROM refusals'));
  }

  /** Answers that were not kept for want of room since the start. */
  get dropped(): number {
    return this.#dropped;
  }

  get adapters(): readonly string[] {
    return [...this.#on];
  }

  isOn(adapter: string): boolean {
    return this.#on.has(adapter);
  }

  isRefused(tenant: string): boolean {
    return this.#refused.has(tenant);
  }

  /** Off forgets all that was captured. Throws QUOTA_EXCEEDED. */
  switch(adapter: string, isOn: boolean): void {
    if (isOn && this.#on.size >= adaptersMax && !this.#on.has(adapter)) {
      throw new GatewayError('QUOTA_EXCEEDED', `${adaptersMax} adapters are captured: the most`);
    }
    const sql = isOn
      ? 'INSERT OR IGNORE INTO adapters (name) VALUES (?)'
      : 'DELETE FROM adapters WHERE name = ?';
    this.#db.atomically(() => this.#db.sql(sql).run(adapter));
    if (isOn) this.#on.add(adapter);
    else this.#on.delete(adapter);
  }

  /** A tenant's word: forgets what was captured of it as well. Throws QUOTA_EXCEEDED. */
  refuse(tenant: string, isRefused: boolean): void {
    if (isRefused && this.#refused.size >= refusalsMax) {
      throw new GatewayError('QUOTA_EXCEEDED', `${refusalsMax} tenants refuse: the most`);
    }
    this.#db.atomically(() => {
      if (!isRefused) this.#db.sql('DELETE FROM refusals WHERE tenant = ?').run(tenant);
      else {
        this.#db.sql('INSERT OR IGNORE INTO refusals VALUES (?)').run(tenant);
        this.#db.sql('DELETE FROM examples WHERE tenant = ?').run(tenant);
      }
    });
    if (!isRefused) this.#refused.delete(tenant);
    else {
      this.#refused.add(tenant);
      this.#queue = this.#queue.filter((one) => one.tenant !== tenant);
    }
  }

  durable(): Promise<void> {
    return this.#db.durable();
  }

  wants(adapter: string, tenant: string): boolean {
    return this.#on.has(adapter) && !this.#refused.has(tenant);
  }

  /** Never throws and never waits. */
  offer(answer: CapturedAnswer): void {
    if (!this.wants(answer.adapter, answer.tenant) || !this.#db.isOpen) return;
    if (this.#queue.length >= queueMax) {
      this.#dropped += 1;
      return;
    }
    this.#queue.push(answer);
    this.#cancelFlush ??= this.#options.after(flushMs, () => this.flush());
  }

  /** Writes what waits in the queue. */
  flush(): void {
    this.#cancelFlush?.();
    this.#cancelFlush = null;
    const queue = this.#queue;
    this.#queue = [];
    if (queue.length === 0) return;
    const isWritten = this.#safely(() => {
      for (const one of queue) this.#insert(one);
      for (const adapter of new Set(queue.map((one) => one.adapter))) this.#trim(adapter);
      return true;
    });
    if (isWritten === null) this.#dropped += queue.length;
  }

  /** False when no such answer of the tenant's is kept. Never throws. */
  score(id: string, tenant: string, feedback: Feedback): boolean {
    if (this.#queue.some((one) => one.id === id)) this.flush();
    return this.#safely(() => this.#score(id, tenant, feedback)) ?? false;
  }

  #score(id: string, tenant: string, { score, comment, correction }: Feedback): boolean {
    const { unixS, limits, seed } = this.#options;
    const find = this.#db.sql('SELECT * FROM examples WHERE id = ? AND tenant = ?');
    const row = find.get(id, tenant) as ExampleRow | undefined;
    if (row === undefined) return false;
    const { adapter, hash } = row;
    if (row.is_scored === 0) {
      const reservoir = { seen: this.#seen(adapter), kept: this.#count(adapter, 1) };
      const placing = placeNext(reservoir, limits.examplesMax, seed);
      this.#db.sql('UPDATE adapters SET seen = seen + 1 WHERE name = ?').run(adapter);
      if (placing === 'drop') {
        this.#db.sql('DELETE FROM examples WHERE adapter = ? AND hash = ?').run(adapter, hash);
        return true;
      }
      if (placing !== 'add') this.#db.sql(dropScored).run(adapter, placing.replace);
    }
    const said = Buffer.byteLength(comment ?? '') + Buffer.byteLength(correction ?? '');
    const values = [score, comment, correction, unixS(), said, adapter, hash];
    this.#db.sql(setScore).run(...values);
    this.#trim(adapter);
    return true;
  }

  /** Remembers what was said of a generation, kept or not. Never throws. */
  noteScore(adapter: string, generation: Generation, score: number): void {
    this.#safely(() => {
      const insert = 'INSERT INTO scores (adapter, generation, score) VALUES (?, ?, ?)';
      this.#db.sql(insert).run(adapter, generation, score);
      this.#db.sql(dropOldScores).run(adapter, adapter, scoresMax);
    });
  }

  /** In one transaction; null when it failed. */
  #safely<T>(work: () => T): T | null {
    try {
      return this.#db.atomically(work);
    } catch (error) {
      this.#options.onFailure(error);
      return null;
    }
  }

  /** Of a generation, in their order. */
  scoresOf(adapter: string, generation: Generation): number[] {
    const sql = 'SELECT score FROM scores WHERE adapter = ? AND generation = ? ORDER BY number';
    const rows = this.#db.sql(sql).all(adapter, generation) as { score: number }[];
    return rows.map(({ score }) => score);
  }

  scored(adapter: string): ScoredAnswer[] {
    this.#db.atomically(() => this.#trim(adapter));
    const sql = 'SELECT * FROM examples WHERE adapter = ? AND is_scored = 1';
    return (this.#db.sql(sql).all(adapter) as ExampleRow[]).map((row) => ({
      prompt: JSON.parse(row.prompt) as CapturedPrompt,
      answer: row.answer,
      isWhole: row.is_whole === 1,
      score: row.score!,
      correction: row.correction,
      scoredS: row.scored_s!,
    }));
  }

  figures(adapter: string): CaptureFigures {
    const sql = 'SELECT coalesce(sum(bytes), 0) AS bytes FROM examples WHERE adapter = ?';
    const { bytes } = this.#db.sql(sql).get(adapter) as { bytes: number };
    const [waiting, scored] = [this.#count(adapter, 0), this.#count(adapter, 1)];
    return { scored, waiting, bytes, seen: this.#seen(adapter) };
  }

  /** The refresh loop's notes on an adapter. */
  state<T>(adapter: string): T | null {
    const row = this.#db.sql('SELECT state FROM adapters WHERE name = ?').get(adapter) as
      | { state: string | null }
      | undefined;
    return JSON.parse(row?.state ?? 'null') as T | null;
  }

  setState(adapter: string, state: object): void {
    const sql = 'UPDATE adapters SET state = ? WHERE name = ?';
    this.#db.atomically(() => this.#db.sql(sql).run(JSON.stringify(state), adapter));
  }

  close(): void {
    this.flush();
    this.#db.close();
  }

  #insert(one: CapturedAnswer): void {
    const { id, tenant, adapter, generation, rank, answer } = one;
    const prompt = JSON.stringify(one.prompt);
    const bytes = Buffer.byteLength(prompt) + Buffer.byteLength(answer);
    // Switched off or refused while it waited; or too large to learn from.
    if (!this.wants(adapter, tenant) || bytes > exampleBytesMax) return;
    const hash = createHash('sha256')
      .update(JSON.stringify([prompt, answer]))
      .digest('hex');
    const values = [adapter, hash, id, tenant, generation, rank, this.#options.unixS()];
    this.#db.sql(insertExample).run(...values, bytes, prompt, answer, one.isWhole ? 1 : 0);
  }

  /** What is too old, waits behind too many, or is too much. */
  #trim(adapter: string): void {
    const { limits, unixS, seed } = this.#options;
    const before = { seen: this.#seen(adapter), kept: this.#count(adapter, 1) };
    const old = 'DELETE FROM examples WHERE adapter = ? AND created_s < ?';
    this.#db.sql(old).run(adapter, unixS() - limits.ageS);
    this.#db.sql(dropWaiting).run(adapter, adapter, limits.examplesMax);
    const { seen } = withoutOld(before, before.kept - this.#count(adapter, 1));
    this.#db.sql('UPDATE adapters SET seen = ? WHERE name = ?').run(seen, adapter);
    for (let draw = 1; ; draw++) {
      const { bytes, waiting, scored } = this.figures(adapter);
      if (bytes <= limits.bytesMax) return;
      // Nobody may ever score what waits.
      if (waiting > 0) this.#db.sql(dropWaiting).run(adapter, adapter, Math.floor(waiting / 2));
      else this.#db.sql(dropScored).run(adapter, createRandom(seed, [seen, draw]).below(scored));
    }
  }

  #seen(adapter: string): number {
    const row = this.#db.sql('SELECT seen FROM adapters WHERE name = ?').get(adapter);
    return (row as { seen: number } | undefined)?.seen ?? 0;
  }

  #count(adapter: string, isScored: 0 | 1): number {
    const sql = 'SELECT count(*) AS count FROM examples WHERE adapter = ? AND is_scored = ?';
    return (this.#db.sql(sql).get(adapter, isScored) as { count: number }).count;
  }
}

interface ExampleRow {
  readonly adapter: string;
  readonly hash: string;
  readonly is_scored: 0 | 1;
  readonly prompt: string;
  readonly answer: string;
  readonly is_whole: 0 | 1;
  readonly score: number | null;
  readonly correction: string | null;
  readonly scored_s: number | null;
}

const insertExample = `
  INSERT INTO examples (adapter, hash, id, tenant, generation, rank, created_s, bytes, prompt,
    answer, is_whole)
  VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
  ON CONFLICT DO UPDATE SET id = excluded.id, tenant = excluded.tenant, rank = excluded.rank,
    is_whole = excluded.is_whole, generation = excluded.generation, created_s = excluded.created_s`;

const setScore = `
  UPDATE examples SET is_scored = 1, score = ?, comment = ?, correction = ?, scored_s = ?,
    bytes = length(CAST(prompt AS BLOB)) + length(CAST(answer AS BLOB)) + ?
  WHERE adapter = ? AND hash = ?`;

/** The n-th scored one. */
const dropScored = `
  DELETE FROM examples WHERE rowid = (SELECT rowid FROM examples
    WHERE adapter = ? AND is_scored = 1 ORDER BY created_s, bytes, hash LIMIT 1 OFFSET ?)`;

/** All but the newest so many. */
const dropWaiting = `
  DELETE FROM examples WHERE adapter = ? AND rowid IN (SELECT rowid FROM examples
    WHERE adapter = ? AND is_scored = 0 ORDER BY created_s DESC, bytes, hash LIMIT -1 OFFSET ?)`;

const dropOldScores = `
  DELETE FROM scores WHERE adapter = ? AND number <= (SELECT number FROM scores
    WHERE adapter = ? ORDER BY number DESC LIMIT 1 OFFSET ?)`;
