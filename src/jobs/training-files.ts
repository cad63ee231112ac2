// Files that jobs learn from: a row, and its bytes beside it. A file is there whole or not at all: it is received elsewhere,
// synced, renamed into place, and only then known; what a crash leaves between is swept at the next start. Names on disk are
// made of our own ids alone.

import { constants, type promises, readdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import type { OwnDatabase } from '../database.ts';
import { GatewayError } from '../errors.ts';
import type { Page, PageWish, TrainingFile, Viewer } from './job.ts';
import { readPage } from './numbered-pages.ts';

export interface TrainingFilesOptions {
  readonly db: OwnDatabase;
  /** Exists; nothing else lies in it. */
  readonly directory: string;
  readonly unixS: () => number;
  /** Unguessable and unique, of [A-Za-z0-9-]. */
  readonly newId: () => string;
  /** Of one owner. */
  readonly filesMax: number;
  readonly bytesMax: number;
  /** The calls that `add` makes: tests make one fail. */
  readonly files: Pick<typeof promises, 'open' | 'rename'>;
}

export type ReceivedFile = Pick<
  TrainingFile,
  'owner' | 'filename' | 'bytes' | 'examples' | 'sha256'
>;

interface FileRow extends Omit<TrainingFile, 'createdS'> {
  readonly number: number;
  readonly created_s: number;
}

const suffix = '.jsonl';

export class TrainingFiles {
  readonly #options: TrainingFilesOptions;
  readonly #db: OwnDatabase;

  constructor(options: TrainingFilesOptions) {
    this.#options = options;
    this.#db = options.db;
    for (const name of readdirSync(options.directory)) {
      const isKnown = name.endsWith(suffix) && this.find(name.slice(0, -suffix.length), null);
      if (!isKnown) rmSync(join(options.directory, name), { recursive: true });
    }
  }

  /** Bytes that the owner may still send. Throws QUOTA_EXCEEDED when it may send nothing. */
  room(owner: string): number {
    const { filesMax, bytesMax } = this.#options;
    const sql =
      'SELECT count(*) AS count, coalesce(sum(bytes), 0) AS bytes FROM files WHERE owner = ?';
    const held = this.#db.sql(sql).get(owner) as { count: number; bytes: number };
    if (held.count < filesMax && held.bytes < bytesMax) return bytesMax - held.bytes;
    const message = `${held.count} files of ${held.bytes} bytes are kept: at most ${filesMax} and ${bytesMax}`;
    throw new GatewayError('QUOTA_EXCEEDED', message);
  }

  /** Takes the synced file at `path` over. It survives a crash when this resolves. Throws QUOTA_EXCEEDED, DISK_FULL. */
  async add(path: string, received: ReceivedFile): Promise<TrainingFile> {
    const { directory, files, newId } = this.#options;
    const id = `file-${newId()}`;
    try {
      await files.rename(path, this.pathOf(id));
      const folder = await files.open(directory, constants.O_RDONLY);
      try {
        await folder.sync(); // A rename is on disk when its directory is.
      } finally {
        await folder.close();
      }
      return this.#insert(id, received);
    } catch (error) {
      rmSync(this.pathOf(id), { force: true });
      throw storeError(error);
    }
  }

  /** null when there is none that `viewer` sees. */
  find(id: string, viewer: Viewer): TrainingFile | null {
    const sql = 'SELECT * FROM files WHERE id = ? AND (? IS NULL OR owner = ?)';
    const row = this.#db.sql(sql).get(id, viewer, viewer) as FileRow | undefined;
    return row === undefined ? null : fileOf(row);
  }

  list(viewer: Viewer, wish: PageWish): Page<TrainingFile> {
    const { items, hasMore } = readPage<FileRow>(this.#db, 'files', viewer, wish);
    return { items: items.map(fileOf), hasMore };
  }

  /** Throws FILE_IN_USE while a job that has not ended needs it. */
  async remove({ id }: TrainingFile): Promise<void> {
    this.#db.atomically(() => {
      const user = this.#db.sql(userOf).get(id, id) as { id: string } | undefined;
      if (user !== undefined) {
        throw new GatewayError('FILE_IN_USE', `${user.id} needs the file`);
      }
      this.#db.sql('DELETE FROM files WHERE id = ?').run(id);
    });
    await this.#db.durable(); // A file that is known is there.
    rmSync(this.pathOf(id), { force: true });
  }

  pathOf(id: string): string {
    if (!/^file-[A-Za-z0-9-]{1,64}$/.test(id)) throw new GatewayError('INTERNAL', 'not a file id');
    return join(this.#options.directory, `${id}${suffix}`);
  }

  #insert(id: string, received: ReceivedFile): TrainingFile {
    const { owner, filename, bytes, examples, sha256 } = received;
    return this.#db.atomically(() => {
      // Again: others of this owner's may have arrived meanwhile.
      if (this.room(owner) < bytes) {
        throw new GatewayError('QUOTA_EXCEEDED', `${bytes} bytes are more than what is left`);
      }
      const values = [id, owner, filename, bytes, examples, sha256, this.#options.unixS()];
      this.#db.sql(insertFile).run(...values);
      return this.find(id, null)!;
    });
  }
}

const insertFile = `
  INSERT INTO files (id, owner, filename, bytes, examples, sha256, created_s)
  VALUES (?, ?, ?, ?, ?, ?, ?)`;

const userOf = `
  SELECT id FROM jobs WHERE state IN ('queued', 'validating_files', 'running')
    AND (training_file = ? OR validation_file = ?) LIMIT 1`;

function fileOf({
  id,
  owner,
  filename,
  bytes,
  examples,
  sha256,
  created_s,
}: FileRow): TrainingFile {
  return { id, owner, filename, bytes, examples, sha256, createdS: created_s };
}

function storeError(error: unknown): GatewayError {
  if (error instanceof GatewayError) return error;
  const code = (error as NodeJS.ErrnoException).code;
  const isFull = code === 'ENOSPC' || code === 'EDQUOT';
  return new GatewayError(isFull ? 'DISK_FULL' : 'INTERNAL', 'the file cannot be kept', {
    cause: error,
  });
}
