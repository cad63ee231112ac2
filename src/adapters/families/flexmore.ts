// FlexMoRE: experts of different rank, up to full, each extracted from a fine-tune by SVD, mixed with router weights:
// y += Σ_e w_e·B_e·A_e·x. The weights hold for a whole request (a blend changes them); a router per token is not covered.
// Stored with the experts' ranks in turn, each expert's largest first, so that a prefix has the best of every expert.

import { GatewayError } from '../../errors.ts';
import type { LoraModule } from '../squeeze.ts';
import { type Family, pairFamily, slice, type Tensors, tensorsOf } from './family.ts';
import { filled, uniform, zeros } from './matrices.ts';

export interface FlexmoreOptions {
  readonly experts: readonly { readonly name: string; readonly rank: number }[];
}

export function flexmore({ experts }: FlexmoreOptions): Family {
  const names = experts.map(({ name, rank }) => `${name} (rank ${rank})`).join(', ');
  const family: Family = pairFamily({
    kind: 'flexmore',
    describe: `FlexMoRE: ${experts.length} experts: ${names}`,
    axes: {
      a: ['rank', 'in'],
      b: ['rank', 'out'],
      expert: ['rank', 1],
      weights: [experts.length, 1],
    },
    trained: ['a', 'b', 'weights'],
    init(site, random) {
      const members = experts.map(({ rank }): LoraModule => {
        const kept = Math.min(rank, site.in, site.out);
        const a = filled(kept, site.in, uniform(1 / Math.sqrt(site.in), random)).data;
        const b = zeros(kept, site.out).data;
        return { rank: kept, in: site.in, out: site.out, a, b, scale: 1 };
      });
      return mixture(
        members,
        experts.map(() => 1 / experts.length),
      );
    },
    pair(_site, tensors, k) {
      const { a, b, expert, weights } = k === null ? tensors : slice(family, tensors, k);
      const members = Array.from(expert!.data, (index) => {
        if (Number.isInteger(index) && index >= 0 && index < experts.length) return index;
        throw new GatewayError('INVALID_ADAPTER', `flexmore: there is no expert ${index}`);
      });
      return {
        a: a!,
        b: b!,
        gates: Float64Array.from(members, (index) => weights!.data[index]!),
        gradient(d) {
          const dw = zeros(experts.length, 1);
          members.forEach((index, i) => {
            dw.data[index]! += d.gates[i]!;
          });
          return { a: d.a, b: d.b, weights: dw };
        },
      };
    },
    fromPeft: (_site, module) =>
      experts.length === 1
        ? mixture([module], [1])
        : `one LoRA is one expert, and this mixes ${experts.length}`,
  });
  return family;
}

/** Experts in a module, each with its ranks in order, largest first. */
export function mixture(experts: readonly LoraModule[], weights: readonly number[]): Tensors {
  const order = experts
    .flatMap(({ rank }, e) => Array.from({ length: rank }, (_, i) => ({ e, i })))
    .sort((x, y) => x.i - y.i || x.e - y.e);
  const pairs = experts.map(tensorsOf);
  const pick = (side: 'a' | 'b') => {
    const { rows } = pairs[0]![side];
    const data = new Float64Array(rows * order.length);
    order.forEach(({ e, i }, to) => {
      data.set(pairs[e]![side].data.subarray(i * rows, (i + 1) * rows), to * rows);
    });
    return { rows, columns: order.length, data };
  };
  const expert = Float64Array.from(order, ({ e }) => e);
  return {
    a: pick('a'),
    b: pick('b'),
    expert: { rows: 1, columns: order.length, data: expert },
    weights: { rows: 1, columns: weights.length, data: Float64Array.from(weights) },
  };
}
