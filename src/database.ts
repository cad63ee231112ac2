// An SQLite database of the gateway's own: settings, lock, schema version, transactions, and when these are durable. The
// version is in the file; another program's is refused.
//
// A commit survives kill -9. It survives a loss of power once `durable` has synced the log, off the event loop and once for
// all who wait at the time (synchronous = FULL would hold the loop for milliseconds at each commit).

import { closeSync, constants, fdatasync, fdatasyncSync, fsyncSync, openSync } from 'node:fs';
import { dirname } from 'node:path';
import { promisify } from 'node:util';
import Database from 'libsql';
import { GatewayError } from './errors.ts';

export interface Schema {
  /** What the file holds, for messages: `registry`. */
  readonly what: string;
  readonly version: number;
  /** The CREATE statements of everything but the version's own table. */
  readonly tables: string;
}

export type SyncFile = (descriptor: number) => Promise<void>;

export interface DatabaseOptions {
  readonly path: string;
  /** Beyond, it fails as on a full disk. */
  readonly bytesMax: number;
  readonly schema: Schema;
  /** Tests make it fail and wait. */
  readonly syncFile?: SyncFile;
}

interface OpenedDatabase {
  readonly lock: Database.Database;
  readonly db: Database.Database;
  readonly what: string;
  /** The log's descriptor; null: all is in memory. */
  readonly log: number | null;
  readonly syncFile: SyncFile;
}

export class OwnDatabase {
  readonly #opened: OpenedDatabase;
  readonly #db: Database.Database;
  readonly #statements: Map<string, Database.Statement> = new Map();
  #commits = 0;
  #durableCommits = 0;
  #syncing: Promise<void> | null = null;
  #failure: GatewayError | null = null;

  constructor(opened: OpenedDatabase) {
    this.#opened = opened;
    this.#db = opened.db;
  }

  get isOpen(): boolean {
    return this.#db.open;
  }

  /** Throws NO_CAPACITY once it is closed: libsql would end the process. */
  sql(text: string): Database.Statement {
    if (!this.#db.open) {
      throw new GatewayError('NO_CAPACITY', `the ${this.#opened.what} is closed`);
    }
    const known = this.#statements.get(text);
    if (known !== undefined) return known;
    const statement = this.#db.prepare(text);
    this.#statements.set(text, statement);
    return statement;
  }

  /** One transaction; an error of SQLite comes out as DISK_FULL or INTERNAL. */
  atomically<T>(work: () => T): T {
    try {
      // Not libsql's transaction(): SQLite has rolled back by itself when the disk is full, and the error of rolling back
      // once more would take that error's place.
      this.#db.exec('BEGIN IMMEDIATE');
      const result = work();
      this.#db.exec('COMMIT');
      this.#commits += 1;
      return result;
    } catch (error) {
      if (this.#db.inTransaction) this.#db.exec('ROLLBACK');
      if (error instanceof GatewayError) throw error;
      const isFull = (error as { readonly code?: string }).code?.startsWith('SQLITE_FULL') ?? false;
      const code = isFull ? 'DISK_FULL' : 'INTERNAL';
      throw new GatewayError(code, `the ${this.#opened.what} could not be written`, {
        cause: error,
      });
    }
  }

  /** Resolves when all that is committed now survives a loss of power. Throws INTERNAL when the disk failed: then for ever,
   *  as the system takes pages that it could not write for clean and would call the next sync a success. */
  async durable(): Promise<void> {
    const { log } = this.#opened;
    const wanted = this.#commits;
    while (log !== null && this.#durableCommits < wanted) {
      if (this.#failure !== null) throw this.#failure;
      this.#syncing ??= this.#sync(log);
      await this.#syncing;
    }
  }

  /** The same, holding the event loop. */
  durableNow(): void {
    const { log, what } = this.#opened;
    if (this.#failure !== null) throw this.#failure;
    try {
      if (log !== null) fdatasyncSync(log);
      this.#durableCommits = this.#commits;
    } catch (error) {
      this.#failure = syncError(error, what);
      throw this.#failure;
    }
  }

  /** Never rejects. */
  async #sync(log: number): Promise<void> {
    const covered = this.#commits;
    try {
      await this.#opened.syncFile(log);
      this.#durableCommits = covered;
    } catch (error) {
      this.#failure = syncError(error, this.#opened.what);
    } finally {
      this.#syncing = null;
    }
  }

  close(): void {
    if (!this.#db.open) return;
    const { lock, log } = this.#opened;
    closeAll(lock, this.#db); // Its checkpoint syncs the log and what it moves.
    this.#durableCommits = this.#commits;
    if (log === null) return;
    if (this.#syncing === null) closeSync(log);
    else void this.#syncing.then(() => closeSync(log));
  }
}

function syncError(error: unknown, what: string): GatewayError {
  const code = (error as NodeJS.ErrnoException).code ?? 'unknown error';
  const message = `the ${what} may not survive a loss of power (${code}): start again`;
  return new GatewayError('INTERNAL', message, { cause: error });
}

/** Throws NO_CAPACITY while another process has the database, UNSUPPORTED for another schema. */
export function openDatabase(options: DatabaseOptions): OwnDatabase {
  const { path, bytesMax, schema, syncFile = promisify(fdatasync) } = options;
  const opened: Database.Database[] = [];
  try {
    // Leases are this process's memory, so nobody else may delete what they keep: a transaction that is held on a file of
    // its own keeps others out, and the system ends it with the process. (locking_mode = EXCLUSIVE would do, but libsql 0.5
    // finalises statements at garbage collection only, and until then a closed database stays locked.)
    const lock = new Database(path === ':memory:' ? path : `${path}.lock`);
    opened.push(lock);
    lock.exec('BEGIN EXCLUSIVE');
    const db = new Database(path);
    opened.push(db);
    for (const setting of [
      'journal_mode = WAL',
      'synchronous = NORMAL',
      'busy_timeout = 2000', // A backup may read the file meanwhile.
      'foreign_keys = ON',
      'trusted_schema = OFF',
      'journal_size_limit = 4194304',
    ]) {
      db.pragma(setting);
    }
    const { page_size: pageBytes } = db.prepare('PRAGMA page_size').get() as { page_size: number };
    db.pragma(`max_page_count = ${Math.ceil(bytesMax / pageBytes)}`);
    // Not transaction(), whose own rollback would hide that the disk is full.
    db.exec('BEGIN IMMEDIATE');
    migrate(db, schema);
    db.exec('COMMIT');
    const log = path === ':memory:' ? null : openLog(path);
    return new OwnDatabase({ lock, db, log, syncFile, what: schema.what });
  } catch (error) {
    for (const database of opened) {
      if (database.inTransaction) database.exec('ROLLBACK'); // close() alone may leave it locked.
      database.close();
    }
    throw openError(error, schema.what);
  }
}

/** The log of an open database: SQLite makes it once and keeps it until the database is closed. What was committed so far
 *  is durable then, the file's own entry in its directory included. */
function openLog(path: string): number {
  const log = openSync(`${path}-wal`, constants.O_RDWR);
  fdatasyncSync(log);
  const directory = openSync(dirname(path), constants.O_RDONLY);
  try {
    fsyncSync(directory);
  } finally {
    closeSync(directory);
  }
  return log;
}

function closeAll(lock: Database.Database, db: Database.Database): void {
  if (!db.open) return;
  try {
    db.pragma('wal_checkpoint(TRUNCATE)'); // SQLite does it at close only once the statements are gone.
  } catch {
    // A full disk: the next open reads the log.
  }
  db.close();
  lock.exec('ROLLBACK');
  lock.close();
}

function migrate(db: Database.Database, { what, version, tables }: Schema): void {
  const known = db.prepare("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'schema'");
  if (known.get() === undefined) {
    db.exec(`CREATE TABLE schema (version INTEGER NOT NULL) STRICT;
      INSERT INTO schema VALUES (${version}); ${tables}`);
    return;
  }
  const found = db.prepare('SELECT version FROM schema').get() as { version: number };
  if (found.version === version) return;
  const message = `the ${what} has schema ${found.version}, this build reads ${version} only`;
  throw new GatewayError('UNSUPPORTED', message);
}

function openError(error: unknown, what: string): GatewayError {
  if (error instanceof GatewayError) return error;
  const code = (error as { readonly code?: string }).code ?? 'unknown error';
  if (code.startsWith('SQLITE_BUSY') || code.startsWith('SQLITE_LOCKED')) {
    const message = `another process uses this ${what}`;
    return new GatewayError('NO_CAPACITY', message, { cause: error });
  }
  if (code.startsWith('SQLITE_FULL')) {
    return new GatewayError('DISK_FULL', `no room left for the ${what}`, { cause: error });
  }
  return new GatewayError('INTERNAL', `the ${what} cannot be opened (${code})`, { cause: error });
}
