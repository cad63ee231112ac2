import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { type Waiting, WaitingQueue } from '../../src/engine/waiting-queue.ts';

const never = Number.POSITIVE_INFINITY;

function one(over: Partial<Waiting> & { arrival: number }): Waiting {
  return {
    id: `s${over.arrival}`,
    tenant: 't',
    priority: 5,
    dueMs: never,
    expiresMs: never,
    promptTokens: 1,
    wantsKey: `${over.arrival % 3}`,
    ...over,
  };
}

const ids = (some: readonly Waiting[]): string[] => some.map(({ id }) => id);

function isBefore(a: Waiting, b: Waiting, late: ReadonlySet<Waiting>): boolean {
  if (late.has(a) !== late.has(b)) return late.has(b);
  if (a.priority !== b.priority) return a.priority > b.priority;
  if (a.dueMs !== b.dueMs) return a.dueMs < b.dueMs;
  return a.arrival < b.arrival;
}

/** The order as it is defined: whoever is before all others of what is left, again and again. */
function inOrder(
  waiting: readonly Waiting[],
  held: ReadonlyMap<string, number>,
  late: ReadonlySet<Waiting>,
): Waiting[] {
  const share = new Map(held);
  const shareOf = ({ tenant }: Waiting): number => share.get(tenant) ?? 0;
  const left = [...waiting];
  const order: Waiting[] = [];
  while (left.length > 0) {
    const first = left.reduce((a, b) => {
      if (shareOf(a) !== shareOf(b)) return shareOf(a) < shareOf(b) ? a : b;
      return isBefore(a, b, late) ? a : b;
    });
    order.push(first);
    left.splice(left.indexOf(first), 1);
    share.set(first.tenant, shareOf(first) + 1);
  }
  return order;
}

const arrivals = fc.record({
  kind: fc.constant('add' as const),
  tenant: fc.constantFrom('a', 'b', 'c', 'd'),
  priority: fc.constantFrom(2, 5, 5, 8),
  dueMs: fc.constantFrom(100, 200, 300, never),
  expiresMs: fc.constantFrom(50, 150, 250, never, never),
});
const actions = fc.array(
  fc.oneof(
    { weight: 4, arbitrary: arrivals },
    {
      weight: 3,
      arbitrary: fc.record({
        kind: fc.constantFrom(
          'admit' as const,
          'delete' as const,
          'release' as const,
          'preempt' as const,
          'expire' as const,
        ),
        pick: fc.nat(),
      }),
    },
  ),
  { maxLength: 80, size: 'max' },
);

describe('WaitingQueue', () => {
  it('offers room in the order that it defines, whatever came and went before', () => {
    fc.assert(
      fc.property(actions, fc.integer({ min: 1, max: 12 }), (all, count) => {
        const queue = new WaitingQueue<Waiting>();
        const waiting: Waiting[] = [];
        const running: Waiting[] = [];
        const late = new Set<Waiting>();
        const held = new Map<string, number>();
        const hold = (tenant: string, more: number): void =>
          void held.set(tenant, (held.get(tenant) ?? 0) + more);
        let [arrival, nowMs, sinceTurn] = [0, 0, 0];
        for (const action of all) {
          if (action.kind === 'add') {
            arrival += 1;
            const { kind, ...over } = action;
            const added = one({ ...over, arrival, promptTokens: arrival });
            queue.add(added);
            waiting.push(added);
          } else if (action.kind === 'expire') {
            nowMs += action.pick % 60;
            queue.passTime(nowMs);
            for (const it of waiting) if (it.dueMs <= nowMs) late.add(it);
            const expired = waiting.filter(({ expiresMs }) => expiresMs <= nowMs);
            expect(new Set(ids(queue.expired(nowMs)))).toEqual(new Set(ids(expired)));
            for (const gone of expired) {
              queue.delete(gone.id);
              waiting.splice(waiting.indexOf(gone), 1);
            }
          } else if (action.kind === 'admit' || action.kind === 'delete') {
            const picked = waiting[action.pick % Math.max(1, waiting.length)];
            if (picked === undefined) continue;
            const oldest = waiting.reduce((a, b) => (a.arrival < b.arrival ? a : b));
            waiting.splice(waiting.indexOf(picked), 1);
            late.delete(picked);
            if (action.kind === 'delete') expect(queue.delete(picked.id)).toBe(picked);
            else {
              sinceTurn = picked === oldest ? 0 : sinceTurn + 1;
              queue.admit(picked);
              running.push(picked);
              hold(picked.tenant, 1);
            }
          } else {
            const [picked] = running.splice(action.pick % Math.max(1, running.length), 1);
            if (picked === undefined) continue;
            queue.release(picked.tenant);
            hold(picked.tenant, -1);
            if (action.kind === 'release') continue;
            queue.add(picked);
            waiting.push(picked);
          }
          const order = inOrder(waiting, held, late);
          const turn =
            sinceTurn < 7 ? undefined : order.toSorted((a, b) => a.arrival - b.arrival)[0];
          const want = turn === undefined ? order : [turn, ...order.filter((it) => it !== turn)];
          expect(ids(queue.first(count))).toEqual(ids(want.slice(0, count)));
          expect(queue.size).toBe(waiting.length);
          for (const key of ['0', '1', '2']) {
            const wanting = waiting.filter(({ wantsKey }) => wantsKey === key);
            const found = queue.wanting(key);
            expect(wanting.some((it) => it === found)).toBe(wanting.length > 0);
          }
          expect(queue.promptTokens).toBe(waiting.reduce((sum, it) => sum + it.promptTokens, 0));
          for (const tenant of ['a', 'b', 'c', 'd']) {
            expect(queue.held(tenant)).toBe(held.get(tenant) ?? 0);
          }
        }
      }),
      { numRuns: 200 },
    );
  });

  it('admits whoever waits after 8 · (n + 1) admissions, n of them older, whatever others submit', () => {
    // Everybody else is a tenant of its own that holds nothing, has the highest priority and is due first; and there are
    // always more of them than room.
    fc.assert(
      fc.property(
        fc.integer({ min: 0, max: 20 }),
        fc.array(fc.record({ more: fc.integer({ min: 1, max: 3 }), ends: fc.boolean() }), {
          minLength: 200,
          maxLength: 200,
        }),
        (older, rounds) => {
          const queue = new WaitingQueue<Waiting>();
          let arrival = 0;
          const add = (over: Partial<Waiting>): Waiting => {
            arrival += 1;
            const added = one({ tenant: `t${arrival}`, priority: 9, dueMs: 1, ...over, arrival });
            queue.add(added);
            return added;
          };
          const patient = { tenant: 'patient', priority: 0, dueMs: never };
          for (let i = 0; i < older; i++) add(patient);
          const last = add(patient);
          let admissions = 0;
          for (const { more, ends } of rounds) {
            for (let i = 0; i < more; i++) add({});
            const [next] = queue.first(1);
            queue.admit(next!);
            admissions += 1;
            if (next === last) break;
            if (ends) queue.release(next!.tenant);
          }
          expect(queue.has(last.id)).toBe(false);
          expect(admissions).toBeLessThanOrEqual(8 * (older + 1));
        },
      ),
      { numRuns: 100 },
    );
  });

  it('gives the place of the last of a flood to whoever has less in the queue', () => {
    const queue = new WaitingQueue<Waiting>();
    const add = (arrival: number, over: Partial<Waiting> = {}): void =>
      queue.add(one({ arrival, expiresMs: 1e6, ...over }));
    for (let i = 0; i < 5; i++) add(i, { tenant: 'flood' });
    for (let i = 5; i < 8; i++) add(i, { tenant: 'some' });
    expect(queue.displaceable('new')?.id).toBe('s4');
    expect(queue.displaceable('some')?.id).toBe('s4'); // it would have 4
    expect(queue.displaceable('flood')).toBeUndefined();
    add(8, { tenant: 'some' });
    expect(queue.displaceable('some')).toBeUndefined(); // one for one would go on for ever
    const resumed = new WaitingQueue<Waiting>();
    for (let i = 0; i < 3; i++) resumed.add(one({ arrival: i, tenant: 'flood' }));
    expect(resumed.displaceable('new')).toBeUndefined(); // their readers have had something
    resumed.add(one({ arrival: 0.5, tenant: 'flood', expiresMs: 1e6 }));
    expect(resumed.displaceable('new')?.id).toBe('s0.5'); // whoever is behind it
  });
});
