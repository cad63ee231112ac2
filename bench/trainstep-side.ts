// The rankgate side of `bench trainstep`: one LoRA training step (forward, backward, AdamW) per line read from stdin, in a
// process of its own as the PEFT side is. Weights in f32 (`exact`): the same numbers on both sides.

import { readFileSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { GgmlKernels } from '../src/kernels/ggml/ggml-kernels.ts';
import { readDecoderConfig } from '../src/model/decoder-config.ts';
import { openGguf } from '../src/model/gguf.ts';
import type { TrainingBatch } from '../src/model/loss-graph.ts';
import { lowRankDelta, type TrainedDelta } from '../src/model/trained-delta.ts';
import { TrainingDecoder } from '../src/model/training-decoder.ts';
import { loadWeights } from '../src/model/weights.ts';
import type { StepAnswer, TrainSpec } from './trainstep.ts';

/** A trained tensor with AdamW's two moments. */
interface Trained {
  readonly name: string;
  readonly values: Float32Array;
  readonly gradient: Float32Array;
  readonly mean: Float32Array;
  readonly power: Float32Array;
}

function adamw(trained: Trained, step: number, adam: TrainSpec['adam']): void {
  const { values, gradient, mean, power } = trained;
  const { rate, beta1, beta2, eps, decay } = adam;
  const meanRate = rate / (1 - beta1 ** step);
  const powerScale = 1 / (1 - beta2 ** step);
  for (let i = 0; i < values.length; i++) {
    const g = gradient[i]!;
    const m = beta1 * mean[i]! + (1 - beta1) * g;
    const v = beta2 * power[i]! + (1 - beta2) * g * g;
    mean[i] = m;
    power[i] = v;
    const kept = values[i]! * (1 - rate * decay);
    values[i] = kept - (meanRate * m) / (Math.sqrt(v * powerScale) + eps);
  }
}

function batchOf({ tokens, windows, windowRows, rank }: TrainSpec): TrainingBatch {
  const rows = windows * windowRows;
  const learnt = Array.from({ length: rows }, (_, row) => row).filter(
    (row) => (row + 1) % windowRows !== 0,
  );
  return {
    tokens: Int32Array.from(tokens),
    sequences: Int32Array.from({ length: rows }, (_, row) => Math.floor(row / windowRows)),
    gate: new Float32Array(rows * rank).fill(1),
    answers: learnt.map((row) => ({ row, target: tokens[row + 1]!, weight: 1 / learnt.length })),
  };
}

function open(spec: TrainSpec): {
  readonly decoder: TrainingDecoder;
  readonly delta: TrainedDelta;
  readonly kernels: GgmlKernels;
} {
  using file = openGguf(spec.modelPath);
  const kernels = new GgmlKernels({ threads: spec.threads });
  const config = readDecoderConfig(file);
  const weights = loadWeights(file, config, { kernels, mode: 'exact', cache: null });
  const { rank, windows, windowRows, recompute } = spec;
  const answersMax = windows * (windowRows - 1);
  const delta = lowRankDelta(config, () => rank);
  const sizes = { delta, windows, windowRows, answersMax, recompute };
  return { decoder: new TrainingDecoder({ config, weights, kernels, ...sizes }), delta, kernels };
}

function readFactors({ trained }: TrainedDelta, path: string): Trained[] {
  const bytes = readFileSync(path);
  const numbers = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4);
  let at = 0;
  return Object.entries(trained).map(([name, [rows, columns]]): Trained => {
    const count = rows! * columns!;
    const values = numbers.slice(at, at + count);
    at += count;
    const zeros = (): Float32Array => new Float32Array(count);
    return { name, values, gradient: zeros(), mean: zeros(), power: zeros() };
  });
}

const spec = JSON.parse(readFileSync(process.argv[2]!, 'utf8')) as TrainSpec;
const { decoder, delta, kernels } = open(spec);
const trained = readFactors(delta, spec.factorsPath);
const upload = ({ name, values }: Trained): void => decoder.write(name, values);
trained.forEach(upload);
const batch = batchOf(spec);
const count = trained.reduce((sum, { values }) => sum + values.length, 0);
const recomputes = spec.recompute ? ', values computed again' : '';
const scratchMb = kernels.scratchBytes / 2 ** 20;
console.log(
  JSON.stringify({
    description: `rankgate on ${kernels.description}, f32${recomputes}`,
    trained: count,
    scratchMb,
  }),
);
let steps = 0;
for await (const _ of createInterface({ input: process.stdin })) {
  const [start, cpu] = [performance.now(), process.cpuUsage()];
  steps += 1;
  const loss = decoder.step(batch);
  for (const one of trained) {
    decoder.read(one.name, one.gradient);
    adamw(one, steps, spec.adam);
    upload(one);
  }
  const ms = performance.now() - start;
  const { user, system } = process.cpuUsage(cpu);
  const answer: StepAnswer = { ms, cpuMs: (user + system) / 1000, loss };
  console.log(JSON.stringify(answer));
}
decoder[Symbol.dispose]();
kernels[Symbol.dispose]();
