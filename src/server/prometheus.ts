// The Prometheus text format 0.0.4, as much of it as the metrics page needs: counters, gauges and histograms with
// labels. A family's series are created by use, so label values must come from bounded sets.

export type Labels = Readonly<Record<string, string>>;

/** Series beyond this are dropped: a label that turns out to be unbounded must not fill the memory. */
const seriesMax = 512;

export class Page {
  readonly #families: Array<() => string> = [];

  /** Returns what adds to it. */
  counter(name: string, help: string): (labels?: Labels, value?: number) => void {
    const series = new Map<string, { labels: Labels; value: number }>();
    this.gauge(
      name,
      help,
      () => [...series.values()].map((one) => [one.labels, one.value]),
      'counter',
    );
    return function add(labels = {}, value = 1) {
      const key = JSON.stringify(labels);
      const known = series.get(key);
      if (known !== undefined) known.value += value;
      else if (series.size < seriesMax) series.set(key, { labels, value });
    };
  }

  /** `read` is asked at each scrape; a counter may be read as well, where someone else counts. */
  gauge(
    name: string,
    help: string,
    read: () => ReadonlyArray<readonly [Labels, number]>,
    type: 'gauge' | 'counter' = 'gauge',
  ): void {
    this.#families.push(() => {
      const lines = read().map(([labels, value]) => line(name, labels, value));
      return head(name, help, type) + lines.join('');
    });
  }

  /** Returns what observes a value. */
  histogram(
    name: string,
    help: string,
    bounds: readonly number[],
    labels: Labels = {},
  ): (value: number) => void {
    const counts = bounds.map(() => 0);
    let [sum, count] = [0, 0];
    const bucket = (le: string, value: number): string =>
      line(`${name}_bucket`, { ...labels, le }, value);
    this.#families.push(() =>
      [
        head(name, help, 'histogram'),
        ...bounds.map((bound, i) => bucket(String(bound), counts[i]!)),
        bucket('+Inf', count),
        line(`${name}_sum`, labels, sum),
        line(`${name}_count`, labels, count),
      ].join(''),
    );
    return function observe(value) {
      if (!Number.isFinite(value)) return;
      sum += value;
      count += 1;
      for (const [i, bound] of bounds.entries()) if (value <= bound) counts[i]! += 1;
    };
  }

  render(): string {
    return this.#families.map((family) => family()).join('');
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
