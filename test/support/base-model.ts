// The real base model for tests that need one. Fetched once into data/ (ignored by git), verified every time.

import { join } from 'node:path';
import { defaultSource, fetchBaseModel } from '../../src/model/model-source.ts';

let pending: Promise<string> | null = null;

export async function baseModelPath(): Promise<string> {
  pending ??= fetchBaseModel(defaultSource, {
    dir: join(import.meta.dirname, '../../data/models'),
  }).then((file) => file.path);
  return pending;
}
