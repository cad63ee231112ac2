import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import {
  type Checkpoint,
  readCheckpoint,
  writeCheckpoint,
} from '../../../src/trainer/checkpoint.ts';

const checkpoint: Checkpoint = {
  step: 12,
  skipped: true,
  taken: 31,
  accumulation: 4,
  learningRate: 0.0003,
  run: 'ab'.repeat(32),
  parameters: Float32Array.of(1, -2, Number.NaN, 1e-40),
  optimizer: Uint8Array.of(1, 2, 3),
};
let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'checkpoint-'));
});
afterEach(() => rmSync(folder, { recursive: true }));

describe('a checkpoint', () => {
  it('comes back as it was, to the bit', async () => {
    const path = await writeCheckpoint(folder, checkpoint);
    expect(readCheckpoint(path)).toEqual(checkpoint);
    expect(await writeCheckpoint(folder, checkpoint)).toBe(path);
  });

  it('is one of the last two: others are removed', async () => {
    for (const step of [9, 10, 11, 100_000]) await writeCheckpoint(folder, { ...checkpoint, step });
    const steps = readdirSync(folder).map((name) => Number(name.slice(5, 12)));
    expect(steps.sort((a, b) => a - b)).toEqual([11, 100_000]);
  });

  it('is refused when a bit of it is another one, or its name', async () => {
    const path = await writeCheckpoint(folder, checkpoint);
    const bytes = readFileSync(path);
    for (let at = 0; at < bytes.length; at += 7) {
      const broken = Uint8Array.from(bytes);
      broken[at]! ^= 1 << (at % 8);
      writeFileSync(path, broken);
      expect(() => readCheckpoint(path)).toThrow('not those that were written');
    }
    writeFileSync(path, bytes.subarray(0, -1));
    expect(() => readCheckpoint(path)).toThrow('not those that were written');
    const renamed = join(folder, 'step.safetensors');
    writeFileSync(renamed, bytes);
    expect(() => readCheckpoint(renamed)).toThrow('not those that were written');
  });

  it('is refused when it is not there', async () => {
    const path = await writeCheckpoint(folder, checkpoint);
    rmSync(path);
    expect(() => readCheckpoint(path)).toThrow('cannot be read (ENOENT)');
  });

  it('that cannot be written says so, and leaves nothing half', async () => {
    const gone = join(folder, 'gone');
    await expect(writeCheckpoint(gone, checkpoint)).rejects.toMatchObject({
      code: 'INTERNAL',
      message: 'what was trained cannot be written (ENOENT)',
    });
    expect(readdirSync(folder)).toEqual([]);
  });
});
