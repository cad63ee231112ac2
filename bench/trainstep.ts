// bench trainstep: one LoRA training step, r = 16 on seven projections, 4 × 128 tokens, against PEFT on torch with the same
// threads, weights (f32), factors, tokens and AdamW. Both losses are followed over all steps: they must agree, or one side
// did other work. The PEFT side runs in a Python environment under data/, made from PyPI when it is missing.

import { type ChildProcessWithoutNullStreams, execFileSync, spawn } from 'node:child_process';
import { existsSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { type DecoderConfig, projectionShape, projections } from '../src/model/decoder-config.ts';
import { type Report, round, seriesOf } from './measure.ts';
import { readConfig } from './rankgate-side.ts';

export interface TrainSpec {
  readonly modelPath: string;
  readonly threads: number;
  readonly rank: number;
  readonly windows: number;
  readonly windowRows: number;
  readonly tokens: readonly number[];
  /** f32, per block and projection: a [R,in], b [R,out]. */
  readonly factorsPath: string;
  readonly recompute: boolean;
  readonly adam: Readonly<Record<'rate' | 'beta1' | 'beta2' | 'eps' | 'decay', number>>;
}

export interface StepAnswer {
  readonly ms: number;
  readonly cpuMs: number;
  readonly loss: number;
}

const sizes = { rank: 16, windows: 4, windowRows: 128 } as const;
const adam = { rate: 3e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, decay: 0.01 } as const;
/** Largest relative distance of the two sides' losses at any step: f32 sums in another order, over a few AdamW steps. */
const lossDistanceMax = 1e-3;
const pythonPackages = [
  'torch==2.15.0',
  'peft==0.21.2',
  'transformers==5.24.0',
  'gguf==0.19.0',
] as const;

/** A seeded uniform number in [0, 1): the factors and tokens of every run are the same. */
function uniform(seed: number): () => number {
  let state = seed;
  return () => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return state / 2 ** 32;
  };
}

function writeFactors(path: string, config: DecoderConfig): void {
  const next = uniform(16);
  const parts: Buffer[] = [];
  for (let block = 0; block < config.blocks; block++) {
    for (const projection of projections) {
      const shape = projectionShape(config, projection);
      // B is not zero as at the start of training: then every gradient counts in the losses that are compared.
      for (const [count, scale] of [
        [shape.in, shape.in ** -0.5],
        [shape.out, 0.01],
      ] as const) {
        const numbers = Float32Array.from({ length: sizes.rank * count }, () => {
          return (next() - 0.5) * 2 * scale;
        });
        parts.push(Buffer.from(numbers.buffer));
      }
    }
  }
  writeFileSync(path, Buffer.concat(parts));
}

function preparePython(): string {
  const folder = join(import.meta.dirname, '../data/venv-peft');
  const python = join(folder, 'bin/python');
  if (!existsSync(python)) {
    execFileSync('python3', ['-m', 'venv', folder], { stdio: ['ignore', 2, 2] });
    execFileSync(python, ['-m', 'pip', 'install', '-q', ...pythonPackages], {
      stdio: ['ignore', 2, 2],
    });
  }
  return python;
}

class Stepper {
  description = '';
  scratchMb = 0;
  trained = 0;
  readonly #child: ChildProcessWithoutNullStreams;
  readonly #lines: AsyncIterator<string>;

  constructor(command: string, args: readonly string[]) {
    this.#child = spawn(command, args, { stdio: ['pipe', 'pipe', 'pipe'] });
    this.#child.stderr.pipe(process.stderr);
    this.#lines = createInterface({ input: this.#child.stdout })[Symbol.asyncIterator]();
  }

  async #answer(): Promise<unknown> {
    const line = await this.#lines.next();
    if (line.done === true) throw new Error(`${this.#child.spawnfile} ended early`);
    return JSON.parse(line.value);
  }

  async open(): Promise<void> {
    Object.assign(this, await this.#answer());
  }

  async step(): Promise<StepAnswer> {
    this.#child.stdin.write('step\n');
    return (await this.#answer()) as StepAnswer;
  }

  close(): void {
    this.#child.stdin.end();
  }
}

export interface TrainSettings {
  readonly modelPath: string;
  readonly threads: number;
  readonly folder: string;
}

export async function benchTrainstep(settings: TrainSettings, rounds: number): Promise<Report> {
  const { modelPath, threads, folder } = settings;
  const config = readConfig(modelPath);
  const next = uniform(4);
  const tokens = Array.from({ length: sizes.windows * sizes.windowRows }, () =>
    Math.floor(next() * config.vocabSize),
  );
  const factorsPath = join(folder, 'factors.f32');
  writeFactors(factorsPath, config);
  const specs = { modelPath, threads, ...sizes, tokens, factorsPath, adam };
  const start = (name: string, recompute: boolean): Stepper => {
    const path = join(folder, `${name}.json`);
    const spec: TrainSpec = { ...specs, recompute };
    writeFileSync(path, JSON.stringify(spec));
    return name === 'peft'
      ? new Stepper(preparePython(), [join(import.meta.dirname, 'trainstep-peft.py'), path])
      : new Stepper(process.execPath, [
          '--import',
          'tsx',
          join(import.meta.dirname, 'trainstep-side.ts'),
          path,
        ]);
  };
  const sides = {
    peft: start('peft', false),
    rankgate: start('rankgate', false),
    recompute: start('recompute', true),
  };
  try {
    return await measure(sides, rounds);
  } finally {
    for (const side of Object.values(sides)) side.close();
  }
}

async function measure(
  sides: Readonly<Record<'peft' | 'rankgate' | 'recompute', Stepper>>,
  rounds: number,
): Promise<Report> {
  const names = Object.keys(sides) as Array<keyof typeof sides>;
  for (const name of names) await sides[name].open();
  const answers: Record<keyof typeof sides, StepAnswer[]> = {
    peft: [],
    rankgate: [],
    recompute: [],
  };
  for (let index = 0; index <= rounds; index++) {
    for (let i = 0; i < names.length; i++) {
      const name = names[(i + index) % names.length]!; // the side that begins rotates
      answers[name].push(await sides[name].step());
    }
  }
  const distance = Math.max(
    ...(['rankgate', 'recompute'] as const).flatMap((name) =>
      answers[name].map(({ loss }, i) => Math.abs(loss / answers.peft[i]!.loss - 1)),
    ),
  );
  if (!(distance < lossDistanceMax)) {
    throw new Error(
      `trainstep: the sides' losses differ by ${distance}: ${JSON.stringify(answers)}`,
    );
  }
  // The first step is thrown away: pages are touched and kernels chosen in it. Its loss counts.
  const timed = (name: keyof typeof sides, field: 'ms' | 'cpuMs'): number[] =>
    answers[name].slice(1).map((answer) => answer[field]);
  const step = (name: keyof typeof sides) => seriesOf('ms', timed(name, 'ms'));
  const series = {
    rankgate_step_ms: step('rankgate'),
    peft_step_ms: step('peft'),
    rankgate_recompute_step_ms: step('recompute'),
    rankgate_cpu_ms: seriesOf('ms', timed('rankgate', 'cpuMs')),
    peft_cpu_ms: seriesOf('ms', timed('peft', 'cpuMs')),
  };
  const [ours, theirs] = [series.rankgate_step_ms, series.peft_step_ms];
  return {
    bench: 'trainstep',
    figures: {
      ratio_to_peft: round(theirs.median / ours.median),
      recompute_ratio_to_peft: round(theirs.median / series.rankgate_recompute_step_ms.median),
      cpu_ratio_to_peft: round(series.peft_cpu_ms.median / series.rankgate_cpu_ms.median),
      loss_first: round(answers.rankgate[0]!.loss),
      loss_last: round(answers.rankgate.at(-1)!.loss),
      loss_distance_max: round(distance),
      trained_parameters: sides.rankgate.trained,
      scratch_mb: round(sides.rankgate.scratchMb),
      recompute_scratch_mb: round(sides.recompute.scratchMb),
    },
    series,
    sides: Object.fromEntries(names.map((name) => [name, sides[name].description])),
    notes: [
      'a step: forward, backward and AdamW of a LoRA of rank 16 on seven projections over 4 × 128 tokens, all of it in f32',
      'loss_distance_max: largest relative distance of both sides’ losses over all steps, the first (untimed) one included',
    ],
  };
}
