// How many cores' worth of time this process may use: scheduler affinity and the quotas of its control group and of every
// group above it (cgroups(7): `cpu.max` in version 2, `cpu.cfs_quota_us` in version 1, either of which may be mounted).
// Half a core of quota is not a thread: fractions round down, to 1 at least. What cannot be read limits nothing.

import { readFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { posix } from 'node:path';

export interface UsableCores {
  readonly count: number;
  /** Where the number comes from, for doctor. */
  readonly why: string;
}

/** A file's text; null when there is none. */
export type ReadText = (path: string) => string | null;

interface Quota {
  readonly cores: number;
  readonly file: string;
}

interface Mount {
  /** The group that is seen at `at`: not `/` inside most containers. */
  readonly root: string;
  readonly at: string;
  readonly isV2: boolean;
}

const levelsMax = 64;

function readText(path: string): string | null {
  try {
    return readFileSync(path, 'utf8');
  } catch {
    return null; // not Linux, or the other version of control groups
  }
}

export function usableCores(
  affinity: number = availableParallelism(),
  read: ReadText = readText,
): UsableCores {
  const quotas = mounts(read).flatMap((mount) => quotasOf(mount, read));
  const [tightest] = quotas.sort((a, b) => a.cores - b.cores);
  if (tightest === undefined || tightest.cores >= affinity) {
    return { count: affinity, why: `${affinity} by affinity, no smaller quota` };
  }
  const quota = `quota of ${Number(tightest.cores.toFixed(2))} in ${tightest.file}`;
  return {
    count: Math.max(1, Math.floor(tightest.cores)),
    why: `${quota}, ${affinity} by affinity`,
  };
}

/** proc_pid_mountinfo(5): `36 35 98:0 /root /at options [optional…] - type source super-options`. */
function mounts(read: ReadText): Mount[] {
  return (read('/proc/self/mountinfo') ?? '').split('\n').flatMap((line): Mount[] => {
    const [place = '', kind = ''] = line.split(' - ');
    const [, , , root, at] = place.split(' ');
    const [type, , options = ''] = kind.split(' ');
    if (root === undefined || at === undefined) return [];
    if (type === 'cgroup2') return [{ root, at, isV2: true }];
    return type === 'cgroup' && options.split(',').includes('cpu')
      ? [{ root, at, isV2: false }]
      : [];
  });
}

function quotasOf({ root, at, isV2 }: Mount, read: ReadText): Quota[] {
  const group = ownGroup(isV2, read);
  // A group outside of the mount (`/../other` or a host's path) is not visible: what is mounted stands for it.
  const isInside = root === '/' || group === root || group.startsWith(`${root}/`);
  let folder = posix.join(at, isInside ? group.slice(root === '/' ? 0 : root.length) : '');
  if (folder !== at && !folder.startsWith(`${at}/`)) folder = at;
  const found: Quota[] = [];
  for (let level = 0; level < levelsMax; level++) {
    const quota = isV2 ? quotaV2(folder, read) : quotaV1(folder, read);
    if (quota !== null) found.push(quota);
    if (folder.replace(/\/$/, '') === at) break;
    folder = posix.dirname(folder);
  }
  return found;
}

/** cgroups(7): `0::/path` in version 2, `4:cpu,cpuacct:/path` in version 1. */
function ownGroup(isV2: boolean, read: ReadText): string {
  for (const line of (read('/proc/self/cgroup') ?? '').split('\n')) {
    const [, controllers = '', path = '/'] = /^\d+:([^:]*):(.*)$/.exec(line) ?? [];
    if (isV2 ? line.startsWith('0::') : controllers.split(',').includes('cpu')) return path;
  }
  return '/';
}

function quotaV2(folder: string, read: ReadText): Quota | null {
  const file = posix.join(folder, 'cpu.max');
  const [quota, period] = (read(file) ?? '').trim().split(/\s+/);
  return toQuota(quota, period, file);
}

function quotaV1(folder: string, read: ReadText): Quota | null {
  const file = posix.join(folder, 'cpu.cfs_quota_us');
  return toQuota(read(file)?.trim(), read(posix.join(folder, 'cpu.cfs_period_us'))?.trim(), file);
}

/** `max` and -1 are no limit. */
function toQuota(
  quota: string | undefined,
  period: string | undefined,
  file: string,
): Quota | null {
  const cores = Number(quota) / Number(period);
  return Number.isFinite(cores) && cores > 0 ? { cores, file } : null;
}
