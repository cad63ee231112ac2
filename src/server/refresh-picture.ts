// A refresh as a page: losses at each rank before and after, as a table and as curves, and why it was promoted or not.

import type { Context } from 'hono';
import type { RankChange, Verdict } from '../jobs/refresh-gate.ts';
import type { ServerDeps } from './deps.ts';
import type { Env } from './env.ts';
import { jobOf } from './fine-tuning.ts';
import { answerPage, escaped } from './page.ts';
import { HttpError } from './problem.ts';

const [width, height, left, top] = [520, 260, 56, 16];

export function showReport(c: Context<Env>, deps: ServerDeps): Response {
  const { id, request, result } = jobOf(c, deps);
  if (result?.verdict === undefined) {
    throw new HttpError(404, 'not_found', 'a report is of a refresh that has been judged');
  }
  return answerPage(c, 'refresh', drawReport(`${request.adapter}, ${id}`, result.verdict));
}

export function drawReport(title: string, verdict: Verdict): string {
  const { isPromoted, reasons, ranks, heldOut, gain, guard } = verdict;
  const rows = ranks.map(({ rank, before, after }) =>
    row([String(rank), before.toFixed(4), after.toFixed(4), (after - before).toFixed(4)]),
  );
  const shown = (name: string, text: string): string => `<p>${name}: ${escaped(text)}</p>`;
  return (
    `<h1>${escaped(title)}</h1>` +
    `<p>${isPromoted ? 'Passed the gate.' : 'Discarded.'}</p>` +
    `<ul>${reasons.map((reason) => `<li>${escaped(reason)}</li>`).join('')}</ul>` +
    (gain === null ? '' : shown('AURAC', `${signed(gain.v1)} ± ${gain.error.toFixed(4)} nats`)) +
    (guard === null
      ? ''
      : shown('Other text', `${guard.before.toFixed(4)} → ${guard.after.toFixed(4)} nats`)) +
    (ranks.length === 0 ? '' : curves(ranks)) +
    `<table><caption>Held-out loss, ${heldOut} examples</caption>` +
    `${row(['rank', 'before', 'after', 'change'])}${rows.join('')}</table>`
  );
}

/** Ranks on a logarithmic axis. */
function curves(ranks: readonly RankChange[]): string {
  const all = ranks.flatMap(({ before, after }) => [before, after]);
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const span = Math.log2(ranks.at(-1)!.rank) - Math.log2(ranks[0]!.rank);
  const x = (rank: number): number =>
    left + ((Math.log2(rank) - Math.log2(ranks[0]!.rank)) / (span || 1)) * (width - left - 24);
  const y = (loss: number): number =>
    top + ((high - loss) / (high - low || 1)) * (height - top - 32);
  const line = (of: 'before' | 'after', color: string): string => {
    const points = ranks.map((one) => `${x(one.rank).toFixed(1)},${y(one[of]).toFixed(1)}`);
    return `<polyline fill="none" stroke="${color}" stroke-width="2" points="${points.join(' ')}"><title>${of}</title></polyline>`;
  };
  const label = (atX: number, atY: number, text: string): string =>
    `<text x="${atX.toFixed(1)}" y="${atY.toFixed(1)}" text-anchor="middle">${text}</text>`;
  const marks = ranks.map(({ rank }) => label(x(rank), height - 8, String(rank)));
  const scale = [low, high].map((loss) => label(24, y(loss) + 4, loss.toFixed(3)));
  return (
    `<svg xmlns="http://www.w3.org/2000/svg" font-size="12" width="${width}" height="${height}">` +
    `${line('before', '#999')}${line('after', '#1668a8')}${marks.join('')}${scale.join('')}</svg>`
  );
}

const row = (cells: readonly string[]): string =>
  `<tr>${cells.map((cell) => `<td>${cell}</td>`).join('')}</tr>`;

const signed = (nats: number): string => `${nats < 0 ? '' : '+'}${nats.toFixed(4)}`;
