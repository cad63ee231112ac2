// vLLM's runtime adapter calls, so that its ecosystem's clients work unchanged: same fields, same plain-text answers. Off
// unless the configuration turns them on, as in vLLM; the path jail and the admin key apply to them like to /v1/adapters.

import type { Context } from 'hono';
import { z } from 'zod';
import { isAdapterName } from '../adapters/adapter.ts';
import { GatewayError } from '../errors.ts';
import { adapterName, removeAdapter } from './adapters.ts';
import { checkTarget, directoryName, localDirectory, publishAdapter } from './add-adapter.ts';
import type { ServerDeps } from './deps.ts';
import type { Env } from './env.ts';
import { readBody } from './limits.ts';
import { HttpError, invalidRequest } from './problem.ts';

const loadSchema = z.strictObject({
  lora_name: adapterName,
  lora_path: directoryName,
  load_inplace: z.boolean().exactOptional(),
});
const unloadSchema = z.strictObject({ lora_name: z.string().min(1).max(256) });

export async function loadLora(c: Context<Env>, deps: ServerDeps): Promise<Response> {
  checkEnabled(deps);
  const body = await readBody(c, deps, loadSchema);
  const { lora_name: name, lora_path: source, load_inplace: replace = false } = body;
  if (!replace && deps.registry.find(name) !== null) {
    // vLLM answers 400 here, where /v1/adapters answers 409.
    throw invalidRequest(`The lora adapter '${name}' has already been loaded.`, 'lora_name');
  }
  checkTarget(c, deps, { name, replace });
  const directory = await localDirectory(c, deps, source, 'lora_path');
  await publishAdapter(c, deps, { name, replace }, directory);
  return c.text(`Success: LoRA adapter '${name}' added successfully.`);
}

export async function unloadLora(c: Context<Env>, deps: ServerDeps): Promise<Response> {
  checkEnabled(deps);
  const body = await readBody(c, deps, unloadSchema);
  const record = isAdapterName(body.lora_name) ? deps.registry.find(body.lora_name) : null;
  if (record === null) {
    throw new GatewayError('ADAPTER_NOT_FOUND', 'The lora adapter cannot be found.', {
      param: 'lora_name',
    });
  }
  const { generation } = record;
  removeAdapter({ name: body.lora_name, generation }, null, deps);
  return c.text(`Success: LoRA adapter '${body.lora_name}' removed successfully.`);
}

function checkEnabled({ config }: ServerDeps): void {
  if (!config.runtimeLoraUpdating) {
    throw new HttpError(
      404,
      'runtime_lora_updating_disabled',
      'this call is off: set runtimeLoraUpdating in the configuration to turn it on, ' +
        'or use POST /v1/adapters',
    );
  }
}
