import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { sparkline } from '../../src/terminal.ts';
import { createFollower, timeText } from '../../src/train-commands.ts';
import { type Ran, runAsScript } from '../support/run-command.ts';

interface Seen {
  readonly call: string;
  readonly body: string;
}

let server: Server;
let seen: Seen[];
/** Answers of a call, one after another; the last one again and again. */
let replies: Record<string, object[]>;
let environment: NodeJS.ProcessEnv;
let dir: string;
let file: string;

const jobView = (status: string, step: number, more: object = {}) => ({
  id: 'ftjob-1',
  status,
  fine_tuned_model: status === 'succeeded' ? 'ft.tiny.x' : null,
  error: null,
  rankgate: {
    adapter: 'ft.tiny.x',
    progress: { step, steps: 100, loss: 1.25 },
    losses: status === 'succeeded' ? [{ rank: 1, loss: 2.5 }] : null,
    base_loss: status === 'succeeded' ? 3 : null,
    aurac: status === 'succeeded' ? 0.75 : null,
  },
  ...more,
});

beforeEach(async () => {
  seen = [];
  dir = mkdtempSync(join(tmpdir(), 'train-'));
  file = join(dir, 'talk.jsonl');
  writeFileSync(file, '{"prompt":"a","completion":"b"}\n');
  replies = {
    'POST /v1/files': [{ id: 'file-1' }, { id: 'file-2' }],
    'GET /v1/models': [
      {
        data: [
          { id: 'x', parent: 'tiny' },
          { id: 'tiny', parent: null },
        ],
      },
    ],
    'POST /v1/fine_tuning/jobs': [jobView('queued', 0)],
    'GET /v1/fine_tuning/jobs/ftjob-1': [jobView('succeeded', 100)],
    'GET /v1/fine_tuning/jobs/ftjob-1/events?limit=100': [{ data: [] }],
  };
  server = createServer((request, response) => {
    const chunks: Buffer[] = [];
    request.on('data', (chunk: Buffer) => chunks.push(chunk));
    request.on('end', () => {
      const call = `${request.method} ${request.url}`;
      seen.push({ call, body: Buffer.concat(chunks).toString() });
      const known = replies[call];
      const reply = known !== undefined && known.length > 1 ? known.shift() : known?.[0];
      response.writeHead(reply === undefined ? 404 : 200);
      response.end(JSON.stringify(reply ?? { error: { code: 'not_found', message: call } }));
    });
  });
  await new Promise<void>((done) => server.listen(0, '127.0.0.1', done));
  environment = { RANKGATE_URL: `http://127.0.0.1:${(server.address() as AddressInfo).port}` };
});
afterEach(() => {
  server.closeAllConnections();
  server.close();
  rmSync(dir, { recursive: true });
});

const run = (...args: string[]): Promise<Ran> => runAsScript(args, environment);

const bodyOf = (call: string): string => seen.find((one) => one.call === call)!.body;

describe('rankgate train', () => {
  it('sends the files, makes a job of them and follows it to its model', async () => {
    const recipe = join(dir, 'recipe.json');
    writeFileSync(recipe, '{"clipNorm": 2, "rank": 4}');
    const flags = ['--validation', file, '--suffix', 'talk', '--rank', '8', '--epochs', '2'];
    const { exitCode, out, err } = await run('train', file, ...flags, '--recipe', recipe);
    expect({ exitCode, out }).toEqual({
      exitCode: 0,
      out: 'held-out loss, base 3.0000\n  rank 1: 2.5000\nAURAC 0.7500\nft.tiny.x\n',
    });
    expect(err).toContain('ftjob-1 will make ft.tiny.x');
    expect(err).toMatch(/talk\.jsonl .* 100 %/);
    expect(JSON.parse(bodyOf('POST /v1/fine_tuning/jobs'))).toEqual({
      model: 'tiny', // the base among the models
      training_file: 'file-1',
      validation_file: 'file-2',
      suffix: 'talk',
      hyperparameters: { n_epochs: 2 },
      rankgate: { clipNorm: 2, rank: 8 }, // the flag wins
    });
    const upload = bodyOf('POST /v1/files');
    expect(upload.indexOf('name="purpose"')).toBeLessThan(upload.indexOf('filename="talk.jsonl"'));
    expect(upload).toContain('{"prompt":"a","completion":"b"}');
  });

  it('prints one JSON value with --json, and nothing else', async () => {
    const { exitCode, out, err } = await run('train', file, '--model', 'tiny', '--json');
    expect({ exitCode, err }).toEqual({ exitCode: 0, err: '' });
    expect(JSON.parse(out)).toEqual(jobView('succeeded', 100));
    expect(seen.some(({ call }) => call === 'GET /v1/models')).toBe(false);
  });

  it('exits with 1 and the job’s reason when it fails or is cancelled', async () => {
    const error = { code: 'invalid_request', message: 'training diverged' };
    const path = 'GET /v1/fine_tuning/jobs/ftjob-1';
    replies[path] = [jobView('failed', 3, { error })];
    expect(await run('train', file)).toMatchObject({
      exitCode: 1,
      err: expect.stringContaining('training diverged\n'),
    });
    replies[path] = [jobView('cancelled', 3)];
    const { err } = await run('train', file, '--json');
    expect(JSON.parse(err)).toEqual({
      error: { code: 'CANCELLED', message: 'the job was cancelled' },
    });
  });

  it('leaves the job running at ^C, and says how to find it', async () => {
    replies['GET /v1/fine_tuning/jobs/ftjob-1'] = [jobView('running', 3)];
    const listeners = process.listenerCount('SIGINT');
    const running = run('train', file);
    await expect.poll(() => seen.some(({ call }) => call.includes('/events'))).toBe(true);
    // What the terminal would cause, without ending the test's own process.
    process.emit('SIGINT');
    const { exitCode, err } = await running;
    expect(exitCode).toBe(0);
    expect(err).toContain('ftjob-1 goes on. rankgate jobs show|cancel ftjob-1');
    expect(seen.some(({ call }) => call.includes('cancel'))).toBe(false);
    expect(process.listenerCount('SIGINT')).toBe(listeners);
  });

  it.each([
    [['train']],
    [['train', 'a', 'b']],
    [['train', 'FILE', '--rank', 'many']],
    [['jobs']],
    [['jobs', 'show']],
  ])('%j is wrong usage', async (args) => {
    expect((await run(...args.map((arg) => (arg === 'FILE' ? file : arg)))).exitCode).toBe(2);
    expect(seen).toEqual([]);
  });

  it('sends nothing of a file that is not there or a recipe that is none', async () => {
    expect(await run('train', join(dir, 'none.jsonl'))).toMatchObject({ exitCode: 1 });
    expect(await run('train', file, '--recipe', file)).toMatchObject({ exitCode: 0 });
    writeFileSync(file, '[]');
    expect(await run('train', file, '--recipe', file)).toMatchObject({ exitCode: 2 });
  });
});

describe('rankgate jobs', () => {
  it('lists, shows and cancels', async () => {
    replies['GET /v1/fine_tuning/jobs?after=ftjob-9'] = [{ data: [jobView('running', 7)] }];
    replies['POST /v1/fine_tuning/jobs/ftjob-1/cancel'] = [jobView('cancelled', 7)];
    expect((await run('jobs', 'list', '--after', 'ftjob-9')).out).toBe(
      'ftjob-1  running  step 7 of 100  ft.tiny.x\n',
    );
    expect((await run('jobs', 'show', 'ftjob-1')).out).toContain('succeeded');
    expect((await run('jobs', 'cancel', 'ftjob-1')).out).toContain('cancelled');
    expect(JSON.parse((await run('jobs', 'show', 'ftjob-1', '--json')).out).id).toBe('ftjob-1');
    expect(await run('jobs', 'show', '../x')).toMatchObject({ exitCode: 1 });
    expect(seen.at(-1)!.call).toBe('GET /v1/fine_tuning/jobs/..%2Fx');
  });
});

describe('what a follower sees', () => {
  const event = (number: number, message: string, loss: number | null) => ({
    id: `ftevent-${number}`,
    type: loss === null ? 'message' : 'metrics',
    level: 'info',
    message,
    data: loss === null ? null : { train_loss: loss },
  });

  it('is each message once, and step, loss, its curve and the time that is left', () => {
    let text = '';
    let nowMs = 0;
    const err = (more: string): void => {
      text += more;
    };
    const terminal = { out: () => {}, err, environment: {}, isTerminal: false };
    const show = createFollower(terminal, () => nowMs);
    show(jobView('running', 0), [event(1, 'training has begun', null)]);
    nowMs = 10_000;
    const events = [event(3, 's', 1), event(2, 's', 3), event(1, 'training has begun', null)];
    show(jobView('running', 20), events);
    show(jobView('running', 20), events);
    expect(text.split('\n')).toEqual([
      'training has begun',
      `[${'-'.repeat(30)}]   0 % step 0 of 100  loss 1.2500 `,
      `[######${'-'.repeat(24)}]  20 % step 20 of 100  loss 1.2500 █▁  40 s left`,
      '',
    ]);
  });

  it('is one redrawn line on a terminal', () => {
    const lines: string[] = [];
    const terminal = {
      out: () => {},
      err: (more: string) => void lines.push(more),
      environment: {},
    };
    const show = createFollower({ ...terminal, isTerminal: true }, () => 0);
    for (const step of [1, 2, 3]) show(jobView('running', step), []);
    expect(lines).toHaveLength(3);
    expect(lines.every((line) => line.startsWith('\r\u001b[K[') && !line.includes('\n'))).toBe(
      true,
    );
  });

  it('is a curve from the lowest to the highest loss, however many there are', () => {
    expect(sparkline([])).toBe('');
    expect(sparkline([2, 2])).toBe('▁▁');
    expect(sparkline([8, 7, 6, 5, 4, 3, 2, 1])).toBe('█▇▆▅▄▃▂▁');
    expect(sparkline([Number.NaN, 1])).toBe('▁');
    const long = sparkline(Array.from({ length: 1000 }, (_, i) => -i));
    expect([[...long].length, long[0], long.at(-1)]).toEqual([24, '█', '▁']);
  });

  it('is a time in the units that people use', () => {
    expect([400, 59_400, 90_000, 3_700_000].map(timeText)).toEqual([
      '0 s',
      '59 s',
      '1 min 30 s',
      '1 h 1 min',
    ]);
  });
});
