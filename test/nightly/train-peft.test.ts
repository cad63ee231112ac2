import { describe, expect, it } from 'vitest';
import { compareWithPeft, readPeftSteps } from '../support/peft-steps.ts';
import { openRealBase } from '../support/training-base.ts';

describe('twenty LoRA steps, as PEFT and torch take them', () => {
  it('on SmolLM2: every loss within 1e-3', async () => {
    const base = await openRealBase();
    using _ = base.kernels;
    const distances = await compareWithPeft(base, readPeftSteps('smollm2'));
    process.stdout.write(`${JSON.stringify(distances)}\n`);
    expect(distances.loss).toBeLessThan(1e-3);
  }, 600_000);
});
