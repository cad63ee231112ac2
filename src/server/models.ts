// GET /v1/models and /v1/models/{id}: the base model and every adapter that can be asked for now, as vLLM lists them
// (root, parent), with the generation and the ranks that may be chosen. Read from the registry at each call, so that a
// load shows at once. No path appears: an adapter's root is its generation.

import type { AdapterRecord } from '../adapters/registry.ts';
import type { ServerDeps } from './deps.ts';
import type { Route } from './env.ts';
import { notFound } from './model-reference.ts';

export function modelRoutes(deps: ServerDeps): readonly Route[] {
  return [
    {
      method: 'GET',
      path: '/v1/models',
      access: 'inference',
      handle: (c) =>
        c.json({
          object: 'list',
          data: [
            baseCard(deps),
            ...deps.registry.list().map((record) => adapterCard(record, deps)),
          ],
        }),
    },
    {
      method: 'GET',
      path: '/v1/models/:id',
      access: 'inference',
      handle(c) {
        const id = c.req.param('id') ?? '';
        if (id === deps.config.modelName) return c.json(baseCard(deps));
        const record = deps.registry.find(id);
        if (record === null) throw notFound(id);
        return c.json(adapterCard(record, deps));
      },
    },
  ];
}

function baseCard({ config, engine }: ServerDeps): object {
  return {
    id: config.modelName,
    object: 'model',
    created: config.startedS,
    owned_by: 'rankgate',
    root: config.modelName,
    parent: null,
    generation: `sha256:${engine.base.hash}`,
    ranks: { min: 0, max: 0 },
    max_model_len: engine.base.contextMax,
  };
}

function adapterCard(record: AdapterRecord, { config, engine }: ServerDeps): object {
  return {
    id: record.name,
    object: 'model',
    created: record.updatedS,
    owned_by: 'rankgate',
    root: record.generation,
    parent: config.modelName,
    generation: record.generation,
    ranks: { min: 0, max: record.manifest.rankMax },
    max_model_len: engine.base.contextMax,
  };
}
