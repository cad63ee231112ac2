// npm run -s bench -- NAME [--json] [--threads N] [--rounds N] [--weights MODE]: side-by-side figures from one run, both
// sides on this machine, same file, same threads. Prints a table, or one JSON object.

import { execFileSync } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { availableParallelism, loadavg, tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { parseArgs } from 'node:util';
import { defaultSource, fetchBaseModel } from '../src/model/model-source.ts';
import { benchAdapters } from './adapters.ts';
import { benchColdstart } from './coldstart.ts';
import { benchDeadline } from './deadline.ts';
import { benchDecode } from './decode.ts';
import { benchFidelity } from './fidelity.ts';
import type { WeightMode } from './job.ts';
import { benchLoad } from './load.ts';
import { describePlace, type Report, round } from './measure.ts';
import { benchMemory } from './memory.ts';
import { benchRanks } from './ranks.ts';
import { benchResidency } from './residency.ts';
import { benchSimulate } from './simulate.ts';
import { benchSwap } from './swap.ts';
import { benchTenants } from './tenants.ts';
import { benchTrain, type TrainReport } from './train.ts';
import { benchTrainStudy } from './train-study.ts';
import { benchTrainstep } from './trainstep.ts';

interface Settings {
  readonly modelPath: string;
  readonly threads: number;
  readonly rounds: number;
  readonly weights: WeightMode;
  readonly folder: string;
  /** For simulate. */
  readonly trace: string | null;
  /** For train: hours. */
  readonly study: boolean;
  readonly tell: (text: string) => void;
}

const benches: Readonly<Record<string, (settings: Settings) => Promise<Report>>> = {
  deadline: (settings) => benchDeadline(settings),
  decode: (settings) => {
    installOpponent();
    return benchDecode(settings, settings.rounds);
  },
  adapters: (settings) => benchAdapters(settings, settings.rounds),
  ranks: (settings) => benchRanks(settings, settings.rounds),
  coldstart: (settings) => {
    installOpponent();
    return benchColdstart(settings);
  },
  fidelity: (settings) => benchFidelity(settings),
  residency: (settings) => benchResidency(settings, settings.rounds),
  load: (settings) => benchLoad(settings, settings.rounds),
  memory: (settings) => benchMemory(settings),
  simulate: ({ trace }) => benchSimulate({ tracePath: trace }),
  swap: (settings) => benchSwap(settings, settings.rounds),
  tenants: (settings) => benchTenants(settings, settings.rounds),
  train: (settings) =>
    settings.study ? benchTrainStudy(settings) : benchTrain(settings, settings.rounds),
  // Its opponent, and train's, is Python: the first run makes an environment under data/ from PyPI (torch, gigabytes).
  trainstep: (settings) => benchTrainstep(settings, settings.rounds),
};

/** node-llama-cpp uses the shared objects that rankgate has installed (node's look-up finds them one folder up), so its own
 *  optional packages, 700 MB of CUDA and Vulkan among them, stay away. Install scripts stay off: nothing is built. */
function installOpponent(): void {
  if (existsSync(join(import.meta.dirname, 'node_modules/node-llama-cpp'))) return;
  const args = ['ci', '--prefix', import.meta.dirname, '--ignore-scripts', '--omit=optional'];
  execFileSync('npm', args, { stdio: ['ignore', 2, 2] });
}

function printTable(report: Report): void {
  const width = Math.max(...Object.keys(report.series).map((name) => name.length), 24);
  const line = (...cells: string[]): void =>
    console.log(
      cells.map((cell, i) => (i === 0 ? cell.padEnd(width) : cell.padStart(12))).join(''),
    );
  line('', 'median', 'min', 'max', 'unit');
  for (const [name, { median, min, max, unit }] of Object.entries(report.series)) {
    line(name, String(median), String(min), String(max), unit);
  }
  console.log();
  for (const [name, value] of Object.entries(report.figures)) line(name, String(value));
  printLosses(report);
  for (const note of report.notes) console.log(`- ${note}`);
}

/** A line each, by rank. */
function printLosses({ losses = {} }: Report & Partial<Pick<TrainReport, 'losses'>>): void {
  for (const [name, byRank] of Object.entries(losses)) {
    const shown = Object.entries(byRank).map(([rank, loss]) => `${rank}: ${loss.toFixed(4)}`);
    console.log(`loss ${name.padEnd(20)} ${shown.join('  ')}`);
  }
}

async function main(): Promise<void> {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      json: { type: 'boolean', default: false },
      threads: { type: 'string' },
      rounds: { type: 'string', default: '5' },
      weights: { type: 'string', default: 'faithful' },
      model: { type: 'string' },
      trace: { type: 'string' },
      study: { type: 'boolean', default: false },
    },
  });
  const bench = benches[positionals[0] ?? ''];
  const threads = Number(values.threads ?? availableParallelism());
  const rounds = Number(values.rounds);
  const isCount = (value: number): boolean => Number.isInteger(value) && value >= 1;
  const { weights } = values;
  if (bench === undefined || !isCount(threads) || !isCount(rounds) || !isWeightMode(weights)) {
    throw new Error(
      `usage: npm run -s bench -- ${Object.keys(benches).join('|')} [--json] [--threads N] [--rounds N] [--weights parity|faithful|fast] [--model FILE] [--trace FILE] [--study]`,
    );
  }
  const place = describePlace();
  const isModelless = bench === benches.simulate;
  const modelPath = values.model ?? (isModelless ? '' : await fetchDefaultModel());
  const folder = mkdtempSync(join(tmpdir(), 'rankgate-bench-'));
  try {
    const trace = values.trace ?? null;
    const { study } = values;
    const tell = (text: string): void => console.error(text);
    const own = { trace, study, tell };
    const report = await bench({ modelPath, threads, rounds, weights, folder, ...own });
    const loadAverageAtEnd = round(loadavg()[0]!);
    const run = { model: basename(modelPath), threads, rounds, ...place, loadAverageAtEnd };
    if (values.json) {
      const { figures, ...rest } = report;
      console.log(JSON.stringify({ ...figures, ...rest, run }, null, 2));
    } else {
      printTable(report);
      console.log(JSON.stringify(run));
    }
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

function isWeightMode(text: string): text is WeightMode {
  return text === 'parity' || text === 'faithful' || text === 'fast';
}

async function fetchDefaultModel(): Promise<string> {
  const dir = join(import.meta.dirname, '../data/models');
  return (await fetchBaseModel(defaultSource, { dir })).path;
}

await main();
