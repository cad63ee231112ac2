// The registry's tables.

import type { Schema } from '../database.ts';

const tables = `
  CREATE TABLE generations (
    generation TEXT PRIMARY KEY,
    manifest TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    needs TEXT REFERENCES generations (generation) -- the file of shared tensors that it is served with
  ) STRICT;
  CREATE INDEX generations_by_needs ON generations (needs);
  CREATE TABLE names (
    name TEXT PRIMARY KEY,
    generation TEXT NOT NULL REFERENCES generations (generation),
    updated_s INTEGER NOT NULL,
    is_pinned INTEGER NOT NULL DEFAULT 0
  ) STRICT;
  CREATE INDEX names_by_generation ON names (generation);
  CREATE TABLE aliases (
    name TEXT PRIMARY KEY, -- never one of names: the code holds that
    target TEXT NOT NULL REFERENCES names (name)
  ) STRICT;
  CREATE INDEX aliases_by_target ON aliases (target, name);
  CREATE TABLE previous (
    step INTEGER PRIMARY KEY AUTOINCREMENT, -- the larger, the later
    name TEXT NOT NULL REFERENCES names (name) ON DELETE CASCADE,
    generation TEXT NOT NULL REFERENCES generations (generation)
  ) STRICT;
  CREATE INDEX previous_by_name ON previous (name, step);
  CREATE INDEX previous_by_generation ON previous (generation);
`;

export const registrySchema: Schema = {
  what: 'registry',
  // 1 held manifests of format 2, whose packed files this build does not read.
  version: 2,
  tables,
};
