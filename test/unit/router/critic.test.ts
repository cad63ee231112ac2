import { describe, expect, it } from 'vitest';
import { Critic, type CriticOptions } from '../../../src/router/critic.ts';
import { createRng } from '../../support/random.ts';

// A queue of 0…9 requests that is served fast (worth 0.7) or well (worth 1), each with an even chance; worth nothing when it
// is too long for that. Small enough for its true values to be computed.
const lengths = 10;
const discount = 0.9;
const arrivals = [0.3, 0.4, 0.3]; // chances of 0, 1, 2 new requests

type Choice = 'fast' | 'well';
const choices: readonly Choice[] = ['fast', 'well'];

function rewardOf(length: number, choice: Choice): number {
  if (choice === 'fast') return length <= 7 ? 0.7 : 0;
  return length <= 4 ? 1 : 0;
}

function nextLength(length: number, choice: Choice, arrived: number): number {
  const served = choice === 'fast' ? 2 : 0;
  return Math.min(lengths - 1, Math.max(0, length - served) + arrived);
}

function trueValues(): number[][] {
  let values = Array.from({ length: lengths }, () => [0, 0]);
  for (let sweep = 0; sweep < 400; sweep++) {
    values = values.map((_, length) =>
      choices.map((choice) => {
        const later = arrivals.map((chance, arrived) => {
          const [fast, well] = values[nextLength(length, choice, arrived)] as [number, number];
          return (chance * (fast + well)) / 2;
        });
        return rewardOf(length, choice) + discount * later.reduce((a, b) => a + b, 0);
      }),
    );
  }
  return values;
}

const seen = (length: number, choice: Choice): Float64Array =>
  Float64Array.of(1, length / (lengths - 1), choice === 'fast' ? 0 : 1);

/** Mean |Q − truth| after so many decisions. */
function errorAfter(decisions: number, seed: number, options: Partial<CriticOptions>): number {
  const rng = createRng(seed);
  const critic = new Critic(3, { discount, regularizer: 'none', ...options });
  let length = 0;
  let choice: Choice = 'fast';
  for (let i = 0; i < decisions; i++) {
    const u = rng.next();
    const next = nextLength(length, choice, u < 0.3 ? 0 : u < 0.7 ? 1 : 2);
    const nextChoice = choices[rng.below(2)]!;
    critic.learn(seen(length, choice), rewardOf(length, choice), seen(next, nextChoice));
    [length, choice] = [next, nextChoice];
  }
  const errors = trueValues().flatMap((values, at) =>
    values.map((value, i) => Math.abs(critic.value(seen(at, choices[i]!)) - value)),
  );
  return errors.reduce((a, b) => a + b, 0) / errors.length;
}

const seeds = Array.from({ length: 10 }, (_, i) => i + 1);
const mean = (values: readonly number[]): number =>
  values.reduce((a, b) => a + b, 0) / values.length;

describe('the critic', () => {
  it('comes near the true values of a queue, and BEER does not take it further away', () => {
    const untaught = mean(trueValues().flat());
    const plain = mean(seeds.map((seed) => errorAfter(20_000, seed, {})));
    const held = mean(seeds.map((seed) => errorAfter(20_000, seed, { regularizer: 'beer' })));
    expect(plain).toBeLessThan(0.15 * untaught);
    expect(held).toBeLessThanOrEqual(1.05 * plain);
    expect(held).not.toBe(plain);
  });

  it('is refused with BEER and without a discount', () => {
    for (const none of [0, -1, Number.NaN]) {
      expect(() => new Critic(3, { discount: none, regularizer: 'beer' })).toThrow(
        expect.objectContaining({ code: 'INVALID_REQUEST' }),
      );
    }
    expect(() => new Critic(3, { discount: 0, regularizer: 'none' })).not.toThrow();
  });

  it('goes on from what it saved, and refuses weights of another size', () => {
    const critic = new Critic(2, { discount: 0.5, regularizer: 'none' });
    const x = Float64Array.of(1, 0.5);
    for (let i = 0; i < 50; i++) critic.learn(x, 1, x);
    const again = new Critic(2, { discount: 0.5, regularizer: 'none' });
    expect(again.value(x)).toBe(0);
    expect(again.restore(critic.save())).toBe(true);
    expect(again.value(x)).toBe(critic.value(x));
    expect(critic.value(x)).toBeGreaterThan(0.5);
    expect(new Critic(3, { discount: 0.5, regularizer: 'none' }).restore(critic.save())).toBe(
      false,
    );
  });
});
