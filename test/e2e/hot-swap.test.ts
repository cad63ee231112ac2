import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { Generation } from '../../src/adapters/adapter.ts';
import { baseModelPath } from '../support/base-model.ts';
import { type GatewayProcess, startGatewayProcess } from '../support/gateway-process.ts';
import { type Heard, IdleOracle, readTokens } from '../support/idle-oracle.ts';
import { smolShape, writePeftAdapter } from '../support/make-peft-adapter.ts';
import { openBase } from '../support/open-test-decoder.ts';
import { createRng } from '../support/random.ts';

// The promise that decides trust (design.md section 7, faults.md R1): 16 streams over 4 adapters while every 50 ms a name
// is swapped to another generation. Each stream must be what an idle model says with the generation it started with.
//
// "Equal" is design.md section 4's: a stream's token is within ε of the best under an idle, teacher-forced run of the
// same generation and rank. ε covers the last bits that differ with the shape of a batch (bf16 weights, f16 cells); the
// test also shows that another generation, another rank and the base miss it by far more.

const epsilon = 0.25; // nats; worst measured 0.15, and the planted faults below are asserted to miss by 4 × more
const names = ['a', 'b', 'c', 'd'] as const;
const versions = 3;
const streams = 16;
const waves = 2;
const swapMs = 50;
const ranks = [4, 8, 16];

let gateway: GatewayProcess;
let oracle: IdleOracle;
const generations = new Map<string, Generation[]>();

beforeAll(async () => {
  const modelPath = await baseModelPath();
  gateway = await startGatewayProcess({
    modelPath,
    flags: ['--threads', '1', '--adapter-pages', '17'],
  });
  for (const [i, name] of names.entries()) {
    generations.set(name, []);
    for (let version = 0; version < versions; version++) {
      const directory = `${name}${version}`;
      // Versions of one adapter differ in their modules too, so that pages left over would show.
      const targets =
        version === 1
          ? (['attn_v', 'ffn_up'] as const)
          : (['attn_q', 'attn_v', 'ffn_down'] as const);
      writePeftAdapter(join(gateway.adaptersRoot, directory), {
        shape: smolShape,
        seed: 100 * i + version,
        rank: 16,
        alpha: 16,
        targets,
        gain: 0.6,
      });
      const answer = await gateway.post('/v1/adapters', {
        source: directory,
        name,
        replace: version > 0,
      });
      const { generation } = (await answer.json()) as { generation: Generation };
      generations.get(name)!.push(generation);
    }
  }
  const { decoder } = await openBase({ mode: 'faithful', pages: 1 + names.length * versions * 2 });
  const blobs = join(gateway.dataDir, 'blobs');
  oracle = IdleOracle.open(decoder, modelPath, blobs, [...generations.values()].flat());
}, 300_000);

afterAll(async () => {
  oracle?.[Symbol.dispose]();
  await gateway[Symbol.asyncDispose]();
});

/** One stream; throws when it is refused, broken or ends without [DONE]. */
async function stream(name: string, rank: number, prompt: number[]): Promise<Heard> {
  const response = await gateway.post('/v1/completions', {
    model: name,
    prompt,
    stream: true,
    temperature: 0,
    max_tokens: 40,
    logprobs: 1,
    latency: { rank },
  });
  if (response.status !== 200) throw new Error(`${response.status}: ${await response.text()}`);
  const heard = (await readTokens(response, 1))!;
  return { generation: heard.generation, rank, prompt, tokens: heard.tokens[0]! };
}

describe('hot swap under load', () => {
  it('16 streams over 4 adapters, a swap every 50 ms: none fails, each is its own generation’s answer', async () => {
    const rng = createRng(5);
    let swaps = 0;
    let isOver = false;
    const swapping = (async () => {
      for (; !isOver; swaps++) {
        const name = names[rng.below(names.length)]!;
        const generation = generations.get(name)![rng.below(versions)]!;
        const started = performance.now();
        const answer = await gateway.fetch(`/v1/adapters/${name}`, {
          method: 'PUT',
          headers: { 'content-type': 'application/json' },
          body: JSON.stringify({ generation }),
        });
        expect(answer.status, await answer.text()).toBe(200);
        const rest = swapMs - (performance.now() - started);
        await new Promise((resolve) => setTimeout(resolve, Math.max(0, rest)));
      }
    })();
    const results: Heard[] = [];
    for (let wave = 0; wave < waves; wave++) {
      // A shared start and an own end: prefix reuse within a generation, never across.
      const prompts = Array.from({ length: streams }, (_, i) => [
        ...Array.from({ length: 40 }, (_, j) => 500 + j),
        2000 + (i >> 2),
      ]);
      const running = prompts.map((prompt, i) =>
        stream(names[i % 4]!, ranks[i % ranks.length]!, prompt),
      );
      results.push(...(await Promise.all(running)));
    }
    isOver = true;
    await swapping;
    expect(swaps).toBeGreaterThan(20);
    expect(new Set(results.map(({ generation }) => generation)).size).toBeGreaterThan(names.length);

    const gaps: number[] = [];
    for (const result of results) {
      expect(result.tokens.length).toBe(40);
      const gap = oracle.worstGap(result);
      gaps.push(gap);
      expect(gap, `${result.generation} at rank ${result.rank}`).toBeLessThanOrEqual(epsilon);
    }
    console.log(
      `${swaps} swaps; worst gap of ${gaps.length} streams ${Math.max(...gaps).toFixed(4)} nats`,
    );
    // What the bar must catch: another generation of the name, the wrong rank, no adapter at all.
    const faults: Record<string, (heard: Heard) => Partial<Heard>> = {
      'another generation': ({ generation }) => {
        const family = [...generations.values()].find((all) => all.includes(generation!))!;
        return { generation: family.find((other) => other !== generation)! };
      },
      'another rank': ({ rank }) => ({ rank: rank === 4 ? 16 : 4 }),
      'no adapter': () => ({ generation: null }),
    };
    for (const [fault, change] of Object.entries(faults)) {
      const gaps = results.slice(0, 6).map((heard) => oracle.worstGap(heard, change(heard)));
      expect(Math.max(...gaps), fault).toBeGreaterThan(4 * epsilon);
    }

    const listed = (await (await gateway.fetch('/v1/adapters')).json()) as {
      data: Array<{ leases: number }>;
    };
    expect(listed.data.map(({ leases }) => leases)).toEqual(names.map(() => 0));
  }, 400_000);
});
