// TensorFlow.js for the tests of the tfjs backend, in data/tensorflow: the npm packages without their install scripts, and
// libtensorflow out of the pinned PyPI wheel with the packages' own binding compiled against it, because tfjs-node's own
// download is not from a package registry. Needs npm; for libtensorflow also Linux on x64, python3 with pip, g++ and Node's
// headers. Without those the wasm backend is there all the same, and the exit code is 1.

import { execFileSync } from 'node:child_process';
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  realpathSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { join, resolve } from 'node:path';
import { root } from './prepare.mjs';

const wheel = {
  requirement: 'tensorflow-cpu==2.15.1',
  // tensorflow_cpu-2.15.1-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl, 207 MB
  sha256: '54660c074d7241a503e81edfd9f5ef5af88f64051b72e2945f26318c790f2d26',
};
const packages = ['tfjs-node', 'tfjs-node-gpu'];

// Libraries and C headers of a wheel: nothing of it is imported or run.
const unpack = `
import pathlib, re, shutil, sys, zipfile
target = pathlib.Path(sys.argv[2])
header = re.compile(r'tensorflow/include/(.*/c/.*|.*/platform/ctstring[^/]*)[.]h')
with zipfile.ZipFile(sys.argv[1]) as wheel:
    for name in wheel.namelist():
        if name.startswith('tensorflow/libtensorflow_'):
            out = target / 'lib' / name.split('/')[-1]
        elif header.fullmatch(name):
            out = target / name.removeprefix('tensorflow/')
        else:
            continue
        out.parent.mkdir(parents=True, exist_ok=True)
        with wheel.open(name) as source, open(out, 'wb') as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
`;

function runIn(cwd, program, args) {
  execFileSync(program, args, { cwd, stdio: ['ignore', 'inherit', 'inherit'] });
}

/** Does the work once per text of its inputs: the stamp is written last. */
function once(stamp, text, work) {
  if (existsSync(stamp) && readFileSync(stamp, 'utf8') === text) return;
  rmSync(stamp, { force: true });
  work();
  writeFileSync(stamp, text);
}

function installPackages(folder) {
  const from = join(root, 'scripts/tensorflow');
  const files = ['package.json', 'package-lock.json'];
  once(join(folder, '.installed'), readFileSync(join(from, files[1]), 'utf8'), () => {
    for (const file of files) copyFileSync(join(from, file), join(folder, file));
    const quiet = ['--ignore-scripts', '--no-audit', '--no-fund', '--loglevel=error'];
    runIn(folder, 'npm', ['ci', ...quiet]);
  });
}

function fetchLibrary(folder) {
  const library = join(folder, 'libtensorflow');
  once(join(library, '.unpacked'), wheel.sha256, () => {
    rmSync(library, { recursive: true, force: true });
    mkdirSync(library);
    const work = mkdtempSync(join(folder, 'wheel-'));
    try {
      const requirements = join(work, 'requirements.txt');
      writeFileSync(requirements, `${wheel.requirement} --hash=sha256:${wheel.sha256}\n`);
      const platform = ['--platform', 'manylinux_2_17_x86_64', '--python-version', '3.11'];
      const abi = ['--implementation', 'cp', '--abi', 'cp311', '--only-binary=:all:'];
      const args = ['-m', 'pip', 'download', '-q', '--no-deps', '--require-hashes', '-d', work];
      runIn(work, 'python3', [...args, ...platform, ...abi, '-r', requirements]);
      const name = 'tensorflow_cpu-2.15.1-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64';
      runIn(work, 'python3', ['-c', unpack, join(work, `${name}.whl`), library]);
    } finally {
      rmSync(work, { recursive: true, force: true });
    }
    // The names that -ltensorflow looks for.
    symlinkSync('libtensorflow_cc.so.2', join(library, 'lib/libtensorflow.so'));
    symlinkSync('libtensorflow_framework.so.2', join(library, 'lib/libtensorflow_framework.so'));
  });
  return library;
}

/** What the packages' binding.gyp says for Linux, in one call of the compiler. The two packages have the same sources. */
function compileBinding(folder, library) {
  const headers = resolve(realpathSync(process.execPath), '../../include/node');
  if (!existsSync(join(headers, 'node_api.h'))) throw new Error(`no Node headers in ${headers}`);
  const [first, second] = packages.map((name) => join(folder, 'node_modules/@tensorflow', name));
  const binding = join(folder, 'tfjs_binding.node');
  const sources = ['tfjs_backend.cc', 'tfjs_binding.cc'].map((name) => join('binding', name));
  const flags = ['-std=c++17', '-O2', '-fPIC', '-shared', '-DNAPI_VERSION=8', '-w'];
  const paths = [`-I${headers}`, `-I${join(library, 'include')}`, '-I..', `-L${library}/lib`];
  const libraries = ['-ltensorflow', '-ltensorflow_framework', `-Wl,-rpath,${library}/lib`];
  runIn(first, 'g++', [...flags, ...paths, ...sources, '-o', binding, ...libraries]);
  for (const installed of [first, second]) {
    mkdirSync(join(installed, 'lib/napi-v8'), { recursive: true });
    copyFileSync(binding, join(installed, 'lib/napi-v8/tfjs_binding.node'));
  }
}

export function setUpTensorFlow() {
  const folder = join(root, 'data/tensorflow');
  mkdirSync(folder, { recursive: true });
  installPackages(folder);
  if (process.platform !== 'linux' || process.arch !== 'x64') {
    throw new Error(`the wheel is for Linux on x64, this is ${process.platform} ${process.arch}`);
  }
  const library = fetchLibrary(folder);
  const text = wheel.sha256 + readFileSync(join(folder, '.installed'), 'utf8') + process.version;
  once(join(folder, '.compiled'), text, () => compileBinding(folder, library));
}

if (process.argv[1] === import.meta.filename) {
  try {
    setUpTensorFlow();
    console.error('data/tensorflow is ready');
  } catch (error) {
    console.error(`libtensorflow is not set up: ${error.message}`);
    process.exitCode = 1;
  }
}
