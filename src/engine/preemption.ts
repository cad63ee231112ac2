// Whose cells a sequence may have that finds no room: of its own tenant whoever has a lower priority, of other tenants
// whoever's holds more than its own would, with a lower priority, or twice as much with none higher. They compute again what
// they lose, so only so often: with that, and because none of these relations holds both ways, nobody goes round in circles.

export interface Holder {
  readonly tenant: string;
  readonly priority: number;
  readonly arrival: number;
  /** How often it has given its cells away. */
  readonly preemptions: number;
}

const preemptionsMax = 2;
/** Holders that are looked at, and that one sequence may displace. Guesses. */
const looksMax = 8;
const victimsMax = 2;

/** Who has to go so that `fits`; nobody when that would not help. Lowest priority first, then the youngest. */
export function planPreemption<T extends Holder>(
  candidate: Pick<Holder, 'tenant' | 'priority'>,
  holders: Iterable<T>,
  held: (tenant: string) => number,
  fits: (gone: readonly T[]) => boolean,
): readonly T[] {
  const weakest = [...holders]
    .filter((one) => mayDisplace(candidate, one, held))
    .sort((a, b) => a.priority - b.priority || b.arrival - a.arrival)
    .slice(0, looksMax);
  const gone: T[] = [];
  for (const one of weakest) {
    gone.push(one);
    if (!fits(gone)) continue;
    // A run of cells has to be in one piece: who was looked at first may have nothing to do with it.
    for (const other of [...gone]) {
      const without = gone.filter((kept) => kept !== other);
      if (fits(without)) gone.splice(gone.indexOf(other), 1);
    }
    return gone.length <= victimsMax ? gone : [];
  }
  return [];
}

function mayDisplace(
  { tenant, priority }: Pick<Holder, 'tenant' | 'priority'>,
  other: Holder,
  held: (tenant: string) => number,
): boolean {
  if (other.preemptions >= preemptionsMax) return false;
  if (other.tenant === tenant) return other.priority < priority;
  const [own, its] = [held(tenant) + 1, held(other.tenant)];
  return (
    (its >= own && other.priority < priority) || (its >= 2 * own && other.priority <= priority)
  );
}
