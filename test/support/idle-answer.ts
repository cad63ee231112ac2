// What a request gets from an engine that does nothing else: the model alone, one sequence, the whole prompt at once, no
// prefix cache, no residency, no loop. The oracle that every busy run is compared with.

import type { Generation } from '../../src/adapters/adapter.ts';
import type { GenerateRequest } from '../../src/engine/messages.ts';
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

export function idleAnswer(
  request: GenerateRequest,
  rankOf: (generation: Generation) => number,
  endTokens: readonly number[],
): IdleAnswer {
  const { sampling, tokens: prompt, tokensMax } = request;
  const length = prompt.length + tokensMax;
  const stepper = new FakeStepper({ cells: length + 32, pages: 40, tokensMax: length });
  const adapter = loadAlone(stepper, request, rankOf);
  const sampler = new Sampler(fakeConfig.vocabSize);
  const history = { prompt: new Set(prompt), counts: new Map<number, number>() };
  const answer: number[] = [];
  let next = prompt;
  let position = 0;
  for (;;) {
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

function loadAlone(
  stepper: FakeStepper,
  request: GenerateRequest,
  rankOf: (generation: Generation) => number,
): AdapterRows | null {
  const [part, ...others] = request.adapter?.parts ?? [];
  if (part === undefined || part.rank === 0) return null;
  if (others.length > 0) throw new Error('one part only');
  const { generation, rank } = part;
  const packed = fakePacked(generation, rankOf(generation));
  const pages = Array.from({ length: Math.ceil(rank / 8) }, (_, i) => i + 3);
  for (const [i, page] of pages.entries()) {
    for (let block = 0; block < fakeConfig.blocks; block++) {
      for (const projection of projections) {
        stepper.writePage(page, { block, projection }, packed.page({ block, projection }, i));
      }
    }
  }
  return uniformRows(pages, rank);
}
