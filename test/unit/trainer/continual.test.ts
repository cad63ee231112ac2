import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { keptPath } from '../../../src/adapters/blobs.ts';
import { generationOf, openPacked, type PackedAdapter } from '../../../src/adapters/pack.ts';
import { type Bases, directionsIn, readKept } from '../../../src/trainer/continual.ts';
import { readBases } from '../../../src/trainer/coso-file.ts';
import type { Example } from '../../../src/trainer/examples.ts';
import { type RunRecipe, TrainingSession } from '../../../src/trainer/session.ts';
import { openTinyBase, tinyEncoder, tinyRecipe } from '../../support/training-base.ts';

// CoSO through sessions: one task after another over the tiny model, and what is left of the first.

const base = await openTinyBase();
const folder = mkdtempSync(join(tmpdir(), 'continual-'));
afterAll(() => {
  base.kernels[Symbol.dispose]();
  rmSync(folder, { recursive: true });
});
const breathe = async (): Promise<void> => {};

/** Questions of one kind, one answer. */
function taskOf(asked: string, completion: string): Example[] {
  const encode = tinyEncoder(48);
  return Array.from({ length: 12 }, (_, i) =>
    encode({ kind: 'text', prompt: `${asked} ${i}`, completion }),
  );
}
const [old, fresh] = [taskOf('after one', ' two blue'), taskOf('THE MODEL', '; pink = 9')];

interface Trained {
  readonly adapter: PackedAdapter;
  readonly bases: Bases;
  readonly file: { readonly packed: Uint8Array; readonly bases: Uint8Array | null };
}

async function train(
  recipe: RunRecipe,
  training: readonly Example[],
  from: Trained | null = null,
): Promise<Trained> {
  const start = from?.adapter ?? null;
  const options = { base, recipe, training, heldOut: [], start };
  const bases: Bases = recipe.continual === null || from === null ? new Map() : from.bases;
  using session = new TrainingSession({ ...options, bases });
  while (session.step < session.steps) await session.takeStep(breathe);
  const kept = session.bases();
  const { bytes } = session.publish(kept);
  const adapter = openPacked(bytes, generationOf(bytes));
  const file = { packed: bytes, bases: kept };
  return { adapter, bases: kept === null ? new Map() : readBases(kept), file };
}

/** As it is served, with all its ranks. */
async function lossOn(heldOut: readonly Example[], { adapter, file }: Trained): Promise<number> {
  const { rankMax } = adapter.manifest;
  const recipe = tinyRecipe({ kind: 'lora', rank: rankMax, ranks: [rankMax] });
  using session = new TrainingSession({ base, recipe, training: heldOut, heldOut, start: null });
  const packed = { manifest: adapter.manifest, bytes: file.packed };
  return (await session.evaluate(packed, breathe)).at(-1)!.loss;
}

const continual = { kind: 'coso', gap: 5, sketch: 16 };
const recipeOf = (more: object): RunRecipe =>
  tinyRecipe({ kind: 'lora', accumulation: 6, stepsMax: 60, learningRate: 1e-2, ...more });

describe('a task after another', () => {
  it('leaves the first as it was with coso, and forgets it without', async () => {
    const first = await train(recipeOf({ rank: 4, continual }), old);
    const kept = await train(recipeOf({ rank: 8, continual }), fresh, first);
    const plain = await train(recipeOf({ rank: 8 }), fresh, first);
    const [before, withCoso, without] = [
      await lossOn(old, first),
      await lossOn(old, kept),
      await lossOn(old, plain),
    ];
    const learnt = [
      await lossOn(fresh, first),
      await lossOn(fresh, kept),
      await lossOn(fresh, plain),
    ];
    // Nats: 0.679 before, 0.789 with coso, 4.498 without; the new task 8.860, then 0.534 and 0.462.
    expect(withCoso - before).toBeLessThan(0.25);
    expect(without - before).toBeGreaterThan(2);
    expect(learnt[0]).toBeGreaterThan(8);
    expect(learnt[1]).toBeLessThan(learnt[2]! + 0.2);
    // What the second task showed has joined what the first did.
    expect(directionsIn(kept.bases)).toBeGreaterThan(directionsIn(first.bases));
  });
});

describe('what a generation keeps', () => {
  it('is read from beside it, and from nowhere else', async () => {
    const made = await train(recipeOf({ rank: 2, stepsMax: 3, continual }), old);
    const path = join(folder, 'adapter_model.safetensors');
    writeFileSync(path, made.file.packed);
    const refusal = { code: 'INVALID_ADAPTER', message: expect.stringContaining('not beside') };
    await expect(readKept(path, made.adapter)).rejects.toMatchObject(refusal);
    writeFileSync(keptPath(path), made.file.bases!.subarray(1));
    await expect(readKept(path, made.adapter)).rejects.toMatchObject(refusal);
    writeFileSync(keptPath(path), made.file.bases!);
    expect(await readKept(path, made.adapter)).toEqual(made.bases);
    // One that was trained without it has nothing to keep, whatever lies there.
    const plain = await train(recipeOf({ rank: 2, stepsMax: 3 }), old);
    expect(await readKept(path, plain.adapter)).toEqual(new Map());
    expect(plain.file.bases).toBeNull();
  });

  it('makes another generation of the same numbers', async () => {
    const [one, other] = [
      await train(recipeOf({ rank: 2, stepsMax: 3, continual }), old),
      await train(
        recipeOf({ rank: 2, stepsMax: 3, continual: { ...continual, energy: 0.5 } }),
        old,
      ),
    ];
    expect(directionsIn(other.bases)).toBeLessThan(directionsIn(one.bases));
    expect(other.adapter.generation).not.toBe(one.adapter.generation);
    const { source: _, ...rest } = one.adapter.manifest;
    expect(other.adapter.manifest).toMatchObject(rest);
  });
});
