// How often each adapter will be asked for in the next interval, from what was asked in those before (algorithms.md section
// 5). Adapters are nodes, and those that move together a hyperedge: each node with its most correlated ones. A node is
// described at three time scales by its own requests, by those of the hyperedges that it is in (one hypergraph convolution)
// and by those of all adapters; one ridge regression, shared by all nodes and learned online, weighs the three branches.
// It starts as, and is pulled towards, the node's own moving average. Memory is bounded. No clock and no I/O.

/** Adapters that are followed: those asked for most. 128² correlations are 131 KB. */
const nodesMax = 128;
const neighboursMax = 5;
/** Below it two adapters are taken to be independent: several deviations of what chance correlates (guess). */
const correlationMin = 0.3;
// Gains of the moving averages, per interval: the three scales, a node's mean, and the correlations.
const gains = [0.6, 0.2, 0.05] as const;
const meanGain = 0.005;
const correlationGain = 0.002;
const regroupEvery = 16;
/** Share of what was learned that is kept per interval: 1,000 intervals count. */
const kept = 0.999;
const pull = 10;
const scales = gains.length;
const n = 1 + 3 * scales; // features: a constant, and per branch a number a scale
/** Own, at the middle scale. */
const prior = Float64Array.from({ length: n }, (_, i) => (i === 2 ? 1 : 0));

export interface ForecastRate {
  readonly name: string;
  /** Requests in the next interval. */
  readonly rate: number;
}

export class AdapterForecast {
  readonly #index = new Map<string, number>();
  readonly #names: string[] = [];
  readonly #ages = new Int32Array(nodesMax);
  readonly #means = new Float64Array(nodesMax);
  readonly #averages = new Float64Array(nodesMax * scales); // [nodes, scales]
  readonly #products = new Float64Array(nodesMax * nodesMax); // [nodes, nodes], of deviations
  readonly #features = new Float64Array(nodesMax * n); // [nodes, n], relative to the mean
  readonly #rates = new Float64Array(nodesMax);
  readonly #gram = new Float64Array(n * n); // Σ w·x·xᵀ
  readonly #target = new Float64Array(n); // Σ w·x·y
  /** Members of each node's hyperedge, itself first. */
  #edges: Array<readonly number[]> = [];
  #intervals = 0;

  /** Requests of one interval, by adapter. */
  observe(counts: ReadonlyMap<string, number>): void {
    this.#learn(counts);
    for (const [name, count] of counts) this.#admit(name, count);
    for (const [i, name] of this.#names.entries()) this.#average(i, counts.get(name) ?? 0);
    this.#correlate();
    if (this.#intervals % regroupEvery === 0) this.#regroup();
    this.#intervals += 1;
    this.#describe();
    const weights = solve(this.#gram, this.#target);
    for (let i = 0; i < this.#names.length; i++) {
      const x = this.#features.subarray(i * n, (i + 1) * n);
      this.#rates[i] = Math.max(0, this.#means[i]! * dot(weights, x));
    }
  }

  /** null: not followed. */
  rate(name: string): number | null {
    const i = this.#index.get(name);
    return i === undefined ? null : this.#rates[i]!;
  }

  /** All that are followed, the most asked for first. */
  hottest(): readonly ForecastRate[] {
    return this.#names
      .map((name, i) => ({ name, rate: this.#rates[i]! }))
      .sort((a, b) => b.rate - a.rate || (a.name < b.name ? -1 : 1));
  }

  /** The interval's counts against what its nodes looked like before it. A count's variance is about its mean, so relative
   *  counts weigh as much as the mean. */
  #learn(counts: ReadonlyMap<string, number>): void {
    if (this.#intervals === 0) return;
    for (const sums of [this.#gram, this.#target])
      for (let k = 0; k < sums.length; k++) sums[k]! *= kept;
    for (const [i, name] of this.#names.entries()) {
      const weight = this.#means[i]!;
      if (weight === 0) continue;
      const y = (counts.get(name) ?? 0) / weight;
      const x = this.#features.subarray(i * n, (i + 1) * n);
      for (let k = 0; k < n; k++) {
        const part = weight * x[k]!;
        this.#target[k]! += part * y;
        for (let l = 0; l < n; l++) this.#gram[k * n + l]! += part * x[l]!;
      }
    }
  }

  /** A new adapter is followed when there is room, or one that is asked for less than it will count for. */
  #admit(name: string, count: number): void {
    if (this.#index.has(name)) return;
    let i = this.#names.length;
    if (i === nodesMax) {
      i = 0;
      for (let j = 1; j < nodesMax; j++) if (this.#means[j]! < this.#means[i]!) i = j;
      if (this.#means[i]! >= count * meanGain) return;
      this.#index.delete(this.#names[i]!);
    }
    this.#index.set(name, i);
    this.#names[i] = name;
    this.#ages[i] = 0;
    this.#means[i] = 0;
    for (let j = 0; j < nodesMax; j++) {
      this.#products[i * nodesMax + j] = 0;
      this.#products[j * nodesMax + i] = 0;
    }
    this.#edges = this.#edges.map((edge, j) => (j === i ? [i] : edge.filter((one) => one !== i)));
    this.#edges[i] = [i];
  }

  /** While a node is young its averages are plain means. */
  #average(i: number, count: number): void {
    const first = 1 / (this.#ages[i]! + 1);
    this.#ages[i]! += 1;
    this.#means[i]! += Math.max(meanGain, first) * (count - this.#means[i]!);
    for (const [s, gain] of gains.entries()) {
      const at = i * scales + s;
      if (first === 1) this.#averages[at] = count;
      else this.#averages[at]! += Math.max(gain, first) * (count - this.#averages[at]!);
    }
  }

  #correlate(): void {
    const count = this.#names.length;
    const deviation = (i: number): number => this.#averages[i * scales + 1]! - this.#means[i]!;
    for (let i = 0; i < count; i++) {
      const a = deviation(i);
      for (let j = 0; j < count; j++) {
        const gain = Math.max(correlationGain, 1 / Math.min(this.#ages[i]!, this.#ages[j]!));
        const at = i * nodesMax + j;
        this.#products[at]! += gain * (a * deviation(j) - this.#products[at]!);
      }
    }
  }

  #regroup(): void {
    const product = (i: number, j: number): number => this.#products[i * nodesMax + j]!;
    const correlation = (i: number, j: number): number =>
      product(i, j) / Math.sqrt(Math.max(Number.MIN_VALUE, product(i, i) * product(j, j)));
    this.#edges = this.#names.map((_, i) => {
      const others = this.#names
        .map((_, j) => ({ j, value: j === i ? 0 : correlation(i, j) }))
        .filter(({ value }) => value > correlationMin)
        .sort((a, b) => b.value - a.value || a.j - b.j);
      return [i, ...others.slice(0, neighboursMax).map(({ j }) => j)];
    });
  }

  /** Nodes → hyperedges → nodes: an edge is its members' requests over their means, a node the mean of its edges. */
  #describe(): void {
    const all = this.#names.map((_, i) => i);
    const global = this.#pool(all);
    const sums = all.map(() => new Float64Array(scales));
    const counts = all.map(() => 0);
    for (const edge of this.#edges) {
      const pooled = this.#pool(edge);
      for (const i of edge) {
        counts[i]! += 1;
        for (let s = 0; s < scales; s++) sums[i]![s]! += pooled[s]!;
      }
    }
    for (const i of all) {
      const own = this.#pool([i]);
      const x = this.#features.subarray(i * n, (i + 1) * n);
      x[0] = 1;
      x.set(own, 1);
      x.set(
        sums[i]!.map((sum) => sum / counts[i]!),
        1 + scales,
      );
      x.set(global, 1 + 2 * scales);
    }
  }

  /** [scales]; 1 where nothing was ever asked. */
  #pool(members: readonly number[]): Float64Array {
    const mean = members.reduce((sum, i) => sum + this.#means[i]!, 0);
    return Float64Array.from({ length: scales }, (_, s) =>
      mean === 0 ? 1 : members.reduce((sum, i) => sum + this.#averages[i * scales + s]!, 0) / mean,
    );
  }
}

/** The weights w of least Σ(y − w·x)² + pull·|w − prior|², by Cholesky's factors of the normal equations. */
function solve(gram: Float64Array, target: Float64Array): Float64Array {
  const l = new Float64Array(n * n); // lower triangle
  const w = new Float64Array(n);
  for (let i = 0; i < n; i++) {
    for (let j = 0; j <= i; j++) {
      let sum = gram[i * n + j]! + (i === j ? pull : 0);
      for (let k = 0; k < j; k++) sum -= l[i * n + k]! * l[j * n + k]!;
      l[i * n + j] = i === j ? Math.sqrt(sum) : sum / l[j * n + j]!;
    }
    let sum = target[i]! + pull * prior[i]!;
    for (let k = 0; k < i; k++) sum -= l[i * n + k]! * w[k]!;
    w[i] = sum / l[i * n + i]!;
  }
  for (let i = n - 1; i >= 0; i--) {
    let sum = w[i]!;
    for (let k = i + 1; k < n; k++) sum -= l[k * n + i]! * w[k]!;
    w[i] = sum / l[i * n + i]!;
  }
  return w;
}

function dot(a: Float64Array, b: Float64Array): number {
  let sum = 0;
  for (let i = 0; i < n; i++) sum += a[i]! * b[i]!;
  return sum;
}
