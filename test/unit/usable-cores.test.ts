import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { usableCores } from '../../src/usable-cores.ts';

type Files = Readonly<Record<string, string>>;

const cores = (affinity: number, files: Files) =>
  usableCores(affinity, (path) => files[path] ?? null);

const v2 = (group: string, root: string, files: Files): Files => ({
  '/proc/self/cgroup': `0::${group}\n`,
  '/proc/self/mountinfo': `25 1 0:22 / /proc rw - proc proc rw\n30 23 0:26 ${root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n`,
  ...files,
});

const v1 = (group: string, root: string, files: Files): Files => ({
  '/proc/self/cgroup': `5:memory:${group}\n4:cpu,cpuacct:${group}\n1:name=systemd:/else\n`,
  '/proc/self/mountinfo': `33 31 0:29 ${root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n34 31 0:30 ${root} /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n`,
  ...files,
});

const cpuFolder = '/sys/fs/cgroup/cpu,cpuacct';
const quota1 = (folder: string, quota: string, period = '100000'): Files => ({
  [`${folder}/cpu.cfs_quota_us`]: `${quota}\n`,
  [`${folder}/cpu.cfs_period_us`]: `${period}\n`,
});

describe('usableCores', () => {
  it('is the affinity where there are no control groups', () => {
    expect(cores(6, {})).toEqual({ count: 6, why: '6 by affinity, no smaller quota' });
  });

  it('reads the quota of version 2, rounded down', () => {
    const files = v2('/', '/', { '/sys/fs/cgroup/cpu.max': '350000 100000\n' });
    expect(cores(8, files)).toEqual({
      count: 3,
      why: 'quota of 3.5 in /sys/fs/cgroup/cpu.max, 8 by affinity',
    });
    expect(cores(2, files).count).toBe(2);
  });

  it('takes the tightest quota of a group and the groups above it', () => {
    const files = v2('/kubepods/pod1/box', '/', {
      '/sys/fs/cgroup/kubepods/cpu.max': '600000 100000',
      '/sys/fs/cgroup/kubepods/pod1/cpu.max': '200000 100000',
      '/sys/fs/cgroup/kubepods/pod1/box/cpu.max': 'max 100000',
      '/sys/fs/cgroup/kubepods/pod1/box/inner/cpu.max': '100000 100000',
    });
    expect(cores(16, files)).toEqual({
      count: 2,
      why: 'quota of 2 in /sys/fs/cgroup/kubepods/pod1/cpu.max, 16 by affinity',
    });
  });

  it('reads version 1 where its cpu controller is mounted, through the groups above', () => {
    const nested = v1('/docker/abc', '/', {
      ...quota1(`${cpuFolder}/docker/abc`, '-1'),
      ...quota1(`${cpuFolder}/docker`, '75000', '50000'),
      ...quota1(cpuFolder, '400000'),
    });
    expect(cores(4, nested).count).toBe(1);
    expect(cores(4, nested).why).toContain(`${cpuFolder}/docker/cpu.cfs_quota_us`);
    const other = v1('/docker/abc', '/', quota1(`${cpuFolder}/docker/xyz`, '100000'));
    expect(cores(4, other).count).toBe(4);
  });

  it('finds its group inside a container, whose mount starts there', () => {
    const inside = v1('/docker/abc', '/docker/abc', quota1(cpuFolder, '250000'));
    expect(cores(4, inside).count).toBe(2);
    const below = v1('/docker/abc/x', '/docker/abc', quota1(`${cpuFolder}/x`, '150000'));
    expect(cores(4, below).count).toBe(1);
    // A path that leaves the mount, as a process moved across namespaces sees it.
    for (const group of ['/../other', '/docker/abcd']) {
      const outside = v1(group, '/docker/abc', quota1(cpuFolder, '300000'));
      expect(cores(4, outside).count).toBe(3);
    }
  });

  it('takes the tighter of both versions when both are mounted', () => {
    const [one, two] = [
      v1('/a', '/', quota1(`${cpuFolder}/a`, '300000')),
      v2('/a', '/', { '/sys/fs/cgroup/a/cpu.max': '200000 100000' }),
    ];
    const join = (name: string): string => `${one[name]}${two[name]}`;
    const files = {
      ...one,
      ...two,
      '/proc/self/cgroup': join('/proc/self/cgroup'),
      '/proc/self/mountinfo': join('/proc/self/mountinfo'),
    };
    expect(cores(4, files).count).toBe(2);
  });

  it('never goes below one core, nor under what is written there by mistake', () => {
    const of = (text: string) => cores(4, v2('/', '/', { '/sys/fs/cgroup/cpu.max': text })).count;
    expect(of('5000 100000')).toBe(1);
    for (const text of [
      '',
      'max',
      'max 100000',
      '0 100000',
      '-5 100000',
      '100000 0',
      'a b',
      '\0',
    ]) {
      expect(of(text), JSON.stringify(text)).toBe(4);
    }
  });

  it('answers with 1 to the affinity whatever the files hold', () => {
    const line = fc.oneof(
      fc.string(),
      fc.constantFrom('0::/a/b', '4:cpu:/../..', '9 9 0:1 / /c rw - cgroup2 x rw', '1 1'),
      fc.constantFrom('9 9 0:1 /a /c rw - cgroup x cpu', '9 9 0:1 .. . rw - cgroup2 x rw'),
    );
    const text = fc.array(line, { maxLength: 5 }).map((lines) => lines.join('\n'));
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 256 }), text, text, text, (affinity, a, b, c) => {
        const { count } = usableCores(affinity, (path) => {
          if (path === '/proc/self/cgroup') return a;
          return path === '/proc/self/mountinfo' ? b : c;
        });
        expect(Number.isInteger(count) && count >= 1 && count <= affinity).toBe(true);
      }),
    );
  });
});
