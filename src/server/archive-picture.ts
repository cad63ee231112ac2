// The archive's map as a page's body: domains down, latency to the right, a cell the darker the better.

import type { ArchiveRows, Elite, IsCurrent } from '../router/archive.ts';
import { escaped } from './page.ts';

const [left, top, width, height] = [190, 34, 112, 44];

export function drawArchive(
  rows: ArchiveRows,
  bounds: ReadonlyArray<readonly [msMin: number, msMax: number]>,
  isCurrent: IsCurrent,
): string {
  const columns = bounds.map(([, msMax], i) =>
    text(left + (i + 0.5) * width, top - 12, `≤ ${shown(msMax)}`, 'middle'),
  );
  const lines = rows.map(([row, elites], y) => {
    const atY = top + y * height;
    const cells = elites.map((elite, i) => cell(left + i * width, atY, elite, isCurrent));
    return text(left - 10, atY + height / 2 + 4, row.replace(/^\//, ''), 'end') + cells.join('');
  });
  const size = `width="${left + bounds.length * width + 10}" height="${top + rows.length * height + 10}"`;
  const note = rows.length === 0 ? '<p>Nothing was evaluated yet.</p>' : '';
  return (
    '<h1>Best adapter per domain and latency</h1>' +
    `${note}<svg xmlns="http://www.w3.org/2000/svg" font-size="12" ${size}>` +
    `${columns.join('')}${lines.join('')}</svg>`
  );
}

function cell(x: number, y: number, elite: Elite | null, isCurrent: IsCurrent): string {
  const box = `x="${x + 1}" y="${y + 1}" width="${width - 2}" height="${height - 2}" rx="4"`;
  if (elite === null) return `<rect ${box} fill="#f4f4f4"/>`;
  const { adapter, rank, objective, kind } = elite;
  const isOld = !isCurrent(elite);
  const lightness = Math.round(92 - 52 * objective);
  const fill = isOld ? '#ddd' : `hsl(205 60% ${lightness}%)`;
  const ink = !isOld && lightness < 60 ? '#fff' : '#111';
  const name = adapter === null ? 'base' : adapter.replace(/^.*\//, '');
  const short = name.length > 16 ? `${name.slice(0, 15)}…` : name;
  const says = `${adapter ?? 'base'}, ${kind}, rank ${rank}, ${objective}${isOld ? ', replaced since' : ''}`;
  const middle = x + width / 2;
  return (
    `<g fill="${ink}"><title>${escaped(says)}</title><rect ${box} fill="${fill}"/>` +
    text(middle, y + 19, short, 'middle') +
    `${text(middle, y + 35, `rank ${rank} · ${objective.toFixed(3)}`, 'middle')}</g>`
  );
}

function text(x: number, y: number, words: string, anchor: 'middle' | 'end'): string {
  return `<text x="${x}" y="${y}" text-anchor="${anchor}">${escaped(words)}</text>`;
}

const shown = (ms: number): string =>
  ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
