// Brings a fresh clone to where it can run: dependencies and build, each only when missing or out of date. Plain Node
// without dependencies, because it runs before there are any.

import { spawnSync } from 'node:child_process';
import { readdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

export const root = join(import.meta.dirname, '..');
const stamp = join(root, 'dist', '.built');

function modifiedMs(path) {
  return statSync(path, { throwIfNoEntry: false })?.mtimeMs ?? 0;
}

function newestMs(folder) {
  return readdirSync(folder, { recursive: true, encoding: 'utf8' })
    .map((name) => modifiedMs(join(folder, name)))
    .reduce((newest, one) => Math.max(newest, one), modifiedMs(folder));
}

/** Runs node on a script and answers its exit code; the terminal is shared. */
export function runNode(args) {
  const { status, error } = spawnSync(process.execPath, args, { cwd: root, stdio: 'inherit' });
  if (error) throw error;
  return status ?? 1;
}

/** A shell gives ^C to npm and the build as well: then they ended, not failed. */
function must(status, what) {
  if (status === 0) return;
  console.error(`${what} failed (exit code ${status}); nothing was started`);
  process.exit(1);
}

export function checkNode() {
  const [major, minor] = process.versions.node.split('.').map(Number);
  if (major > 20 || (major === 20 && minor >= 19)) return;
  console.error(`rankgate needs Node 20.19 or newer; this is ${process.version}`);
  process.exit(1);
}

export function install() {
  const installed = modifiedMs(join(root, 'node_modules', '.package-lock.json'));
  if (installed >= modifiedMs(join(root, 'package-lock.json'))) return;
  console.error('installing dependencies (npm ci, install scripts off)…');
  const args = ['ci', '--ignore-scripts', '--no-audit', '--no-fund'];
  // npm names itself to the scripts it runs; on Windows `npm` alone is a batch file that spawn refuses.
  const npm = process.env.npm_execpath;
  const { status, error } =
    npm === undefined
      ? spawnSync('npm', args, { cwd: root, stdio: 'inherit' })
      : spawnSync(process.execPath, [npm, ...args], { cwd: root, stdio: 'inherit' });
  if (error) console.error(error.message);
  must(status ?? 1, 'npm ci');
}

export function build() {
  const sources = Math.max(
    newestMs(join(root, 'src')),
    modifiedMs(join(root, 'tsconfig.json')),
    modifiedMs(join(root, 'tsconfig.build.json')),
    modifiedMs(join(root, 'package-lock.json')),
  );
  if (modifiedMs(stamp) > sources) return;
  console.error('building…');
  // What a removed source left in dist would still be found by name.
  rmSync(join(root, 'dist'), { recursive: true, force: true });
  must(runNode(['node_modules/typescript/bin/tsc', '-p', 'tsconfig.build.json']), 'the build');
  writeFileSync(stamp, '');
}
