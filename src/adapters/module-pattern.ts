// Regular expressions from a tenant's adapter_config.json, matched against module names. JavaScript's own RegExp would
// backtrack for ever on a hostile one, so this follows all ways at once: sets of positions, and a bound on the work. The
// syntax is what Python's `re` and JavaScript share; anything else is refused, never read differently from PEFT.

import { GatewayError } from '../errors.ts';

/** Whether the whole of `text` matches. */
export type ModulePattern = (text: string) => boolean;

const patternLengthMax = 2_000;
const depthMax = 20;
const repeatsMax = 1_000;
/** Visits of a node: hand-written patterns need a few thousand (guess from the longest seen, about 60 characters). */
const visitsMax = 1_000_000;

type Node =
  | { readonly kind: 'character'; readonly accepts: (character: string) => boolean }
  | { readonly kind: 'start' | 'end' }
  | { readonly kind: 'sequence' | 'choice'; readonly items: readonly Node[] }
  | {
      readonly kind: 'repeat';
      readonly item: Node;
      readonly min: number;
      readonly max: number;
    };

/** Matches as Python's `re.fullmatch(pattern, text)`. Throws INVALID_ADAPTER for syntax that it does not know. */
export function parseModulePattern(pattern: string): ModulePattern {
  const node = parse(pattern);
  return (text) => reaches(node, text, [0]);
}

/** Matches as PEFT's get_pattern_key: the pattern from a name's start or from behind any dot, to its end. */
export function parseSuffixPattern(pattern: string): ModulePattern {
  const node = parse(pattern);
  return (text) => reaches(node, text, suffixStarts(text));
}

function suffixStarts(text: string): number[] {
  const starts = [0];
  for (let i = 0; i < text.length; i++) if (text[i] === '.') starts.push(i + 1);
  return starts;
}

function reaches(node: Node, text: string, starts: readonly number[]): boolean {
  return ends(node, new Set(starts), { text, visits: 0 }).has(text.length);
}

interface Walk {
  readonly text: string;
  visits: number;
}

/** Where `node` can end when it may begin at any of `starts`. */
function ends(node: Node, starts: ReadonlySet<number>, walk: Walk): ReadonlySet<number> {
  walk.visits += 1 + starts.size;
  if (walk.visits > visitsMax) {
    throw new GatewayError('INVALID_ADAPTER', 'a module pattern takes too long to match');
  }
  switch (node.kind) {
    case 'character':
      return new Set([...starts].filter((i) => accepts(node, walk.text[i])).map((i) => i + 1));
    case 'start':
      return new Set([...starts].filter((i) => i === 0));
    case 'end':
      return new Set([...starts].filter((i) => i === walk.text.length));
    case 'sequence':
      return node.items.reduce((from, item) => ends(item, from, walk), starts);
    case 'choice':
      return new Set(node.items.flatMap((item) => [...ends(item, starts, walk)]));
    case 'repeat':
      return repeatEnds(node, starts, walk);
  }
}

function accepts(node: Node & { kind: 'character' }, character: string | undefined): boolean {
  return character !== undefined && node.accepts(character);
}

function repeatEnds(
  { item, min, max }: Node & { kind: 'repeat' },
  starts: ReadonlySet<number>,
  walk: Walk,
): ReadonlySet<number> {
  let front = starts;
  for (let i = 0; i < min && front.size > 0; i++) front = ends(item, front, walk);
  const all = new Set(front);
  for (let i = min; i < max && front.size > 0; i++) {
    front = new Set([...ends(item, front, walk)].filter((end) => !all.has(end)));
    for (const end of front) all.add(end);
  }
  return all;
}

function parse(pattern: string): Node {
  if (pattern.length > patternLengthMax) {
    throw new GatewayError(
      'INVALID_ADAPTER',
      `a module pattern has ${pattern.length} characters, at most ${patternLengthMax}`,
    );
  }
  const parser = new PatternParser(pattern);
  const node = parser.choice(0);
  if (!parser.isAtEnd()) parser.refuse("an unopened ')'");
  return node;
}

const classes: ReadonlyMap<string, RegExp> = new Map([
  ['d', /^\d$/],
  ['D', /^\D$/],
  ['w', /^\w$/],
  ['W', /^\W$/],
  ['s', /^\s$/],
  ['S', /^\S$/],
]);

class PatternParser {
  readonly #text: string;
  #at = 0;

  constructor(text: string) {
    this.#text = text;
  }

  isAtEnd(): boolean {
    return this.#at === this.#text.length;
  }

  refuse(what: string): never {
    const shown = this.#text.slice(0, 80);
    throw new GatewayError(
      'INVALID_ADAPTER',
      `module pattern '${shown}': ${what} at ${this.#at} is not supported`,
    );
  }

  choice(depth: number): Node {
    if (depth > depthMax) this.refuse('a group this deep');
    const items = [this.#sequence(depth)];
    while (this.#take('|')) items.push(this.#sequence(depth));
    return items.length === 1 ? items[0]! : { kind: 'choice', items };
  }

  #sequence(depth: number): Node {
    const items: Node[] = [];
    while (!this.isAtEnd() && !'|)'.includes(this.#text[this.#at]!)) {
      items.push(this.#repeated(this.#atom(depth)));
    }
    return { kind: 'sequence', items };
  }

  #repeated(item: Node): Node {
    const counts = this.#counts();
    if (counts === null) return item;
    if (item.kind === 'start' || item.kind === 'end') this.refuse('a repeated anchor');
    this.#take('?'); // Lazy or greedy: the whole text matches either way.
    if (this.#counts() !== null) this.refuse('a second quantifier');
    return { kind: 'repeat', item, ...counts };
  }

  #counts(): { readonly min: number; readonly max: number } | null {
    if (this.#take('*')) return { min: 0, max: Number.POSITIVE_INFINITY };
    if (this.#take('+')) return { min: 1, max: Number.POSITIVE_INFINITY };
    if (this.#take('?')) return { min: 0, max: 1 };
    if (this.#text[this.#at] !== '{') return null;
    const found = /^\{(\d{1,4})(,(\d{1,4})?)?\}/.exec(this.#text.slice(this.#at));
    if (found === null) this.refuse("a '{'");
    const min = Number(found[1]);
    const open = found[2] === undefined ? min : Number.POSITIVE_INFINITY;
    const max = found[3] === undefined ? open : Number(found[3]);
    if (min > repeatsMax || max < min) this.refuse(found[0]);
    this.#at += found[0].length;
    return { min, max };
  }

  #atom(depth: number): Node {
    const character = this.#text[this.#at]!;
    if (character === '(') return this.#group(depth);
    if (character === '[') return this.#class();
    if ('*+?{}]'.includes(character)) this.refuse(`a '${character}'`);
    this.#at += 1;
    if (character === '^') return { kind: 'start' };
    if (character === '$') return { kind: 'end' };
    if (character === '.') return { kind: 'character', accepts: (c) => c !== '\n' };
    return { kind: 'character', accepts: character === '\\' ? this.#escape() : is(character) };
  }

  #group(depth: number): Node {
    const opening = /^\((\?:|\?P<\w{1,40}>|(?!\?))/.exec(this.#text.slice(this.#at));
    if (opening === null) this.refuse('this kind of group');
    this.#at += opening[0].length;
    const inner = this.choice(depth + 1);
    if (!this.#take(')')) this.refuse("a '(' without ')'");
    return inner;
  }

  /** Behind a backslash: a class, or a character that is no letter or digit as itself. */
  #escape(): (character: string) => boolean {
    const character = this.#text[this.#at];
    if (character === undefined) this.refuse('a backslash at the end');
    this.#at += 1;
    const shared = classes.get(character);
    if (shared !== undefined) return (c) => shared.test(c);
    if (/[\p{L}\p{N}]/u.test(character)) this.refuse(`\\${character}`);
    return is(character);
  }

  #class(): Node {
    this.#at += 1;
    const negated = this.#take('^');
    const tests: ((character: string) => boolean)[] = [];
    while (!this.#take(']')) {
      if (this.isAtEnd()) this.refuse("a '[' without ']'");
      tests.push(this.#classItem());
    }
    if (tests.length === 0) this.refuse('an empty class');
    return { kind: 'character', accepts: (c) => tests.some((test) => test(c)) !== negated };
  }

  #classItem(): (character: string) => boolean {
    const first = this.#text[this.#at]!;
    this.#at += 1;
    if (first === '\\') return this.#escape();
    if (first === '[') this.refuse("a '[' in a class");
    const last = this.#text[this.#at + 1];
    if (this.#text[this.#at] !== '-' || last === undefined || last === ']') return is(first);
    if (last === '\\' || last < first) this.refuse('this range');
    this.#at += 2;
    return (c) => c >= first && c <= last;
  }

  #take(character: string): boolean {
    if (this.#text[this.#at] !== character) return false;
    this.#at += 1;
    return true;
  }
}

function is(character: string): (other: string) => boolean {
  return (other) => other === character;
}
