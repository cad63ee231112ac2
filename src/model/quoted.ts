/** A name out of a file, for an error message: escaped, so that it cannot break a log line, and short. */
export function quoted(name: string): string {
  return JSON.stringify(name.length > 100 ? `${name.slice(0, 100)}…` : name);
}
