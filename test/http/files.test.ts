import { createHash } from 'node:crypto';
import { readdirSync } from 'node:fs';
import { mkdir, open, rm } from 'node:fs/promises';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { createAddFile } from '../../src/server/files.ts';
import {
  type Answer,
  createHarness,
  type Harness,
  type Json,
  tenantKeys,
} from '../support/http-harness.ts';
import { newJob } from '../support/job-stores.ts';
import { createTestTraining, type TestTraining } from '../support/test-training.ts';

let training: TestTraining;
let harness: Harness;
beforeEach(() => {
  training = createTestTraining();
  harness = createHarness({ uploadRoot: training.uploadRoot, apiKeys: tenantKeys }, training);
});
afterEach(() => {
  expect(readdirSync(training.uploadRoot), 'a folder was left').toEqual([]);
  harness.close();
  training[Symbol.dispose]();
});

const call: Harness['call'] = (...given) => harness.call(...given);

const example = (answer: string): string =>
  JSON.stringify({
    messages: [
      { role: 'user', content: 'Say it.' },
      { role: 'assistant', content: answer },
    ],
  });
const good = `${example('one')}\n\n${example('two')}\n`;

function form(...parts: readonly (readonly [string, string, string?])[]): FormData {
  const data = new FormData();
  for (const [name, value, filename] of parts) {
    if (filename === undefined) data.append(name, value);
    else data.append(name, new Blob([value]), filename);
  }
  return data;
}

const whole = (text: string = good): FormData =>
  form(['file', text, 'talk "a".jsonl'], ['purpose', 'fine-tune']);
const upload = (body: FormData = whole(), who = 'operator'): Promise<Answer> =>
  call(who, 'POST', '/v1/files', { body });

describe('a file of examples', () => {
  it('is kept as it was sent, in whichever order its parts come', async () => {
    for (const body of [whole(), form(['purpose', 'fine-tune'], ['file', good, 'b.jsonl'])]) {
      const { status, body: file } = await upload(body);
      expect(status).toBe(200);
      expect(file).toMatchObject({
        object: 'file',
        purpose: 'fine-tune',
        status: 'processed',
        bytes: good.length,
        rankgate: { examples: 2, sha256: createHash('sha256').update(good).digest('hex') },
      });
      expect(file.id).toMatch(/^file-/);
      expect((await call('operator', 'GET', `/v1/files/${file.id}`)).body).toEqual(file);
      const content = await call('operator', 'GET', `/v1/files/${file.id}/content`);
      expect(content.body).toBe(good);
      expect(content.headers.get('content-length')).toBe(String(good.length));
    }
    const { data } = (await call('operator', 'GET', '/v1/files?order=asc')).body;
    expect(data.map(({ filename }: Json) => filename)).toEqual(['talk %22a%22.jsonl', 'b.jsonl']);
  });

  it('that is none is refused with the numbers of its wrong lines, and not kept', async () => {
    const lines = [
      example('ok'),
      '{',
      '{"messages":[]}',
      '',
      '{"prompt":"a","completion":"b"}',
      '[]',
    ];
    const { status, body } = await upload(whole(lines.join('\n')));
    expect(status).toBe(422);
    expect(body.error).toMatchObject({ code: 'invalid_file', param: 'file' });
    expect(body.error.message).toBe('line 2: not JSON, and 2 more lines');
    expect(body.error.lines.map(({ line }: Json) => line)).toEqual([2, 3, 6]);
    expect(body.error.lines[0].message).toBe('not JSON');
    expect(readdirSync(training.directory)).toEqual([]);
  });

  it('of nonsense gets its first hundred lines reported', async () => {
    const { body } = await upload(whole('nonsense\n'.repeat(250)));
    expect(body.error.lines).toHaveLength(100);
    expect(body.error.lines.at(-1).line).toBe(100);
  });

  it.each([
    ['no examples', '\n\n', 'invalid_file'],
    ['what is no JSON', '\u00ff\u0000', 'invalid_file'],
    ['brackets without end', '['.repeat(60_000), 'invalid_file'],
    ['more bytes than a file may have', `${good}${' '.repeat(64 * 1024)}`, 'payload_too_large'],
  ])('with %s is refused', async (_, text, code) => {
    const { body } = await upload(whole(text));
    expect(body.error.code).toBe(code);
    expect(readdirSync(training.directory)).toEqual([]);
  });

  it.each([
    ['no purpose', form(['file', good, 'a']), 'purpose'],
    ['another purpose', form(['file', good, 'a'], ['purpose', 'assistants']), 'purpose'],
    ['no file', form(['purpose', 'fine-tune']), 'file'],
    ['two files', form(['file', good, 'a'], ['file', good, 'b']), 'file'],
    ['a field that is not known', form(['purpose', 'fine-tune'], ['expires', '1']), 'expires'],
  ])('with %s is refused by name', async (_, body, param) => {
    const answer = await upload(body);
    expect(answer.status).toBe(400);
    expect(answer.body.error.param).toBe(param);
    expect(readdirSync(training.directory)).toEqual([]);
  });

  it('that is sent as something else is refused', async () => {
    const json = { 'content-type': 'application/json' };
    expect(
      (await call('operator', 'POST', '/v1/files', { body: '{}', headers: json })).status,
    ).toBe(415);
    const type = { 'content-type': 'multipart/form-data; boundary=x', 'content-encoding': 'gzip' };
    expect((await call('operator', 'POST', '/v1/files', { body: 'x', headers: type })).status).toBe(
      415,
    );
  });

  it('stays while a job needs it', async () => {
    const { id } = (await upload()).body;
    const job = training.jobs.create('', null, newJob(id));
    const refused = await call('operator', 'DELETE', `/v1/files/${id}`);
    expect([refused.status, refused.body.error.code]).toEqual([409, 'file_in_use']);
    training.jobs.cancel(job);
    const { body } = await call('operator', 'DELETE', `/v1/files/${id}`);
    expect(body).toEqual({ id, object: 'file', deleted: true });
    expect((await call('operator', 'GET', `/v1/files/${id}`)).status).toBe(404);
    expect(readdirSync(training.directory)).toEqual([]);
  });

  it('belongs to its tenant', async () => {
    const { id } = (await upload(whole(), 'acme-admin')).body;
    for (const [method, path] of [
      ['GET', `/v1/files/${id}`],
      ['GET', `/v1/files/${id}/content`],
      ['DELETE', `/v1/files/${id}`],
    ] as const) {
      const { status, body } = await call('rival-admin', method, path);
      expect([status, body.error.code]).toEqual([404, 'file_not_found']);
    }
    expect((await call('rival-admin', 'GET', '/v1/files')).body.data).toEqual([]);
    expect((await call('acme-use', 'GET', '/v1/files')).status).toBe(403);
    expect((await call('operator', 'GET', '/v1/files')).body.data).toHaveLength(1);
    expect((await call('acme-admin', 'GET', `/v1/files/${id}`)).status).toBe(200);
  });

  it('is refused when its owner has enough, whatever others have', async () => {
    for (let i = 0; i < 4; i++) await upload(whole(), 'acme-admin');
    const { status, body, headers } = await upload(whole(), 'acme-admin');
    expect([status, body.error.code]).toEqual([429, 'quota_exceeded']);
    expect(headers.get('x-should-retry')).toBe('false');
    expect((await upload(whole(), 'rival-admin')).status).toBe(200);
  });

  it('comes in pages', async () => {
    for (let i = 0; i < 3; i++) await upload(whole(`${example(`${i}`)}\n`));
    const first = (await call('operator', 'GET', '/v1/files?limit=2')).body;
    expect([first.data.length, first.has_more]).toEqual([2, true]);
    expect([first.first_id, first.last_id]).toEqual([first.data[0].id, first.data[1].id]);
    const rest = (await call('operator', 'GET', `/v1/files?limit=2&after=${first.last_id}`)).body;
    expect([rest.data.length, rest.has_more]).toEqual([1, false]);
    expect((await call('operator', 'GET', '/v1/files?purpose=assistants')).body.data).toEqual([]);
    for (const query of ['limit=0', 'limit=101', 'limit=x', 'order=up', 'after=file-no', 'x=1']) {
      expect((await call('operator', 'GET', `/v1/files?${query}`)).status).toBe(400);
    }
  });

  it('is told that the disk is full', async () => {
    const full: typeof open = async (...args) => {
      const file = await open(...args);
      file.sync = () => Promise.reject(Object.assign(new Error('planted'), { code: 'ENOSPC' }));
      return file;
    };
    const addFile = createAddFile({ mkdir, open: full, rm });
    harness.app.hono.post('/planted', (c) => {
      c.set('caller', { tenant: 'local', namespace: null, isOperator: true });
      c.set('tenant', 'local');
      const { clock, lifecycle } = harness;
      const config = { uploadRoot: training.uploadRoot, uploadsMax: 1, fileBytesMax: 10_000 };
      const deps = { training, clock, lifecycle, config, random: { id: () => 'x' } };
      return addFile(c, deps as never);
    });
    const { status, body } = await call('operator', 'POST', '/planted', { body: whole() });
    expect([status, body.error.code]).toEqual([507, 'disk_full']);
    expect(readdirSync(training.directory)).toEqual([]);
  });

  it('has no place where nothing is trained', async () => {
    const bare = createHarness();
    for (const path of ['/v1/files', '/v1/fine_tuning/jobs']) {
      const { status } = await bare.fetch('GET', path);
      expect(status).toBe(400);
    }
    bare.close();
  });
});
