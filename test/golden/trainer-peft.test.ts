import { describe, expect, it } from 'vitest';
import { compareWithPeft, readPeftSteps } from '../support/peft-steps.ts';
import { openTinyBase } from '../support/training-base.ts';

// Twenty steps of AdamW with warm-up, cosine, clipping, weight decay and accumulation over packed windows, against PEFT on
// torch, one sequence at a time (test/oracle/peft-steps.py). The real model's are test/nightly/train-peft.test.ts.

describe('twenty LoRA steps, as PEFT and torch take them', () => {
  it('on the tiny base: every loss, every gradient norm, and where the factors end', async () => {
    const base = await openTinyBase();
    using _ = base.kernels;
    const { loss, norm, finalNorm } = await compareWithPeft(base, readPeftSteps('tiny'));
    expect(loss).toBeLessThan(1e-3);
    expect(norm).toBeLessThan(1e-2);
    expect(finalNorm).toBeLessThan(1e-3);
  });
});
