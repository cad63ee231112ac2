// Watches streamed text for stop strings. Text is released only when it can no longer be the beginning of a stop
// string, so a stop string never leaks a prefix of itself. Linear in the text: one Knuth-Morris-Pratt automaton a stop.

import { GatewayError } from '../errors.ts';

export interface StopMatcher {
  /** `text` may be shown now. Once `stop` is set the matcher is done: the stop string and all after it are dropped. */
  push(text: string): StopMatch;
  /** The end came without a stop: the text that was held back as a possible beginning of one. */
  flush(): string;
}

export interface StopMatch {
  readonly text: string;
  readonly stop: string | null;
}

const stopsMax = 4;
const stopCharactersMax = 4096;

export function createStopMatcher(stops: readonly string[]): StopMatcher {
  check(stops);
  const automata = stops.map(createAutomaton);
  let held = '';
  let isDone = false;

  return {
    push(text) {
      if (isDone) throw new GatewayError('INTERNAL', 'stop matcher: push after a stop');
      const start = held.length;
      held += text;
      for (let at = start; at < held.length; at += 1) {
        const stop = longestMatch(automata, held.charCodeAt(at));
        if (stop === null) continue;
        isDone = true;
        const shown = held.slice(0, at + 1 - stop.length);
        held = '';
        return { text: shown, stop };
      }
      const keep = automata.reduce((most, automaton) => Math.max(most, automaton.matched()), 0);
      const shown = held.slice(0, held.length - keep);
      held = held.slice(held.length - keep);
      return { text: shown, stop: null };
    },
    flush() {
      const rest = held;
      held = '';
      return rest;
    },
  };
}

function check(stops: readonly string[]): void {
  if (stops.length > stopsMax) {
    throw new GatewayError('INVALID_REQUEST', `${stops.length} stop strings; at most ${stopsMax}`, {
      param: 'stop',
    });
  }
  for (const stop of stops) {
    if (stop.length === 0 || stop.length > stopCharactersMax) {
      throw new GatewayError(
        'INVALID_REQUEST',
        `a stop string has ${stop.length} characters; 1 to ${stopCharactersMax} are allowed`,
        { param: 'stop' },
      );
    }
  }
}

interface Automaton {
  readonly stop: string;
  /** Takes one UTF-16 unit; true when the stop string ends here. */
  next(unit: number): boolean;
  /** How many units at the end of the text are a beginning of the stop string. */
  matched(): number;
}

/** Every automaton must see every unit, also after one of them matched. The longest stop string that ends here wins:
 *  with `ab` and `b` the `a` belongs to the stop. */
function longestMatch(automata: readonly Automaton[], unit: number): string | null {
  let longest: string | null = null;
  for (const automaton of automata) {
    if (automaton.next(unit) && automaton.stop.length > (longest?.length ?? 0)) {
      longest = automaton.stop;
    }
  }
  return longest;
}

function createAutomaton(stop: string): Automaton {
  const units = Uint16Array.from({ length: stop.length }, (_, at) => stop.charCodeAt(at));
  // borders[n]: length of the longest proper prefix of the first n units that is also their suffix.
  const borders = new Int32Array(units.length + 1);
  for (let at = 1, border = 0; at < units.length; at += 1) {
    while (border > 0 && units[at] !== units[border]) border = borders[border]!;
    if (units[at] === units[border]) border += 1;
    borders[at + 1] = border;
  }
  let matched = 0;
  return {
    stop,
    next(unit) {
      while (matched > 0 && unit !== units[matched]) matched = borders[matched]!;
      if (unit === units[matched]) matched += 1;
      return matched === units.length;
    },
    matched: () => matched,
  };
}
