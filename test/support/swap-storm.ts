// The test that decides trust (design.md section 7, faults.md R1 to R19): a real gateway over the tiny model, kept nearly
// full, while what its names mean changes a hundred times a second; every stream is compared, token by token, with an idle,
// teacher-forced run of the generation, rank and prompt that it says it had.

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { Generation } from '../../src/adapters/adapter.ts';
import { type Projection, projections } from '../../src/model/decoder-config.ts';
import { type GatewayProcess, startGatewayProcess } from './gateway-process.ts';
import { type Heard, readTokens } from './idle-oracle.ts';
import { writePeftAdapter } from './make-peft-adapter.ts';
import { tinyPath } from './open-test-decoder.ts';
import { createRng, type Rng } from './random.ts';
import { tinyBase } from './tiny-base.ts';

const names = ['a', 'b', 'c', 'd', 'e', 'f'] as const;
type Name = (typeof names)[number];
/** Few modules follow many in the same pages: what the adapter before left there would show. */
const versions: ReadonlyArray<{ rank: number; targets: readonly Projection[] }> = [
  { rank: 16, targets: projections },
  { rank: 8, targets: ['attn_v'] },
  { rank: 16, targets: ['attn_q', 'ffn_down'] },
  { rank: 4, targets: ['attn_output', 'ffn_gate', 'ffn_up'] },
];
const streamsAtOnce = 16;
/** Between two requests of a client: without it 16 of them fill two cores with HTTP, and changes wait for the processor. */
const thinkMs = 300;
const changeMs = 60; // of each of six changers, one a name: 100 changes a second together
const tokensMax = 24;
const acceptBaseName = 'HuggingFaceTB/SmolLM2-135M-Instruct'; // what make-peft-adapter.ts writes

export interface StormReport {
  readonly heard: readonly Heard[];
  readonly changes: number;
  readonly changesPerSecond: number;
  readonly cancelled: number;
  /** Of a name that was gone at the time: the only refusal that may happen. */
  readonly notFound: number;
  /** Whatever went wrong, in words. */
  readonly failures: readonly string[];
  /** Resident set of gateway and engine together, once a second. */
  readonly rssMb: readonly number[];
  readonly leases: readonly number[];
  readonly uses: readonly number[];
}

export interface StormGateway extends AsyncDisposable {
  readonly gateway: GatewayProcess;
  readonly generations: ReadonlyMap<Name, readonly Generation[]>;
}

export async function openStormGateway(): Promise<StormGateway> {
  const sizes = ['--kv-cells', '1024', '--adapter-pages', '9', '--step-rows-max', '8'];
  const gateway = await startGatewayProcess({
    modelPath: tinyPath,
    flags: ['--threads', '1', '--log', 'none', ...sizes],
  });
  const generations = new Map<Name, Generation[]>();
  for (const [i, name] of names.entries()) {
    generations.set(name, []);
    for (const [version, { rank, targets }] of versions.entries()) {
      const options = {
        shape: tinyBase.config,
        seed: 10 * i + version,
        alpha: 4 * rank,
        gain: 1.5,
      };
      writePeftAdapter(join(gateway.adaptersRoot, `${name}${version}`), {
        ...options,
        rank,
        targets,
      });
      const addition = additionOf(name, version, version > 0);
      const answer = await gateway.post('/v1/adapters', addition);
      if (!answer.ok) throw new Error(await answer.text());
      const { generation } = (await answer.json()) as { generation: Generation };
      generations.get(name)!.push(generation);
    }
  }
  return { gateway, generations, [Symbol.asyncDispose]: () => gateway[Symbol.asyncDispose]() };
}

function additionOf(name: Name, version: number, replace: boolean): object {
  return { source: `${name}${version}`, name, replace, accept_base_name: acceptBaseName };
}

/** `seconds` of it, then everything drained. */
export async function storm(
  { gateway, generations }: StormGateway,
  { seconds, seed }: { readonly seconds: number; readonly seed: number },
): Promise<StormReport> {
  const startMs = performance.now();
  const isOver = (): boolean => performance.now() - startMs > 1000 * seconds;
  const heard: Heard[] = [];
  const failures: string[] = [];
  const counts = { changes: 0, cancelled: 0, notFound: 0 };
  const rssMb: number[] = [];
  const enginePid = await gateway.enginePid();
  const stream = async (rng: Rng): Promise<void> => {
    while (!isOver()) {
      await new Promise((resolve) => setTimeout(resolve, rng.below(2 * thinkMs)));
      const outcome = await streamOnce(gateway, rng).catch((error: unknown) => String(error));
      if (typeof outcome === 'string') failures.push(outcome);
      else if (outcome === null) counts.notFound += 1;
      else if (outcome.length === 0) counts.cancelled += 1;
      else heard.push(...outcome);
    }
  };
  const change = async (rng: Rng, name: Name): Promise<void> => {
    while (!isOver()) {
      const started = performance.now();
      const failure = await changeOnce(gateway, generations, rng, name);
      if (failure !== null) failures.push(failure);
      counts.changes += 1;
      const rest = changeMs - (performance.now() - started);
      if (rest > 0) await new Promise((resolve) => setTimeout(resolve, rest));
    }
  };
  const watch = setInterval(() => {
    rssMb.push(rssOf(gateway.pid) + rssOf(enginePid));
  }, 1000);
  await Promise.all([
    ...Array.from({ length: streamsAtOnce }, (_, i) => stream(createRng(1000 * seed + i))),
    ...names.map((name, i) => change(createRng(2000 * seed + i), name)),
  ]);
  clearInterval(watch);
  const changesPerSecond = counts.changes / ((performance.now() - startMs) / 1000);
  const { data } = (await (await gateway.fetch('/v1/adapters')).json()) as {
    data: ReadonlyArray<{ leases: number; residency: { uses?: number } }>;
  };
  const leases = data.map((one) => one.leases);
  const uses = data.map(({ residency }) => residency.uses ?? 0);
  return { heard, failures, ...counts, changesPerSecond, rssMb, leases, uses };
}

/** What one request's choices were: null for a name that is gone, [] for one that was cancelled. Throws on any failure. */
async function streamOnce(gateway: GatewayProcess, rng: Rng): Promise<readonly Heard[] | null> {
  const isBase = rng.below(4) === 0;
  const rank = [2, 3, 4, null][rng.below(4)]!; // null: all that there are
  const cancelAt = rng.below(8) === 0 ? 1 + rng.below(6) : null;
  // Four starts and four ends: prefixes are used again within a generation and a rank, never across.
  const start = 20 + rng.below(4);
  const length = 16 * (1 + rng.below(4));
  const prompt = [...Array.from({ length }, (_, j) => start + j), 100 + rng.below(4)];
  const n = rng.below(6) === 0 ? 2 : 1;
  const abort = new AbortController();
  const response = await gateway.fetch('/v1/completions', {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    signal: abort.signal,
    body: JSON.stringify({
      model: isBase ? gateway.modelName : names[rng.below(names.length)],
      prompt,
      n,
      stream: true,
      temperature: 0,
      max_tokens: tokensMax,
      logprobs: 1,
      ...(isBase || rank === null ? {} : { latency: { rank } }),
    }),
  });
  if (response.status === 404 && !isBase) return null;
  if (response.status !== 200) throw new Error(`${response.status}: ${await response.text()}`);
  const outcome = await readTokens(response, n, cancelAt);
  if (outcome === null) {
    abort.abort();
    return [];
  }
  const { generation, rank: used, tokens } = outcome;
  return tokens.map((one) => ({
    generation: isBase ? null : generation,
    rank: used,
    prompt,
    tokens: one,
  }));
}

/** Swap, roll back, or remove and add again. What went wrong, or null. */
async function changeOnce(
  gateway: GatewayProcess,
  generations: StormGateway['generations'],
  rng: Rng,
  name: Name,
): Promise<string | null> {
  const version = rng.below(versions.length);
  const action = rng.below(50);
  const tell = async (answer: Response, wanted: number): Promise<string | null> => {
    const text = await answer.text();
    return answer.status === wanted ? null : `${name}: ${answer.status} ${text}`;
  };
  if (action === 0) {
    const removed = await gateway.fetch(`/v1/adapters/${name}`, { method: 'DELETE' });
    const failure = await tell(removed, 200);
    if (failure !== null) return failure;
    return tell(await gateway.post('/v1/adapters', additionOf(name, version, false)), 201);
  }
  if (action < 8) {
    const answer = await gateway.fetch(`/v1/adapters/${name}/rollback`, { method: 'POST' });
    // A name that was added again has nothing to go back to.
    return answer.status === 409 ? null : tell(answer, 200);
  }
  const generation = generations.get(name)![version]!;
  const answer = await gateway.fetch(`/v1/adapters/${name}`, {
    method: 'PUT',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ generation }),
  });
  // Its blob may be gone with the name that was removed: then only the source can bring it back.
  if (answer.status === 404) {
    return tell(await gateway.post('/v1/adapters', additionOf(name, version, true)), 200);
  }
  return tell(answer, 200);
}

function rssOf(pid: number): number {
  const status = readFileSync(`/proc/${pid}/status`, 'latin1');
  return Number(/VmRSS:\s+(\d+)/.exec(status)![1]) / 1024;
}
