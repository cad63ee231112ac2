// Where a worker thread or child process starts: the built `.js` beside the built caller, or the `.ts` source beside the
// source caller, which needs the tsx loader. One rule, so that tests run the very entry that production runs.

/** The entry `name` (relative, without extension: './import-worker') beside the module that asks. */
export function entryUrl(importMetaUrl: string, name: string): URL {
  return new URL(`${name}${isSource(importMetaUrl) ? '.ts' : '.js'}`, importMetaUrl);
}

/** execArgv for `new Worker` or `fork` of such an entry. */
export function entryExecArgv(importMetaUrl: string): string[] {
  return isSource(importMetaUrl) ? ['--import', 'tsx'] : [];
}

function isSource(importMetaUrl: string): boolean {
  return importMetaUrl.endsWith('.ts');
}
