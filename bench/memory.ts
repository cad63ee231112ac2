// Resident memory of the engine process of a gateway as users run it (default sizes), with the base and eight rank-16
// adapters that have all answered, less the model file, the cells that were written and the adapters' own bytes. Nothing
// else is taken off: unused cells and pages are not resident, so neither are they subtracted. Linux only (/proc).

import { readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { type DecoderConfig, projectionShape, projections } from '../src/model/decoder-config.ts';
import { type GatewayProcess, startGatewayProcess } from '../test/support/gateway-process.ts';
import { writePeftAdapter } from '../test/support/make-peft-adapter.ts';
import type { WeightMode } from './job.ts';
import { type Report, round, seriesOf } from './measure.ts';
import { readConfig } from './rankgate-side.ts';

export interface MemorySettings {
  readonly modelPath: string;
  readonly threads: number;
  readonly rounds: number;
  readonly folder: string;
}

const [adapters, rank, tokensMax] = [8, 16, 64];
const megabyte = 1e6;
const modes: readonly WeightMode[] = ['faithful', 'parity'];

/** Megabytes, by the kernel's names (proc_pid_smaps_rollup(5)). */
interface Resident {
  readonly rss: number;
  readonly private: number;
  readonly anonymous: number;
}

interface Sample {
  readonly engine: Resident;
  readonly gateway: Resident;
  readonly cells: number;
}

export async function benchMemory(settings: MemorySettings): Promise<Report> {
  const config = readConfig(settings.modelPath);
  const fileMb = statSync(settings.modelPath).size / megabyte;
  const adaptersMb = (adapters * rank * rankBytes(config)) / megabyte;
  const series: Record<string, Report['series'][string]> = {};
  const figures: Record<string, number> = {};
  for (const mode of modes) {
    const samples: Sample[] = [];
    for (let index = 0; index < settings.rounds; index++) {
      samples.push(await measure(settings, config, mode));
    }
    const overheads = samples.map(({ engine, cells }) => {
      const cellsMb = (cells * cellBytes(config)) / megabyte;
      return engine.rss - fileMb - cellsMb - adaptersMb;
    });
    const key = mode === 'faithful' ? 'overhead_mb' : `overhead_${mode}_mb`;
    series[key] = seriesOf('MB', overheads);
    figures[key] = series[key].median;
    for (const part of ['rss', 'private', 'anonymous'] as const) {
      series[`${mode}_engine_${part}_mb`] = seriesOf(
        'MB',
        samples.map((one) => one.engine[part]),
      );
    }
    series[`${mode}_gateway_rss_mb`] = seriesOf(
      'MB',
      samples.map((one) => one.gateway.rss),
    );
    figures[`${mode}_cells`] = samples[0]!.cells;
  }
  return {
    bench: 'memory',
    figures: { ...figures, file_mb: round(fileMb), adapters_mb: round(adaptersMb) },
    series,
    sides: { engine: 'the engine process', gateway: 'HTTP, router, registry and the text thread' },
    notes: [`${adapters} adapters of rank ${rank} on all projections, each has answered`],
  };
}

/** f16 keys and values. */
function cellBytes({ blocks, kvHeads, headSize }: DecoderConfig): number {
  return blocks * 2 * kvHeads * headSize * 2;
}

/** f16 rows of A and B of every module. */
function rankBytes(config: DecoderConfig): number {
  const widths = projections.map((projection) => projectionShape(config, projection));
  return config.blocks * widths.reduce((sum, shape) => sum + (shape.in + shape.out) * 2, 0);
}

async function measure(
  { modelPath, threads, folder }: MemorySettings,
  config: DecoderConfig,
  mode: WeightMode,
): Promise<Sample> {
  const flags = ['--threads', String(threads), '--weights', mode, '--log', 'none'];
  const dataDir = join(folder, 'memory');
  await using gateway = await startGatewayProcess({ modelPath, dataDir, flags });
  const names = Array.from({ length: adapters }, (_, i) => `memory-${i + 1}`);
  const listed = await (await gateway.fetch('/v1/models')).text();
  if (!listed.includes(names[0]!)) await addAdapters(gateway, config, names);
  const cells = await Promise.all(names.map((name) => answer(gateway, name)));
  return {
    engine: resident(await gateway.enginePid()),
    gateway: resident(gateway.pid),
    cells: cells.reduce((sum, count) => sum + count, 0),
  };
}

async function addAdapters(
  gateway: GatewayProcess,
  shape: DecoderConfig,
  names: readonly string[],
): Promise<void> {
  for (const [index, name] of names.entries()) {
    const directory = join(gateway.adaptersRoot, name);
    writePeftAdapter(directory, { shape, rank, alpha: 2 * rank, seed: index + 1 });
    const added = await gateway.post('/v1/adapters', { source: name, name });
    if (!added.ok) throw new Error(`${name}: ${added.status} ${await added.text()}`);
  }
}

/** Cells that one answer with all ranks of an adapter wrote. */
async function answer(gateway: GatewayProcess, model: string): Promise<number> {
  const prompt = `Adapter ${model} tells a story about the sea and the people who live beside it.`;
  const body = { model, prompt, max_tokens: tokensMax, temperature: 0 };
  const response = await gateway.post('/v1/completions', body);
  const text = await response.text();
  if (!response.ok) throw new Error(`${model}: ${response.status} ${text}`);
  const { usage } = JSON.parse(text) as { usage: Record<string, number> };
  return usage.prompt_tokens! + usage.completion_tokens! - 1; // the last token's cell is not written
}

function resident(pid: number): Resident {
  const text = readFileSync(`/proc/${pid}/smaps_rollup`, 'utf8');
  const of = (key: string): number =>
    (Number(new RegExp(`^${key}:\\s*(\\d+) kB$`, 'm').exec(text)![1]) * 1024) / megabyte;
  return {
    rss: of('Rss'),
    private: of('Private_Clean') + of('Private_Dirty'),
    anonymous: of('Anonymous'),
  };
}
