// `rankgate serve`: fetches the base model with a progress bar, starts the gateway, and prints a curl that works.

import { join } from 'node:path';
import { type Config, childEnvironment } from './config.ts';
import { fetchBaseModel, type ModelFile } from './model/model-source.ts';
import { createProgress, type Terminal } from './terminal.ts';

export interface ServeOptions {
  readonly json: boolean;
  readonly terminal: Terminal;
}

/** Aborts on a signal while no gateway is there yet to drain. */
export async function fetchModel(config: Config, terminal: Terminal): Promise<ModelFile> {
  const controller = new AbortController();
  const stop = (): void => controller.abort(new Error('stopped'));
  process.once('SIGINT', stop).once('SIGTERM', stop);
  try {
    return await fetchBaseModel(config.model, {
      dir: join(config.dataDir, 'models'),
      environment: childEnvironment(terminal.environment),
      signal: controller.signal,
      onProgress: createProgress(terminal.err, terminal.isTerminal),
      ...(config.hubUrl === null ? {} : { hubUrl: config.hubUrl }),
      ...(config.hubToken === null ? {} : { hubToken: config.hubToken }),
    });
  } finally {
    process.off('SIGINT', stop).off('SIGTERM', stop);
  }
}

export function curlOf(url: string, modelName: string, needsKey: boolean): string {
  const body = JSON.stringify({
    model: modelName,
    stream: true,
    temperature: 0,
    messages: [{ role: 'user', content: 'What is the capital of France?' }],
  });
  const key = needsKey ? ` -H "authorization: Bearer $RANKGATE_API_KEY"` : '';
  return `curl -N ${url}/v1/chat/completions -H 'content-type: application/json'${key} -d '${body}'`;
}

export async function serve(config: Config, options: ServeOptions): Promise<void> {
  const { terminal } = options;
  const model = await fetchModel(config, options.terminal);
  // Loaded now: the other commands do without the server's modules.
  const { closeOnSignals, startGateway } = await import('./main.ts');
  const gateway = await startGateway(config, model);
  closeOnSignals(gateway, () => process.exit(0));
  const { url, modelName } = gateway;
  const curl = curlOf(url, modelName, config.apiKeys.length > 0);
  if (options.json) terminal.out(`${JSON.stringify({ event: 'ready', url, model: modelName })}\n`);
  else terminal.err(`\n${modelName} is served on ${url}. Try:\n\n${curl}\n\n`);
}
