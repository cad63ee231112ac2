// An SQLite database of the gateway's own: settings, lock, schema version, transactions. What is acknowledged survives kill -9
// and power loss (WAL, synchronous=FULL). The version is in the file; another program's is refused.

import Database from 'libsql';
import { GatewayError } from './errors.ts';

export interface Schema {
  /** What the file holds, for messages: `registry`. */
  readonly what: string;
  readonly version: number;
  /** The CREATE statements of everything but the version's own table. */
  readonly tables: string;
}

export class OwnDatabase {
  readonly #lock: Database.Database;
  readonly #db: Database.Database;
  readonly #what: string;
  readonly #statements: Map<string, Database.Statement> = new Map();

  constructor(lock: Database.Database, db: Database.Database, what: string) {
    this.#lock = lock;
    this.#db = db;
    this.#what = what;
  }

  get isOpen(): boolean {
    return this.#db.open;
  }

  sql(text: string): Database.Statement {
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
      return result;
    } catch (error) {
      if (this.#db.inTransaction) this.#db.exec('ROLLBACK');
      if (error instanceof GatewayError) throw error;
      const isFull = (error as { readonly code?: string }).code?.startsWith('SQLITE_FULL') ?? false;
      const code = isFull ? 'DISK_FULL' : 'INTERNAL';
      throw new GatewayError(code, `the ${this.#what} could not be written`, { cause: error });
    }
  }

  close(): void {
    closeAll(this.#lock, this.#db);
  }
}

/** Throws NO_CAPACITY while another process has the database, UNSUPPORTED for another schema. A database that
 *  would grow beyond `bytesMax` fails as on a full disk. */
export function openDatabase(path: string, bytesMax: number, schema: Schema): OwnDatabase {
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
      'synchronous = FULL',
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
    return new OwnDatabase(lock, db, schema.what);
  } catch (error) {
    for (const database of opened) {
      if (database.inTransaction) database.exec('ROLLBACK'); // close() alone may leave it locked.
      database.close();
    }
    throw openError(error, schema.what);
  }
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
