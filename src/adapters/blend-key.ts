// A blend that has to be computed (blend.ts) by name: the name says everything that it is made of, so the same request is
// the same resident, and nobody keeps a table of them.

import { GatewayError } from '../errors.ts';
import { type Generation, isGeneration } from './adapter.ts';

export type BlendKey = `blend:${string}`;

export interface BlendSpec {
  readonly merge: 'ties' | 'dare_linear' | 'dare_ties';
  /** Share of each part's numbers that is kept, (0, 1]. */
  readonly density: number;
  readonly parts: readonly {
    readonly generation: Generation;
    readonly rank: number;
    readonly weight: number;
  }[];
}

export function blendKey({ merge, density, parts }: BlendSpec): BlendKey {
  const texts = parts.map(({ generation, rank, weight }) => `${generation}*${rank}*${weight}`);
  return `blend:${merge}:${density}:${texts.join()}`;
}

export function isBlendKey(key: Generation | BlendKey): key is BlendKey {
  return key.startsWith('blend:');
}

export function parseBlendKey(key: BlendKey): BlendSpec {
  const [, merge, density, texts] =
    /^blend:(ties|dare_linear|dare_ties):([^:]+):(.+)$/.exec(key) ?? [];
  const parts = (texts ?? '').split(',').map((text) => {
    const [generation = '', rank, weight] = text.split('*');
    if (!isGeneration(generation)) throw new GatewayError('INTERNAL', 'not the key of a blend');
    return { generation, rank: Number(rank), weight: Number(weight) };
  });
  return { merge: merge as BlendSpec['merge'], density: Number(density), parts };
}
