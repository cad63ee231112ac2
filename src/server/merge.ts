// Several event sequences as one: each is asked for its next event only after its last one was taken, so a reader that
// stops stops them all. Order within a sequence is kept; between sequences it is the order of arrival.

export interface Tagged<T> {
  readonly index: number;
  readonly value: T;
}

/** Throws what the first failing source throws. Closes every source on the way out, however it is left. */
export async function* merge<T>(
  sources: ReadonlyArray<AsyncIterable<T>>,
): AsyncGenerator<Tagged<T>, void, void> {
  const iterators = sources.map((source) => source[Symbol.asyncIterator]());
  const pending = new Map<number, Promise<{ index: number; result: IteratorResult<T> }>>();
  const ask = (index: number): void => {
    const next = iterators[index]!.next().then((result) => ({ index, result }));
    // A failure is seen by the race below or, after another one has failed first, by nobody.
    next.catch(() => {});
    pending.set(index, next);
  };
  try {
    for (const index of iterators.keys()) ask(index);
    while (pending.size > 0) {
      const { index, result } = await Promise.race(pending.values());
      pending.delete(index);
      if (result.done === true) continue;
      yield { index, value: result.value };
      ask(index);
    }
  } finally {
    // Not awaited: an async generator answers return() only after its pending next(), and the caller's abort signal is
    // what makes that one settle.
    for (const iterator of iterators) iterator.return?.()?.catch(() => {});
  }
}
