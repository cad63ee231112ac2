// What a request gets from an engine that does nothing else: the model alone, one sequence, the whole prompt at once, no
// prefix cache, no residency, no loop. The oracle that every busy run is compared with.

import type { PackedAdapter } from '../../src/adapters/pack.ts';
import type { ResidentKey } from '../../src/adapters/residency.ts';
import type { GenerateRequest, RankChange } from '../../src/engine/messages.ts';
import { Sampler } from '../../src/engine/sampler.ts';
import { projections } from '../../src/model/decoder-config.ts';
import { type AdapterRows, uniformRows } from '../../src/model/stepper.ts';
import { FakeStepper, fakeBytesOf, fakeConfig, fakePacked } from './fake-stepper.ts';

export interface IdleAnswer {
  /** The end token, when one ended it, is not among them. */
  readonly tokens: readonly number[];
  readonly text: string;
  readonly reason: 'stop' | 'length';
}

/** `changes`: of the rank on the way, as the events told. */
export function idleAnswer(
  request: GenerateRequest,
  rankOf: (key: ResidentKey) => number,
  endTokens: readonly number[],
  changes: readonly RankChange[] = [],
): IdleAnswer {
  const { sampling, tokens: prompt, tokensMax } = request;
  const length = prompt.length + tokensMax;
  const stepper = new FakeStepper({ cells: length + 32, pages: 64, tokensMax: length });
  const sampler = new Sampler(fakeConfig.vocabSize);
  const history = { prompt: new Set(prompt), counts: new Map<number, number>() };
  const answer: number[] = [];
  let loadedRank: number | undefined;
  let adapter = loadAlone(stepper, request, rankOf);
  let next = prompt;
  let position = 0;
  for (;;) {
    const rank = changes.findLast(({ afterTokens }) => afterTokens <= answer.length)?.rank;
    if (rank !== loadedRank) adapter = loadAlone(stepper, atRank(request, rank, rankOf), rankOf);
    loadedRank = rank;
    const segment = { tokens: next, cellBase: 16, position, adapter, wantsLogits: true };
    const logits = stepper.step([segment]).logits(0);
    const token = sampler.sample(logits, sampling, history, answer.length);
    if (endTokens.includes(token)) return done(request, answer, 'stop');
    answer.push(token);
    history.counts.set(token, (history.counts.get(token) ?? 0) + 1);
    const stopped = stopAt(request, textOf(answer));
    if (stopped !== null) return { tokens: answer, text: stopped, reason: 'stop' };
    if (answer.length === tokensMax) return done(request, answer, 'length');
    position += next.length;
    next = Int32Array.of(token);
  }
}

/** undefined: as the request has it. */
function atRank(
  request: GenerateRequest,
  rank: number | undefined,
  rankOf: (key: ResidentKey) => number,
): GenerateRequest {
  const { adapter } = request;
  if (adapter === null || rank === undefined) return request;
  const parts = adapter.parts.map((part) => ({
    ...part,
    rank: Math.min(rank, rankOf(part.generation)),
  }));
  return { ...request, adapter: { ...adapter, parts } };
}

function done(request: GenerateRequest, answer: number[], reason: 'stop' | 'length'): IdleAnswer {
  const text = new TextDecoder('utf-8', { ignoreBOM: true }).decode(bytesOf(answer));
  return { tokens: answer, text: stopAt(request, text) ?? text, reason };
}

function bytesOf(tokens: readonly number[]): Uint8Array {
  return Uint8Array.from(tokens.flatMap((token) => [...fakeBytesOf(token)]));
}

/** The text that is certain: half a character at the end may still become one. */
function textOf(tokens: readonly number[]): string {
  return new TextDecoder('utf-8', { ignoreBOM: true }).decode(bytesOf(tokens), { stream: true });
}

function stopAt(request: GenerateRequest, text: string): string | null {
  const ends = request.stop
    .map((stop) => ({ stop, at: text.indexOf(stop) }))
    .filter((one) => one.at >= 0)
    .sort((a, b) => a.at + a.stop.length - b.at - b.stop.length || b.stop.length - a.stop.length);
  return ends[0] === undefined ? null : text.slice(0, ends[0].at);
}

/** Every part in pages of its own, one after another; a merge has the pages that its key names. */
function loadAlone(
  stepper: FakeStepper,
  { adapter }: GenerateRequest,
  rankOf: (key: ResidentKey) => number,
): AdapterRows | null {
  if (adapter === null) return null;
  const { merge, density, system } = adapter;
  let parts = adapter.parts
    .filter(({ rank }) => rank > 0)
    .map(({ generation, ...rest }) => ({ key: generation as ResidentKey, ...rest }));
  if (merge !== 'linear' && parts.length > 0) {
    const texts = parts.map(({ key, rank, weight }) => `${key}*${rank}*${weight}`);
    const key: ResidentKey = `blend:${merge}:${density}:${texts.join()}`;
    parts = [{ key, rank: rankOf(key), weight: 1 }];
  }
  if (system !== null) parts.push({ ...system, key: system.generation });
  if (parts.length === 0) return null;
  const pages = parts.map(({ key, rank }, i) => {
    const own = Array.from({ length: Math.ceil(rank / 8) }, (_, page) => 3 + 6 * i + page);
    writeAll(stepper, fakePacked(key, rankOf(key)), own);
    return own;
  });
  const [first] = parts;
  if (parts.length === 1) return { ...uniformRows(pages[0]!, first!.rank), scale: first!.weight };
  const gates = parts.flatMap(({ rank, weight }, i) =>
    Array.from({ length: 8 * pages[i]!.length }, (_, r) => (r < rank ? weight : 0)),
  );
  const modules = fakeConfig.blocks * projections.length;
  return {
    ...uniformRows(
      pages.flat(),
      parts.reduce((sum, { rank }) => sum + rank, 0),
    ),
    gates: Float32Array.from(Array.from({ length: modules }, () => gates).flat()),
  };
}

function writeAll(stepper: FakeStepper, packed: PackedAdapter, pages: readonly number[]): void {
  for (const [i, page] of pages.entries()) {
    for (let block = 0; block < fakeConfig.blocks; block++) {
      for (const projection of projections) {
        stepper.writePage(page, { block, projection }, packed.page({ block, projection }, i));
      }
    }
  }
}
