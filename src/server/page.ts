// A page of the API's: one title and one body, in which nothing is fetched or run.

import type { Context } from 'hono';
import type { Env } from './env.ts';

export function answerPage(c: Context<Env>, title: string, body: string): Response {
  c.header('content-security-policy', "default-src 'none'; style-src 'unsafe-inline'");
  return c.html(
    `<!doctype html><html lang="en"><meta charset="utf-8"><title>rankgate: ${title}</title>` +
      `<body style="font:13px system-ui,sans-serif">${body}</body></html>`,
  );
}

/** Of texts that are not ours. */
export const escaped = (words: string): string =>
  words.replaceAll(/[&<>"']/g, (one) => `&#${one.charCodeAt(0)};`);
