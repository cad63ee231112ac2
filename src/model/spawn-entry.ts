// Where a worker thread or child process starts: the built `.js` beside the built caller, or the `.ts` source beside the
// source caller, which needs the tsx loader. One rule, so that tests run the very entry that production runs.

import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

/** The entry `name` (relative, without extension: './import-worker') beside the module that asks. */
export function entryUrl(importMetaUrl: string, name: string): URL {
  return new URL(`${name}${isSource(importMetaUrl) ? '.ts' : '.js'}`, importMetaUrl);
}

/** execArgv for `fork` of such an entry. */
export function entryExecArgv(importMetaUrl: string): string[] {
  return isSource(importMetaUrl) ? ['--import', 'tsx'] : [];
}

/** The entry of a `new Worker`: in Node 20 a thread ignores the loader hooks of `--import tsx`, so a source is started
 *  through one line that registers them in the thread. Needs no execArgv. */
export function workerUrl(importMetaUrl: string, name: string): URL {
  const entry = entryUrl(importMetaUrl, name);
  if (!isSource(importMetaUrl)) return entry;
  // The CommonJS build that require.resolve('tsx/esm/api') finds cannot register from a thread (tsx 4.23.15).
  const tsx = pathToFileURL(createRequire(importMetaUrl).resolve('tsx/package.json'));
  const api = new URL('./dist/esm/api/index.mjs', tsx);
  const code = `import { register } from '${api}'; register(); await import('${entry}');`;
  return new URL(`data:text/javascript,${encodeURIComponent(code)}`);
}

function isSource(importMetaUrl: string): boolean {
  return importMetaUrl.endsWith('.ts');
}
