// One cold start, in plain JavaScript so that no compiler's start is measured: opens the model, evaluates the prompt, prints
// the first token and what it cost as one line of JSON, and ends. The parent's clock counts from before this process exists.

const { side, modelPath, threads, prompt, cells, ...ours } = JSON.parse(process.argv[2]);

async function rankgate() {
  const { openDecoder } = await import('../dist/model/open-decoder.js');
  const { scrapCells } = await import('../dist/model/step-inputs.js');
  const { decoder } = await openDecoder({
    ...ours, // mode, cacheDirectory and modelHash
    modelPath,
    threads,
    backend: 'ggml',
    cells: scrapCells + cells,
    pages: 1,
    tokensMax: 256,
    segmentsMax: 8,
  });
  const tokens = Int32Array.from(prompt);
  const segment = { tokens, cellBase: scrapCells, position: 0, adapter: null, wantsLogits: true };
  return decoder.step([segment]).argmax(0);
}

async function nodeLlamaCpp() {
  const name = 'node-llama-cpp';
  const { getLlama } = await import(name);
  const llama = await getLlama({ build: 'never', gpu: false, maxThreads: threads });
  const model = await llama.loadModel({ modelPath });
  const options = { contextSize: cells, sequences: 1, batchSize: cells, threads };
  const context = await model.createContext({ ...options, flashAttention: 'auto' });
  const sequence = context.getSequence();
  const sampling = { temperature: 0, yieldEogToken: true };
  for await (const token of sequence.evaluate(prompt, sampling)) return token;
  throw new Error('no token');
}

const token = await (side === 'rankgate' ? rankgate() : nodeLlamaCpp());
const { user, system } = process.cpuUsage();
// At once: what a side does to close is not part of a start.
process.stdout.write(`${JSON.stringify({ token, cpuMs: (user + system) / 1000 })}\n`, () =>
  process.exit(0),
);
