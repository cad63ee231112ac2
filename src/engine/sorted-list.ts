// Items in order, found by halving. An insertion moves what lies behind it, which is one memory copy: at 10,000 items less
// than the comparisons that find the place.

export class SortedList<T> {
  readonly #items: T[] = [];
  readonly #compare: (a: T, b: T) => number;

  /** `compare` is 0 for no two items of the list, and does not change while they are in it. */
  constructor(compare: (a: T, b: T) => number) {
    this.#compare = compare;
  }

  get length(): number {
    return this.#items.length;
  }

  at(index: number): T | undefined {
    return this.#items[index];
  }

  add(item: T): void {
    this.#items.splice(this.#placeOf(item), 0, item);
  }

  /** No effect on what is not there. */
  delete(item: T): void {
    const index = this.#placeOf(item);
    if (this.#items[index] === item) this.#items.splice(index, 1);
  }

  shift(): T | undefined {
    return this.#items.shift();
  }

  /** Of the first item that is not before `item`. */
  #placeOf(item: T): number {
    let [low, high] = [0, this.#items.length];
    while (low < high) {
      const middle = (low + high) >>> 1;
      if (this.#compare(this.#items[middle]!, item) < 0) low = middle + 1;
      else high = middle;
    }
    return low;
  }
}
