// Decoders over real files for tests: the tiny random Llama of test/golden/tiny, and the default base model.

import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { BackendName } from '../../src/kernels/create-kernels.ts';
import type { DeviceWish } from '../../src/kernels/ggml/select-device.ts';
import { type OpenedDecoder, openDecoder } from '../../src/model/open-decoder.ts';
import type { WeightMode } from '../../src/model/weights.ts';
import { baseModelPath } from './base-model.ts';

export const tinyPath: string = join(import.meta.dirname, '../golden/tiny/tiny-f32.gguf');

export interface TestDecoderOptions {
  readonly mode?: WeightMode;
  readonly backend?: BackendName;
  readonly threads?: number;
  readonly device?: DeviceWish;
  readonly native?: boolean;
  readonly cells?: number;
  readonly pages?: number;
  readonly libraryDirectory?: string;
}

const defaults = { backend: 'ggml', threads: 1, cells: 2048, pages: 1 } as const;

export async function openTiny(options: TestDecoderOptions = {}): Promise<OpenedDecoder> {
  return openDecoder({
    ...defaults,
    mode: 'exact',
    ...options,
    modelPath: tinyPath,
    modelHash: createHash('sha256').update(readFileSync(tinyPath)).digest('hex'),
    cacheDirectory: null,
    tokensMax: 128,
    segmentsMax: 16,
  });
}

export async function openBase(
  options: TestDecoderOptions & { readonly mode: WeightMode },
): Promise<OpenedDecoder> {
  return openDecoder({
    ...defaults,
    ...options,
    modelPath: await baseModelPath(),
    modelHash: 'test',
    cacheDirectory: null,
    tokensMax: 768,
    segmentsMax: 32,
  });
}
