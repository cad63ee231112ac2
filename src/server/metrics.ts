// The numbers behind /metrics. vLLM's names where a scheduler reads them (Gateway API Inference Extension, KEDA), ours for
// the rest. No label holds a prompt or a key, and a name only who may see it. `vllm:lora_requests_info` tells what is
// resident, as the extension's protocol means it (vLLM's own shows what is in flight), and is always stamped with the present time.

import { monitorEventLoopDelay } from 'node:perf_hooks';
import type { Registry } from '../adapters/registry.ts';
import type { ResidentKey } from '../adapters/residency.ts';
import { onEvent, type RequestEnd } from '../channels.ts';
import type { EngineStats } from '../engine/messages.ts';
import { PredictionErrors } from '../router/prediction-errors.ts';
import type { ServerDeps } from './deps.ts';
import { type Labels, Page } from './prometheus.ts';

export type MetricsSource = Pick<
  ServerDeps,
  'engine' | 'registry' | 'inFlight' | 'clock' | 'training'
> & { readonly modelName: string };

export interface Metrics {
  /** With the names of adapters that `sees` allows. */
  render(sees: (name: string) => boolean): string;
  close(): void;
}

// Bounds of the OpenTelemetry GenAI conventions for the same quantities, in seconds.
const ttftBounds = [
  0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10,
];
const perTokenBounds = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5];
const durationBounds = [
  0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
];
const rankBounds = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256];
/** |actual − predicted| / predicted. */
const errorBounds = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5];

/** Listens on the channels until `close`. */
export function createMetrics(source: MetricsSource): Metrics {
  const page = new Page();
  const loopDelay = monitorEventLoopDelay({ resolution: 10 });
  loopDelay.enable();
  let sees = (_name: string): boolean => false;
  addEngineState(page, source, (name) => sees(name));
  addTraining(page, source);
  page.gauge('rankgate_event_loop_delay_seconds', 'Delay of the event loop since the start.', () =>
    [0.5, 0.99, 1].map((quantile) => [
      { quantile: String(quantile) },
      loopDelay.percentile(quantile * 100) / 1e9,
    ]),
  );
  const stops = [
    onEvent('request-end', countRequests(page, { model_name: source.modelName })),
    onEvent('request-end', countDeadlines(page)),
    ...countEvents(page),
    addPredictionErrors(page, (name) => sees(name)),
  ];
  return {
    render(visible) {
      sees = visible;
      return page.render();
    },
    close() {
      for (const stop of stops) stop();
      loopDelay.disable();
    },
  };
}

function addTraining(page: Page, { training }: MetricsSource): void {
  page.gauge('rankgate_jobs', 'Fine-tuning jobs that are remembered, by state.', () =>
    [...(training?.jobs.counts() ?? [])].map(([state, count]) => [{ state }, count]),
  );
  page.gauge(
    'rankgate_capture_dropped_total',
    'Answers that were not captured for want of room.',
    () => (training === null ? [] : [[{}, training.refresher.capture.dropped]]),
    'counter',
  );
}

/** Returns the functions that stop it. */
function countEvents(page: Page): Array<() => void> {
  const restarts = page.counter('rankgate_engine_restarts_total', 'Deaths of the engine process.');
  const ends = page.counter('rankgate_job_ends_total', 'Ends of jobs that were worked on.');
  const refreshes = page.counter('rankgate_refreshes_total', 'Refreshes by what became of them.');
  const offers = page.counter(
    'rankgate_archive_offers_total',
    'Candidates for cells of the archive; `new` and `improved` ones fill a cell.',
  );
  const reads = page.counter(
    'rankgate_archive_reads_total',
    'Requests with a domain: their cell was filled, the nearest was taken, or none was.',
  );
  return [
    onEvent('engine-restart', ({ reason }) => restarts({ reason })),
    onEvent('job-end', ({ state, code }) => ends({ state, code: code ?? '' })),
    onEvent('refresh-end', ({ outcome }) => refreshes({ outcome })),
    onEvent('archive-offer', ({ from, status }) => offers({ from, status })),
    onEvent('archive-read', ({ match }) => reads({ match })),
  ];
}

/** Tiers are configured, so they may be a label. */
function countDeadlines(page: Page): (end: RequestEnd) => void {
  const budgets = page.counter(
    'rankgate_budget_total',
    'Requests that stated times or had them of a tier (empty: of none): met, missed (given up late, too), or refused as too short.',
  );
  return function count({ tier, code, inference }) {
    const met = inference?.budgetMet ?? null;
    const isRefused = code === 'deadline_too_short';
    if (!isRefused && met === null) return;
    const outcome = isRefused ? 'refused' : met === true ? 'met' : 'missed';
    budgets({ tier: tier ?? '', outcome });
  };
}

/** Returns the function that stops it. */
function addPredictionErrors(page: Page, sees: (name: string) => boolean): () => void {
  const errors = new PredictionErrors();
  page.gauge(
    'rankgate_prediction_error',
    '|actual/predicted − 1| of total times: median and p90 of the last 512 answers.',
    () => errors.ofAll().map(({ quantile, error }) => [{ quantile: String(quantile) }, error]),
  );
  page.gauge(
    'rankgate_adapter_prediction_error',
    'The same by adapter, of the last 128 answers of each; of the last 128 adapters.',
    () =>
      errors
        .ofEach()
        .filter(([adapter]) => adapter.split(',').every(sees)) // a blend has several names
        .flatMap(([adapter, quantiles]) =>
          quantiles.map(({ quantile, error }) => [{ adapter, quantile: String(quantile) }, error]),
        ),
  );
  return onEvent('request-end', ({ inference }) => {
    if (inference === null) return;
    const { adapter, predictedMs, plannedToEndMs } = inference;
    if (predictedMs === null || plannedToEndMs === null) return;
    errors.add(adapter, predictedMs, plannedToEndMs);
  });
}

function addEngineState(page: Page, source: MetricsSource, sees: (name: string) => boolean): void {
  const { engine, modelName } = source;
  const labels = { model_name: modelName };
  const read = (
    type: 'gauge' | 'counter',
    name: string,
    help: string,
    figure: (stats: EngineStats) => number,
  ): void => page.gauge(name, help, () => [[labels, figure(engine.stats())]], type);
  read('gauge', 'vllm:num_requests_running', 'Sequences that own cells.', (now) => now.running);
  read('gauge', 'vllm:num_requests_waiting', 'Sequences in the queue.', (now) => now.waiting);
  read('gauge', 'vllm:kv_cache_usage_perc', 'Share of the cells in use, 0 to 1.', (now) =>
    now.kvCellsMax === 0 ? 0 : now.kvCellsUsed / now.kvCellsMax,
  );
  const threads = 'Threads of the kernels, fewer when others want the cores.';
  read('gauge', 'rankgate_threads', threads, (now) => now.threads);
  // Since the engine process began.
  const counted: ReadonlyArray<
    readonly [string, string, Exclude<keyof EngineStats, 'residents' | 'hosted'>]
  > = [
    ['vllm:num_preemptions_total', 'Sequences that gave their cells to others.', 'preemptions'],
    ['vllm:prefix_cache_queries_total', 'Prompt tokens looked up.', 'prefixTokensQueried'],
    ['vllm:prefix_cache_hits_total', 'Prompt tokens found there.', 'prefixTokensHit'],
    ['vllm:spec_decode_num_draft_tokens_total', 'Tokens guessed ahead.', 'draftTokens'],
    [
      'vllm:spec_decode_num_accepted_tokens_total',
      'Guesses that came true.',
      'draftTokensAccepted',
    ],
    ['rankgate_prewarms_total', 'Adapters loaded before anybody asked for them.', 'prewarms'],
    ['rankgate_prewarms_used_total', 'Those that a request then used.', 'prewarmsUsed'],
  ];
  for (const [name, help, key] of counted) read('counter', name, help, (now) => now[key]);
  page.gauge('vllm:lora_requests_info', 'Resident adapters; the value is the time.', () => {
    const { residents, adapterSlotsMax } = engine.stats();
    const resident = new Set(residents.map((one) => one.generation));
    const waiting = [...source.inFlight.waitingGenerations()].filter((one) => !resident.has(one));
    const series: Labels = {
      max_lora: String(adapterSlotsMax),
      running_lora_adapters: namesOf([...resident], source.registry, sees),
      waiting_lora_adapters: namesOf(waiting, source.registry, sees),
    };
    return [[series, source.clock.unixMs() / 1000]];
  });
  page.gauge('rankgate_adapters', 'Adapters by where their weights are.', () => {
    const { residents, hosted = [] } = engine.stats();
    const resident = new Set(residents.map((one) => one.generation));
    const inMemory = new Set(hosted);
    const count = { slot: 0, host: 0, disk: 0 };
    for (const { generation } of source.registry.list()) {
      if (resident.has(generation)) count.slot += 1;
      else count[inMemory.has(generation) ? 'host' : 'disk'] += 1;
    }
    return Object.entries(count).map(([tier, value]) => [{ tier }, value]);
  });
}

/** Names, not generations: what a scheduler matches with the `model` of a request. CSV; names hold no comma. */
function namesOf(
  generations: readonly ResidentKey[],
  registry: Registry,
  sees: (name: string) => boolean,
): string {
  const wanted = new Set<ResidentKey>(generations);
  return registry
    .list()
    .filter((record) => wanted.has(record.generation))
    .flatMap((record) => [record.name, ...record.aliases])
    .filter(sees)
    .sort()
    .join(',');
}

function countRequests(page: Page, labels: Labels): (end: RequestEnd) => void {
  const requests = page.counter('rankgate_requests_total', 'HTTP requests by route and status.');
  const success = page.counter('vllm:request_success_total', 'Finished sequences.');
  const promptTokens = page.counter('vllm:prompt_tokens_total', 'Prompt tokens of answers.');
  const newTokens = page.counter('vllm:generation_tokens_total', 'Tokens generated for answers.');
  const histogram = (name: string, help: string, bounds: readonly number[]) =>
    page.histogram(name, help, bounds, labels);
  const ttft = histogram('vllm:time_to_first_token_seconds', 'From arrival.', ttftBounds);
  const perToken = histogram(
    'vllm:time_per_output_token_seconds',
    'After the first.',
    perTokenBounds,
  );
  const duration = histogram('vllm:e2e_request_latency_seconds', 'From arrival.', durationBounds);
  const queue = histogram('vllm:request_queue_time_seconds', 'Wait for cells.', durationBounds);
  const rank = histogram('rankgate_rank_chosen', 'Active ranks of adapter requests.', rankBounds);
  const reasons = page.counter('rankgate_plans_total', 'Plans by reason.');
  const changes = page.counter(
    'rankgate_rank_changes_total',
    'Ranks changed on the way: late (lowered) or slack (raised).',
  );
  const error = histogram(
    'rankgate_prediction_error_ratio',
    '|actual/predicted − 1|.',
    errorBounds,
  );
  return function count({ route, status, inference }) {
    requests({ route, status: String(status) });
    if (inference === null) return;
    reasons({ reason: inference.reason });
    if (inference.adapter !== null) rank(inference.rank);
    for (const reason of inference.finishReasons) {
      success({ ...labels, finished_reason: reason });
    }
    newTokens(labels, inference.completionTokens);
    if (inference.rankFalls > 0) changes({ reason: 'late' }, inference.rankFalls);
    if (inference.rankRises > 0) changes({ reason: 'slack' }, inference.rankRises);
    if (inference.queueMs !== null) {
      queue(inference.queueMs / 1000);
      promptTokens(labels, inference.promptTokens);
    }
    const { ttftMs, totalMs, plannedToEndMs, predictedMs, completionTokens } = inference;
    if (plannedToEndMs === null || ttftMs === null || totalMs === null) return; // not complete
    ttft(ttftMs / 1000);
    duration(totalMs / 1000);
    const sequences = inference.finishReasons.length;
    const later = completionTokens / sequences - 1; // tokens after the first, per sequence
    if (later > 0) perToken((totalMs - ttftMs) / later / 1000);
    if (predictedMs !== null && predictedMs > 0) error(Math.abs(plannedToEndMs / predictedMs - 1));
  };
}
