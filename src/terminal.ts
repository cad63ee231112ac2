// What commands write to, and the progress of long work on it: one redrawn line on a terminal, one line per tenth in a log.

import type { FetchProgress } from './model/model-source.ts';

/** Tests bring their own. */
export interface Terminal {
  readonly out: (text: string) => void;
  readonly err: (text: string) => void;
  readonly isTerminal: boolean;
  readonly environment: NodeJS.ProcessEnv;
}

const barWidth = 30;

export function renderBar(share: number): string {
  const filled = Math.round(share * barWidth);
  const bar = '#'.repeat(filled) + '-'.repeat(barWidth - filled);
  return `[${bar}] ${String(Math.floor(share * 100)).padStart(3)} %`;
}

const blocks = '▁▂▃▄▅▆▇█';
const curveWidth = 24;

/** Means of equal parts of the values, the least as the lowest block. */
export function sparkline(values: readonly number[]): string {
  const finite = values.filter(Number.isFinite);
  const width = Math.min(curveWidth, finite.length);
  const means = Array.from({ length: width }, (_, i) => {
    const from = Math.floor((i * finite.length) / width);
    const part = finite.slice(from, Math.floor(((i + 1) * finite.length) / width));
    return part.reduce((sum, value) => sum + value, 0) / part.length;
  });
  const low = Math.min(...means);
  const span = Math.max(...means) - low || 1;
  return means.map((mean) => blocks[Math.round(((mean - low) / span) * 7)]).join('');
}

export function renderProgress({ label, done, total }: FetchProgress): string {
  const share = total > 0 ? Math.min(1, done / total) : 0;
  const megabytes = (bytes: number): string => (bytes / 1e6).toFixed(1);
  return `${label} ${renderBar(share)} ${megabytes(done)} of ${megabytes(total)} MB`;
}

export function createProgress(
  write: (text: string) => void,
  isTerminal: boolean,
): (progress: FetchProgress) => void {
  let shown = '';
  return (progress) => {
    const { label, done, total } = progress;
    // Percent on a terminal, tenths in a log: a 92 MB file reports thousands of times.
    const stage = `${label} ${Math.floor((done / Math.max(1, total)) * (isTerminal ? 100 : 10))}`;
    if (stage === shown) return;
    shown = stage;
    const text = renderProgress(progress);
    if (!isTerminal) write(`${text}\n`);
    else write(`\r\u001b[K${text}${done >= total ? '\n' : ''}`);
  };
}
