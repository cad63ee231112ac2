// Bases and sketches by module, as the `.coso.safetensors` beside an adapter: f64, so that a basis stays orthonormal.

import type { Columns } from '../adapters/orthogonal.ts';
import { GatewayError } from '../errors.ts';
import { readSafetensors, writeSafetensors } from '../model/safetensors.ts';

export function writeBases(bases: ReadonlyMap<string, Columns>): Uint8Array {
  const tensors = Array.from(bases, ([name, { rows, columns, data }]) => {
    const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    return [name, { dtype: 'F64' as const, shape: [columns, rows], data: bytes }] as const;
  });
  return writeSafetensors(new Map(tensors));
}

/** Throws INVALID_ADAPTER for a file that is none of these. */
export function readBases(file: Uint8Array): Map<string, Columns> {
  const { tensors } = readSafetensors(file);
  const entries = Array.from(tensors, ([name, { dtype, shape, data }]) => {
    if (dtype !== 'F64' || shape.length !== 2) {
      const message = `coso: ${name} is no matrix of F64`;
      throw new GatewayError('INVALID_ADAPTER', message);
    }
    const [columns, rows] = shape as [number, number];
    const numbers = new Float64Array(new Uint8Array(data).buffer);
    if (!numbers.every(Number.isFinite)) {
      throw new GatewayError('INVALID_ADAPTER', `coso: ${name} has numbers that are not finite`);
    }
    return [name, { rows, columns, data: numbers }] as const;
  });
  return new Map(entries);
}
