import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { type BlockCovariances, calibrate } from '../../../src/adapters/calibration.ts';
import type { Columns } from '../../../src/adapters/orthogonal.ts';
import { type BackendName, createKernels } from '../../../src/kernels/create-kernels.ts';
import { projections, readDecoderConfig } from '../../../src/model/decoder-config.ts';
import { openGguf } from '../../../src/model/gguf.ts';
import { loadWeights } from '../../../src/model/weights.ts';
import { tinyPath } from '../../support/open-test-decoder.ts';

// The inputs of the tiny model's projections as transformers' Llama has them in f64 (test/oracle/eora.py).

interface Golden {
  readonly calibration: {
    readonly tokens: readonly number[];
    readonly modules: Readonly<Record<string, { trace: number; probes: string; products: string }>>;
  };
}

const { calibration: golden } = JSON.parse(
  readFileSync(new URL('../../golden/adapters/eora.json', import.meta.url), 'utf8'),
) as Golden;

function floats(text: string): Float64Array {
  return new Float64Array(new Uint8Array(Buffer.from(text, 'base64')).buffer);
}

async function covariancesOf(
  backend: BackendName,
  tokens: readonly number[],
): Promise<BlockCovariances[]> {
  using file = openGguf(tinyPath);
  const config = readDecoderConfig(file);
  using kernels = await createKernels(backend, { threads: 1 });
  const weights = loadWeights(file, config, { kernels, mode: 'exact', cache: null });
  return [...calibrate({ config, weights, kernels, tokens: Int32Array.from(tokens) })];
}

const traceOf = ({ rows, data }: Columns): number =>
  data.reduce((sum, value, i) => (i % (rows + 1) === 0 ? sum + value : sum), 0);
const timesVector = ({ rows, data }: Columns, x: Float64Array): Float64Array =>
  Float64Array.from({ length: rows }, (_, i) =>
    x.reduce((sum, value, j) => sum + value * data[j * rows + i]!, 0),
  );

describe.each(['ggml', 'reference'] as const)('calibrate on %s', (backend) => {
  it("measures what transformers' hooks see, in every projection of every block", async () => {
    const blocks = await covariancesOf(backend, golden.tokens);
    expect(blocks).toHaveLength(2);
    let compared = 0;
    for (const [block, covariances] of blocks.entries()) {
      for (const projection of projections) {
        const want = golden.modules[`${block}.${projection}`]!;
        const got = covariances[projection];
        expect(traceOf(got) / want.trace).toBeCloseTo(1, 4);
        const probes = floats(want.probes);
        const products = floats(want.products);
        for (let i = 0; i < 4; i++) {
          const [from, to] = [i * got.rows, (i + 1) * got.rows];
          const ours = timesVector(got, probes.subarray(from, to));
          const worst = Math.max(...ours.map((v, j) => Math.abs(v - products[from + j]!)));
          expect(worst).toBeLessThan(1e-4 * want.trace);
          compared += ours.length;
        }
        for (let i = 0; i < got.data.length; i++) {
          const mirrored = got.data[(i % got.rows) * got.rows + Math.floor(i / got.rows)]!;
          expect(Math.abs(got.data[i]! - mirrored)).toBeLessThanOrEqual(1e-6 * want.trace);
        }
      }
    }
    expect(compared).toBe(2 * 4 * (6 * 64 + 96));
  });
});

describe('calibrate', () => {
  it('takes a long text in windows that do not see each other, and leaves a rest out', async () => {
    const window = Array.from({ length: 512 }, (_, i) => 3 + ((i * 7) % 300));
    const once = await covariancesOf('ggml', window);
    const twice = await covariancesOf('ggml', [...window, ...window, 5, 6, 7]);
    for (const [block, covariances] of once.entries()) {
      for (const projection of projections) {
        const [x, y] = [covariances[projection], twice[block]![projection]];
        const worst = Math.max(...x.data.map((value, i) => Math.abs(value - y.data[i]!)));
        expect(worst).toBeLessThan(1e-6 * traceOf(x));
      }
    }
  });

  it('refuses a text of no tokens, and one that is too long', async () => {
    await expect(covariancesOf('reference', [])).rejects.toThrow('0 tokens');
    const tokens = new Array<number>(65_537).fill(5);
    await expect(covariancesOf('reference', tokens)).rejects.toThrow('want 1 to 65536');
  });
});
