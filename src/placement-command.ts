// `rankgate placement FILE`: which replicas should hold which adapters, from a description in JSON. Computes here.

import { readFileSync } from 'node:fs';
import { z } from 'zod';
import { type Command, json, numberOf, usageError } from './adapter-commands.ts';
import { GatewayError } from './errors.ts';
import { CommandError } from './gateway-client.ts';
import { impossibilities, type Placement, type PlacementProblem } from './router/placement.ts';
import { findPlacement } from './router/placement-search.ts';

const name = z.string().min(1).max(256);
const pages = z
  .int()
  .min(0)
  .max(2 ** 20);
const problemSchema: z.ZodType<PlacementProblem> = z.strictObject({
  replicas: z
    .array(z.strictObject({ name, pages, capacity: z.number().positive() }))
    .min(1)
    .max(1024),
  adapters: z
    .array(
      z.strictObject({
        name,
        pages,
        load: z.number().min(0),
        copies: z.int().min(1).max(1024).default(1),
        shares: name.nullable().default(null),
        on: z.array(name).max(1024).default([]),
      }),
    )
    .max(10_000),
  shared: z.array(z.strictObject({ name, pages })).max(10_000).default([]),
  moveCost: z.number().min(0).default(0),
});
// Sixty adapters on six replicas are within 1 % of the optimum after them (test/unit/router/placement.test.ts).
const iterationsDefault = 4000;
const iterationsMax = 10_000_000;

export const placementCommand: Command = {
  flags: { ...json, seed: { type: 'string' }, iterations: { type: 'string' } },
  positionals: ['FILE'],
  async run({ flags, positionals, terminal }) {
    const whole = (value: number | undefined, name: string, max: number): number => {
      if (Number.isInteger(value) && value! >= 0 && value! <= max) return value!;
      throw usageError(`${name}: want a whole number from 0 to ${max}`);
    };
    const seed = whole(numberOf(flags.seed, '--seed') ?? 0, '--seed', 2 ** 32 - 1);
    const wanted = numberOf(flags.iterations, '--iterations') ?? iterationsDefault;
    const iterations = whole(wanted, '--iterations', iterationsMax);
    const problem = readProblem(positionals[0]!);
    const reasons = impossibilities(problem);
    if (reasons.length > 0) throw new CommandError(1, 'INFEASIBLE', reasons.join('\n'));
    const placement = findPlacement(problem, { seed, iterations });
    if (placement.missing.length > 0) {
      const message = `no room was found for every copy of ${placement.missing.join(', ')}`;
      throw new CommandError(1, 'INFEASIBLE', message);
    }
    terminal.out(flags.json ? `${JSON.stringify(placement)}\n` : shown(problem, placement));
  },
};

function readProblem(path: string): PlacementProblem {
  const invalid = (message: string): GatewayError => new GatewayError('INVALID_REQUEST', message);
  let value: unknown;
  try {
    value = JSON.parse(readFileSync(path, 'utf8'));
  } catch (error) {
    throw invalid(`${path}: ${(error as Error).message}`);
  }
  const { success, data, error } = problemSchema.safeParse(value);
  if (success) return data;
  const { path: where, message } = error.issues[0]!;
  throw invalid(`${path}: ${where.join('.')}: ${message}`);
}

function shown({ replicas, adapters }: PlacementProblem, placement: Placement): string {
  const { peak, pagesToLoad, hosts } = placement;
  const lines = replicas.map(({ name }) => {
    const here = adapters.filter((_, a) => hosts[a]!.includes(name));
    const words = here.map((one) => (one.on.includes(name) ? one.name : `+${one.name}`));
    return `${name}: ${words.join(' ') || '(none)'}\n`;
  });
  const busiest = `busiest ${(100 * peak).toFixed(1)} %`;
  return `${lines.join('')}${busiest}, ${pagesToLoad} pages to load (+)\n`;
}
