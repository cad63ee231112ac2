// The Prometheus text format 0.0.4, as much of it as the metrics page needs: counters, gauges and histograms with
// labels. A family's series are created by use, so label values must come from bounded sets.

export type Labels = Readonly<Record<string, string>>;

/** Series beyond this are dropped: a label that turns out to be unbounded must not fill the memory. */
const seriesMax = 512;

interface Family {
  render(): string;
}

export class Page {
  readonly #families: Family[] = [];

  counter(name: string, help: string): Counter {
    return this.#add(new Counter(name, help));
  }

  /** `read` is asked at each scrape; null leaves the family's series out. */
  gauge(name: string, help: string, read: () => ReadonlyArray<[Labels, number]>): void {
    this.#add({
      render: () =>
        head(name, help, 'gauge') +
        read()
          .map(([l, v]) => line(name, l, v))
          .join(''),
    });
  }

  /** A total that someone else counts. */
  total(name: string, help: string, read: () => number, labels: Labels = {}): void {
    this.#add({ render: () => head(name, help, 'counter') + line(name, labels, read()) });
  }

  histogram(
    name: string,
    help: string,
    buckets: readonly number[],
    labels: Labels = {},
  ): Histogram {
    return this.#add(new Histogram(name, help, buckets, labels));
  }

  render(): string {
    return this.#families.map((family) => family.render()).join('');
  }

  #add<F extends Family>(family: F): F {
    this.#families.push(family);
    return family;
  }
}

export class Counter {
  readonly #name: string;
  readonly #help: string;
  readonly #series = new Map<string, { labels: Labels; value: number }>();

  constructor(name: string, help: string) {
    this.#name = name;
    this.#help = help;
  }

  add(value = 1, labels: Labels = {}): void {
    const key = JSON.stringify(labels);
    const series = this.#series.get(key);
    if (series !== undefined) series.value += value;
    else if (this.#series.size < seriesMax) this.#series.set(key, { labels, value });
  }

  render(): string {
    const lines = [...this.#series.values()].map(({ labels, value }) =>
      line(this.#name, labels, value),
    );
    return head(this.#name, this.#help, 'counter') + lines.join('');
  }
}

export class Histogram {
  readonly #name: string;
  readonly #help: string;
  readonly #buckets: readonly number[];
  readonly #labels: Labels;
  readonly #counts: number[];
  #sum = 0;
  #count = 0;

  constructor(name: string, help: string, buckets: readonly number[], labels: Labels) {
    this.#name = name;
    this.#help = help;
    this.#buckets = buckets;
    this.#labels = labels;
    this.#counts = buckets.map(() => 0);
  }

  observe(value: number): void {
    if (!Number.isFinite(value)) return;
    this.#sum += value;
    this.#count += 1;
    for (const [i, bound] of this.#buckets.entries()) if (value <= bound) this.#counts[i]! += 1;
  }

  render(): string {
    const name = this.#name;
    const bucket = (le: string, count: number): string =>
      line(`${name}_bucket`, { ...this.#labels, le }, count);
    return [
      head(name, this.#help, 'histogram'),
      ...this.#buckets.map((bound, i) => bucket(String(bound), this.#counts[i]!)),
      bucket('+Inf', this.#count),
      line(`${name}_sum`, this.#labels, this.#sum),
      line(`${name}_count`, this.#labels, this.#count),
    ].join('');
  }
}

function head(name: string, help: string, type: 'counter' | 'gauge' | 'histogram'): string {
  return `# HELP ${name} ${help}\n# TYPE ${name} ${type}\n`;
}

function line(name: string, labels: Labels, value: number): string {
  const escaped = (text: string): string =>
    text.replaceAll('\\', '\\\\').replaceAll('"', '\\"').replaceAll('\n', '\\n');
  const pairs = Object.entries(labels).map(([key, text]) => `${key}="${escaped(text)}"`);
  return `${name}${pairs.length === 0 ? '' : `{${pairs.join(',')}}`} ${value}\n`;
}
