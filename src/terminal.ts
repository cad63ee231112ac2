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

export function renderProgress({ label, done, total }: FetchProgress): string {
  const share = total > 0 ? Math.min(1, done / total) : 0;
  const filled = Math.round(share * barWidth);
  const bar = '#'.repeat(filled) + '-'.repeat(barWidth - filled);
  const megabytes = (bytes: number): string => (bytes / 1e6).toFixed(1);
  const percent = String(Math.floor(share * 100)).padStart(3);
  return `${label} [${bar}] ${percent} % ${megabytes(done)} of ${megabytes(total)} MB`;
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
