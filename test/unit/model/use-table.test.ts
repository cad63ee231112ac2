import { describe, expect, it } from 'vitest';
import type { Ops, Program, ProgramShape, Tensor } from '../../../src/kernels/kernels.ts';
import { ReferenceKernels } from '../../../src/kernels/reference-kernels.ts';
import type { Decoder } from '../../../src/model/decoder.ts';
import { openGguf } from '../../../src/model/gguf.ts';
import { scrapCells } from '../../../src/model/step-inputs.ts';
import { type AdapterRows, type Segment, uniformRows } from '../../../src/model/stepper.ts';
import {
  openDeepTiny,
  PageBook,
  perModule,
  randomAtoms,
  randomBank,
  routedRows,
  tinyBlocks,
} from '../../support/adapter-kinds.ts';
import { openTiny, tinyPath } from '../../support/open-test-decoder.ts';

/** Keeps the names of inputs as they are written. */
class WatchedKernels extends ReferenceKernels {
  readonly #names: Set<string> = new Set();
  programs = 0;
  /** Programs that nobody has disposed of. */
  alive = 0;

  override compile(
    build: (ops: Ops) => Readonly<Record<string, Tensor>>,
    shape: ProgramShape,
  ): Program {
    const program = super.compile(build, shape);
    const write = program.write.bind(program);
    this.programs += 1;
    this.alive += 1;
    return Object.assign(program, {
      [Symbol.dispose]: () => {
        this.alive -= 1;
      },
      write: (name: string, data: Float32Array) => {
        this.#names.add(name);
        write(name, data);
      },
    });
  }

  /** Since the last call, without what every step writes. */
  written(): string[] {
    const always = ['cells', 'outputRows', 'pages', 'positions', 'tokens', 'uses'];
    const names = [...this.#names].filter((name) => !always.includes(name));
    this.#names.clear();
    return names.sort((a, b) => a.localeCompare(b));
  }
}

const bank = randomBank({ r: 8, dq: 4, K: 3, blockLayers: 1 });

function open(): { kernels: WatchedKernels; decoder: Decoder; book: PageBook } {
  const kernels = new WatchedKernels();
  const decoder = openDeepTiny(kernels, { blocks: tinyBlocks, pages: 20 });
  decoder.setAtomBank(bank);
  kernels.programs = 0; // without the one that the bank was tried with
  return { kernels, decoder, book: new PageBook(decoder, 5) };
}

function segments(...adapters: ReadonlyArray<AdapterRows | null>): Segment[] {
  return adapters.map((adapter, run) => {
    const cellBase = scrapCells + run * 8;
    return { tokens: Int32Array.of(7), cellBase, position: 0, adapter, wantsLogits: true };
  });
}

describe('the use table', () => {
  it('is written when the uses or their order change, and not by steps of the same', () => {
    const { kernels, decoder, book } = open();
    using owned = decoder;
    const [a, b] = [uniformRows(book.take(1), 8), uniformRows(book.take(1), 4)];
    owned.step(segments(a, b));
    expect(kernels.written()).toEqual(['gates']);
    owned.step(segments(a, b));
    owned.step(segments(b, null)); // another program? no: the same sizes, other uses
    expect(kernels.written()).toEqual(['gates']);
    owned.step(segments(b, null));
    owned.step(segments(null, b));
    owned.step(segments(b, b));
    expect(kernels.written()).toEqual([]);
    owned.step(segments(a, b));
    owned.step(segments(b, a));
    expect(kernels.written()).toEqual(['gates']);
    owned.step(segments({ ...a }, b)); // another object may say something else
    expect(kernels.written()).toEqual(['gates']);
    expect(kernels.programs).toBe(1);
  });

  it('has only what some row needs, in a program of its own', () => {
    const { kernels, decoder, book } = open();
    using owned = decoder;
    const pages = book.take(1);
    const { config } = owned;
    const plain = uniformRows(pages, 8);
    const gated = { ...plain, gates: perModule(config, pages, (_, rank) => rank) };
    const routed = routedRows(book, config, pages, { topK: 2, temperature: 0 });
    const queried = { ...plain, atoms: randomAtoms(bank, 2, 1) };
    owned.step(segments(plain, gated));
    expect(kernels.written()).toEqual(['gates']);
    owned.step(segments(plain, routed));
    expect(kernels.written()).toEqual(['bias', 'gates', 'groups', 'temperatures']);
    owned.step(segments(plain, queried));
    expect(kernels.written()).toEqual(['atomBias', 'gates', 'keys', 'topK']);
    owned.step(segments(null, null));
    expect(kernels.written()).toEqual([]);
    expect(kernels.programs).toBe(4);
    owned.step(segments(gated, routed));
    owned.step(segments(routed, gated));
    expect(kernels.programs).toBe(5);
  });

  it('whatever order and neighbours rows have, they get the same numbers', () => {
    const { decoder, book } = open();
    using owned = decoder;
    const pages = book.take(2);
    const routed = routedRows(book, owned.config, book.take(1), { topK: 3, temperature: 0.3 });
    const uses = [uniformRows(pages, 3), null, routed, uniformRows(pages, 12), null, routed];
    const result = owned.step(segments(...uses));
    const forth = uses.map((_, i) => result.logits(i).slice());
    const turned = owned.step(segments(...[...uses].reverse()));
    const back = uses.map((_, i) => turned.logits(uses.length - 1 - i));
    expect(back).toEqual(forth);
  });
});

describe('programs', () => {
  it('are kept up to a number, and freed with the decoder', () => {
    const { kernels, decoder, book } = open();
    const pages = book.take(2);
    const plain = uniformRows(pages, 16);
    const gates = perModule(decoder.config, pages, () => 1);
    const uses = [null, uniformRows(pages, 8), plain, { ...plain, gates }];
    const first = decoder.step(segments(null)).logits(0).slice();
    for (const use of uses) {
      for (let rows = 1; rows <= 8; rows++) {
        for (const count of [1, 2, 4, 8]) {
          if (count > rows) continue;
          const [one, ...others] = segments(...new Array(count).fill(use));
          const tokens = new Int32Array(1 + rows - count).fill(7);
          decoder.step([...others, { ...one!, tokens, cellBase: scrapCells + 100 }]);
        }
      }
    }
    expect(kernels.programs).toBe(4 * 21);
    expect(kernels.alive).toBe(48);
    expect(decoder.step(segments(null)).logits(0)).toEqual(first); // recorded again
    expect(kernels.programs).toBe(4 * 21 + 1);
    decoder[Symbol.dispose]();
    expect(kernels.alive).toBe(0);
  });
});

describe('a use that does not fit', () => {
  const { kernels, decoder, book } = open();
  const pages = book.take(3);
  const { config } = decoder;
  const plain = uniformRows(pages, 24);
  const gates = perModule(config, pages, () => 1);
  const group = { firstPage: 0, pages: 1, topK: 1, temperature: 0 };
  const routing = (...groups: ReadonlyArray<Partial<typeof group>>): AdapterRows => ({
    ...plain,
    routing: { groups: groups.map((one) => ({ ...group, ...one })), bias: gates },
  });
  const atoms = randomAtoms(bank, 2, 1);

  const bad: ReadonlyArray<readonly [string, AdapterRows, RegExp]> = [
    ['rank 0', uniformRows(pages, 0), /rank 0/],
    ['a rank and a half', uniformRows(pages, 1.5), /rank 1.5/],
    ['a rank beyond its pages', { ...plain, gates, rank: 25 }, /rank 25/],
    ['page 0', uniformRows([0], 8), /pages 0 /],
    ['a page beyond the last', uniformRows([20], 8), /within 1…19/],
    ['33 pages', uniformRows(new Array(33).fill(1), 257), /rank 257/],
    ['no number as a scale', { ...plain, scale: Number.NaN }, /scale/],
    ['gates of one page', { ...plain, gates: gates.subarray(8) }, /gates of 3 pages/],
    [
      'biases of one page',
      { ...plain, routing: { groups: [], bias: gates.subarray(8) } },
      /bias of 3 pages/,
    ],
    ['a group before the first page', routing({ firstPage: -1 }), /pages -1/],
    ['a group without pages', routing({ pages: 0 }), /of 3/],
    ['a group beyond the last page', routing({ firstPage: 2, pages: 2 }), /pages 2…3 of 3/],
    ['half a page', routing({ firstPage: 0.5 }), /pages 0.5/],
    ['groups that share a page', routing({ pages: 2 }, { firstPage: 1 }), /free from 2/],
    ['groups out of order', routing({ firstPage: 1 }, { firstPage: 0 }), /free from 2/],
    ['no rank that stays', routing({ topK: 0 }), /0 ranks/],
    ['more ranks than the group has', routing({ topK: 9 }), /9 ranks/],
    ['a negative temperature', routing({ temperature: -1 }), /temperature -1/],
    ['an endless temperature', routing({ temperature: Number.POSITIVE_INFINITY }), /Infinity/],
    ['another bank', { ...plain, atoms: { ...atoms, bank: 'b' } }, /atoms of bank b/],
    ['no atoms', { ...plain, atoms: { ...atoms, topK: 0 } }, /0 of 3 atoms/],
    ['more atoms than there are', { ...plain, atoms: { ...atoms, topK: 4 } }, /4 of 3 atoms/],
    ['keys of another length', { ...plain, atoms: { ...atoms, keys: atoms.bias } }, /keys/],
    ['biases of another length', { ...plain, atoms: { ...atoms, bias: atoms.keys } }, /bias/],
    ['a choice among mixed ranks', { ...routing({}), atoms }, /free from 1/],
  ];
  it.each(bad)('is refused before anything is computed: %s', (_, use, message) => {
    kernels.written();
    const cells = segments(plain, use);
    expect(() => decoder.step(cells)).toThrow(message);
    expect(() => decoder.step(cells)).toThrow(
      expect.objectContaining({ code: 'SHAPE_MISMATCH' }) as Error,
    );
    expect(kernels.written()).toEqual([]);
  });

  it('leaves the decoder as it was', () => {
    using owned = decoder;
    owned.step(segments({ ...routing({ firstPage: 1, pages: 2, topK: 16 }), atoms }, plain));
  });
});

describe('the atom bank', () => {
  it('is one at a time, and its rows are refused when another is there', () => {
    const { decoder, book } = open();
    using owned = decoder;
    const pages = book.take(2);
    const of = (other: typeof bank): AdapterRows => ({
      ...uniformRows(pages, 16),
      atoms: randomAtoms(other, 2, 1),
    });
    const logits = (use: AdapterRows): Float32Array => owned.step(segments(use)).logits(0).slice();
    const first = logits(of(bank));
    const same = { ...bank, id: 'same sizes', atoms: bank.atoms.map((x) => 2 * x) };
    const larger = randomBank({ r: 12, dq: 5, K: 9, blockLayers: 2 });
    for (const other of [same, larger, null]) {
      owned.setAtomBank(other);
      expect(() => logits(of(bank))).toThrow(/atoms of bank/);
      if (other !== null) expect(logits(of(other))).not.toEqual(first);
    }
    owned.setAtomBank(bank);
    expect(logits(of(bank))).toEqual(first);
  });

  it('refuses numbers that do not fit, and keeps the bank before', () => {
    const { decoder, book } = open();
    using owned = decoder;
    const use = { ...uniformRows(book.take(1), 8), atoms: randomAtoms(bank, 1, 1) };
    for (const name of ['atoms', 'query', 'summary', 'context'] as const) {
      const short = { ...bank, [name]: bank[name].subarray(1) };
      const endless = { ...bank, [name]: bank[name].map(() => Number.POSITIVE_INFINITY) };
      expect(() => owned.setAtomBank(short)).toThrow(new RegExp(`${name} wants`));
      expect(() => owned.setAtomBank(endless)).toThrow(new RegExp(`${name} wants`));
    }
    for (const size of ['r', 'dq', 'K', 'blockLayers'] as const) {
      expect(() => owned.setAtomBank({ ...bank, [size]: 0 })).toThrow(/wants/);
      expect(() => owned.setAtomBank({ ...bank, [size]: 1.5 })).toThrow(/wants/);
    }
    owned.step(segments(use));
  });

  it('is refused when the kernels cannot choose by it, and not in its first step', () => {
    const decoder = openDeepTiny(new ReferenceKernels(), { blocks: 16, pages: 4 });
    using owned = decoder;
    const wide = randomBank({ r: 8, dq: 4, K: 3, blockLayers: 4 });
    owned.setAtomBank(wide);
    // 16 blocks of one layer each; more ranks than a row has.
    expect(() => owned.setAtomBank({ ...wide, id: 'b', blockLayers: 1 })).toThrow(/summaries/);
    const huge = randomBank({ r: 257, dq: 1, K: 1, blockLayers: 4 });
    expect(() => owned.setAtomBank(huge)).toThrow(/257 ranks/);
    const pages = new PageBook(owned, 1).take(1);
    owned.step(segments({ ...uniformRows(pages, 8), atoms: randomAtoms(wide, 2, 1) }));
  });

  it('has memory for a few sizes only: stored tensors are never given back', () => {
    const { decoder } = open();
    using owned = decoder;
    const sized = (dq: number) => randomBank({ r: 8, dq, K: 3, blockLayers: 1 });
    for (let dq = 5; dq < 12; dq++) owned.setAtomBank(sized(dq));
    expect(() => owned.setAtomBank(sized(12))).toThrow(/more than 8 different sizes/);
    owned.setAtomBank(sized(6));
  });
});

describe('embeddings', () => {
  it.each(['reference', 'ggml'] as const)(
    'are the rows of the file, however many (%s)',
    async (backend) => {
      const { decoder, config } = await openTiny({ backend });
      using owned = decoder;
      using file = openGguf(tinyPath);
      const { offset, bytes } = file.tensors.get('token_embd.weight')!;
      const table = new Float32Array(file.read(offset, bytes).slice().buffer);
      const ids = Int32Array.from({ length: 150 }, (_, i) => (i * 37) % 320);
      const wanted = [...ids].flatMap((id) => [
        ...table.subarray(id * config.width, (id + 1) * config.width),
      ]);
      expect(owned.embeddings(ids)).toEqual(Float32Array.from(wanted));
      expect(owned.embeddings(new Int32Array(0))).toHaveLength(0);
      expect(() => owned.embeddings(Int32Array.of(320))).toThrow(/ids/);
    },
  );
});
