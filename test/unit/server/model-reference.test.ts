import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { resolveModel } from '../../../src/server/model-reference.ts';
import { FakeRegistry, fakeGeneration, fakeManifest } from '../../support/fake-registry.ts';

const known = { modelName: 'tiny-base', tiers: { instant: {} } };
const generation = fakeGeneration('a1');

function registry(): FakeRegistry {
  const registry = new FakeRegistry();
  registry.store(generation, fakeManifest(8), 1);
  registry.create('support', generation);
  return registry;
}

describe('resolveModel', () => {
  it.each([
    ['tiny-base', null, null],
    ['tiny-base:instant', null, 'instant'],
    ['support', 'support', null],
    ['support:instant', 'support', 'instant'],
    [`support@${generation}`, 'support', null],
    [`support@${generation}:instant`, 'support', 'instant'],
  ])('%s', (asked, name, tier) => {
    const target = resolveModel(asked, known, registry());
    expect(target).toMatchObject({ asked, tier });
    expect(target.lease?.name ?? null).toBe(name);
  });

  it.each(['../x', 'Support', 'a/b/c', 'a/', '/a', '', ' ', 'x'.repeat(65), 'a,b'])(
    'asks the registry for names only: %j',
    (asked) => {
      const own = registry();
      own.lease = () => {
        throw new Error('asked');
      };
      expect(() => resolveModel(asked, known, own)).toThrow(/does not exist/);
    },
  );

  it('gives the base model for its own name only, and leaks no lease in refusing', () => {
    const parts = fc.constantFrom(
      'support',
      'tiny-base',
      '@',
      ':',
      generation,
      'instant',
      '',
      ' ',
      '/',
      '..',
      'x',
    );
    const names = fc.oneof(
      fc.string(),
      fc.array(parts, { maxLength: 6 }).map((some) => some.join('')),
    );
    fc.assert(
      fc.property(names, (asked) => {
        const own = registry();
        let target: ReturnType<typeof resolveModel> | null = null;
        try {
          target = resolveModel(asked, known, own);
        } catch (error) {
          expect(error).toMatchObject({ code: 'MODEL_NOT_FOUND', param: 'model' });
        }
        if (target?.lease === null) expect(['tiny-base', 'tiny-base:instant']).toContain(asked);
        expect(own.leasesOpen).toBe(target?.lease ? 1 : 0);
      }),
      { numRuns: 1000 },
    );
  });
});
