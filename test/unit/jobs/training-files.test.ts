import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { open, rename } from 'node:fs/promises';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { TrainingFile } from '../../../src/jobs/job.ts';
import type { ReceivedFile, TrainingFilesOptions } from '../../../src/jobs/training-files.ts';
import { newJob } from '../../support/job-stores.ts';
import { createTestTraining, type TestTraining } from '../../support/test-training.ts';

let training: TestTraining;
beforeEach(() => {
  training = createTestTraining();
});
afterEach(() => training[Symbol.dispose]());

function received(text: string, over: Partial<ReceivedFile> = {}): [string, ReceivedFile] {
  const path = join(training.uploadRoot, 'file');
  writeFileSync(path, text);
  const about = { owner: '', filename: 'a.jsonl', bytes: text.length, examples: 1, sha256: 'x' };
  return [path, { ...about, ...over }];
}

const add = (text: string, over: Partial<ReceivedFile> = {}): Promise<TrainingFile> =>
  training.files.add(...received(text, over));

describe('training files', () => {
  it('are there for the next process, with their bytes', async () => {
    const file = await add('{"a":1}\n');
    expect(file).toMatchObject({ id: 'file-id1', filename: 'a.jsonl', bytes: 8, examples: 1 });
    const next = training.reopenFiles();
    expect(next.find(file.id, null)).toEqual(file);
    expect(readFileSync(next.pathOf(file.id), 'utf8')).toBe('{"a":1}\n');
  });

  it('that a crash left half-way are swept at the start', async () => {
    const file = await add('whole');
    writeFileSync(join(training.directory, 'file-renamed-but-unknown.jsonl'), 'x');
    writeFileSync(join(training.directory, 'file-id1.jsonl.part'), 'x');
    mkdirSync(join(training.directory, 'folder'));
    training.reopenFiles();
    expect(readdirSync(training.directory)).toEqual([`${file.id}.jsonl`]);
  });

  it('are the owner’s alone, and the operator’s to see', async () => {
    const file = await add('x', { owner: 'acme' });
    expect(training.files.find(file.id, 'acme')).toEqual(file);
    expect(training.files.find(file.id, 'rival')).toBeNull();
    expect(training.files.find(file.id, null)).toEqual(file);
    const wish = { after: null, limit: 10, order: 'desc' } as const;
    expect(training.files.list('rival', wish).items).toEqual([]);
    expect(training.files.list('acme', wish).items).toEqual([file]);
  });

  it('are held to an owner’s number and bytes, also when several arrive at once', async () => {
    expect(training.files.room('')).toBe(100_000);
    await add('x', { bytes: 60_000 });
    expect(training.files.room('')).toBe(40_000);
    await expect(add('x', { bytes: 40_001 })).rejects.toMatchObject({ code: 'QUOTA_EXCEEDED' });
    expect(readdirSync(training.directory)).toHaveLength(1); // what was refused lies nowhere
    for (let i = 0; i < 3; i++) await add('x');
    expect(() => training.files.room('')).toThrow(
      expect.objectContaining({ code: 'QUOTA_EXCEEDED' }),
    );
    expect(training.files.room('acme')).toBe(100_000);
  });

  it('stay while a job needs them, and go afterwards', async () => {
    const file = await add('x');
    const other = await add('x');
    const job = training.jobs.create('', null, { ...newJob(file.id), validationFile: other.id });
    for (const one of [file, other]) {
      await expect(training.files.remove(one)).rejects.toMatchObject({
        code: 'FILE_IN_USE',
        message: `${job.id} needs the file`,
      });
    }
    training.jobs.cancel(job);
    await training.files.remove(file);
    expect(training.files.find(file.id, null)).toBeNull();
    expect(existsSync(training.files.pathOf(file.id))).toBe(false);
  });

  it('are there whole or not at all, whatever call fails', async () => {
    type Calls = TrainingFilesOptions['files'];
    // Each call in turn fails; the first number at which none does ends it.
    for (let failAt = 1; ; failAt++) {
      training[Symbol.dispose]();
      let calls = 0;
      const fail = (): void => {
        calls += 1;
        if (calls === failAt) throw Object.assign(new Error('planted'), { code: 'ENOSPC' });
      };
      const opened: Calls['open'] = async (...args) => {
        fail();
        const handle = await open(...args);
        const sync = handle.sync.bind(handle);
        handle.sync = async () => {
          fail();
          await sync();
        };
        return handle;
      };
      const renamed: Calls['rename'] = async (...args) => {
        fail();
        await rename(...args);
      };
      training = createTestTraining({ files: { open: opened, rename: renamed } });
      const result = await add('x').catch((error: unknown) => error);
      if (calls < failAt) {
        expect(failAt).toBeGreaterThan(3);
        expect(result).toMatchObject({ bytes: 1 });
        return;
      }
      expect(result).toMatchObject({ code: 'DISK_FULL' });
      expect(readdirSync(training.directory)).toEqual([]);
      expect(training.files.list(null, { after: null, limit: 1, order: 'asc' }).items).toEqual([]);
    }
  });

  it('have paths of our own ids only', () => {
    for (const id of ['../x', 'file-../x', 'file-a/b', 'file-', 'x']) {
      expect(() => training.files.pathOf(id)).toThrow('not a file id');
    }
  });
});
