// GET /v1/models and /v1/models/{id}: the base model and every adapter that can be asked for now, as vLLM lists them
// (root, parent), with the generation and the ranks that may be chosen; an alias has a card of its own. Read from the registry at each call, so that a
// load shows at once. No path appears: an adapter's root is its generation.

import type { Context } from 'hono';
import type { AdapterRecord } from '../adapters/registry.ts';
import type { ServerDeps } from './deps.ts';
import type { Env } from './env.ts';
import { notFound } from './model-reference.ts';

export function listModels(c: Context<Env>, deps: ServerDeps): Response {
  const cards = deps.registry
    .list()
    .flatMap((record) => [record.name, ...record.aliases].map((id) => cardOf(id, record, deps)));
  return c.json({ object: 'list', data: [cardOf(deps.config.modelName, null, deps), ...cards] });
}

export function showModel(c: Context<Env>, deps: ServerDeps): Response {
  const id = c.req.param('id') ?? '';
  if (id === deps.config.modelName) return c.json(cardOf(id, null, deps));
  const record = deps.registry.find(id);
  if (record === null) throw notFound(id);
  return c.json(cardOf(id, record, deps));
}

/** null is the base model. */
function cardOf(id: string, record: AdapterRecord | null, { config, engine }: ServerDeps): object {
  return {
    id,
    object: 'model',
    created: record?.updatedS ?? config.startedS,
    owned_by: 'rankgate',
    root: record?.generation ?? config.modelName,
    parent: record === null ? null : config.modelName,
    generation: record?.generation ?? `sha256:${engine.base.hash}`,
    ranks: { min: 0, max: record?.manifest.rankMax ?? 0 },
    max_model_len: engine.base.contextMax,
  };
}
