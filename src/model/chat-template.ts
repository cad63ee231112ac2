// Renders a base model's Jinja chat template so that only the template can spell special tokens (faults.md B56): every
// string of the caller goes in with a mark inside each special token that it spells, and the tokeniser drops the marks
// after it has looked for special tokens. Templates come from the base model only, never from a caller (B54).
//
// Not covered: a template that itself cuts or rewrites caller text into a special token, or writes `<|{{ x }}|>`.

import { Environment, Interpreter, parse, tokenize } from '@huggingface/jinja';
import { GatewayError } from '../errors.ts';
import { createGuard, unusedMark } from './caller-text.ts';

export interface ChatTurn {
  /** One of a closed set: it is not marked. */
  readonly role: string;
  readonly content: string;
}

export interface ChatTemplateSource {
  /** tokenizer.chat_template */
  readonly template: string;
  readonly bosText: string;
  readonly eosText: string;
  /** Tokenizer.specials */
  readonly specials: readonly string[];
}

export type TemplateArguments = Readonly<Record<string, string | number | boolean>>;

export interface ChatInput {
  readonly messages: readonly ChatTurn[];
  readonly templateArguments: TemplateArguments;
  /** Whether the template goes on to where an answer begins; it does by default. */
  readonly generationPrompt?: boolean;
  /** Texts besides the messages' that the mark must not be in. */
  readonly markNotIn?: readonly string[];
  /** What strftime_now shows, in UTC. */
  readonly now: Date;
  /** Longest prompt in UTF-16 units. */
  readonly charactersMax: number;
}

export interface RenderedChat {
  /** What the template wrote. */
  readonly prompt: string;
  /** The same with the marks still in it, for Tokenizer.encodePrompt. */
  readonly marked: string;
  readonly mark: string;
}

export interface ChatTemplate {
  render(input: ChatInput): RenderedChat;
}

const templateCharactersMax = 128 * 1024;
const rangeMax = 10_000;

/** Names that the gateway sets: an argument of that name would change what a template means. */
const reservedNames: ReadonlySet<string> = new Set([
  'messages',
  'add_generation_prompt',
  'bos_token',
  'eos_token',
  'raise_exception',
  'range',
  'strftime_now',
  'true',
  'false',
  'none',
  'True',
  'False',
  'None',
]);

export function createChatTemplate(source: ChatTemplateSource): ChatTemplate {
  const program = parseTemplate(source.template);
  const guard = createGuard(source.specials);
  return {
    render(input) {
      const { messages, templateArguments, now, charactersMax } = input;
      const { generationPrompt = true, markNotIn = [] } = input;
      checkNames(templateArguments);
      const contents = messages.map((turn) => turn.content);
      const own = [source.template, JSON.stringify(templateArguments)];
      const mark = unusedMark([...own, ...contents, ...markNotIn]);
      const protect = (text: string): string => guard(text, mark);
      const environment = new Environment();
      setGlobals(environment, now);
      environment.set('bos_token', source.bosText);
      environment.set('eos_token', source.eosText);
      environment.set('add_generation_prompt', generationPrompt);
      environment.set(
        'messages',
        messages.map(({ role, content }) => ({ role, content: protect(content) })),
      );
      for (const [name, value] of Object.entries(templateArguments)) {
        environment.set(name, typeof value === 'string' ? protect(value) : value);
      }
      const marked = run(program, environment);
      if (marked.length > charactersMax) {
        throw new GatewayError(
          'CONTEXT_LENGTH_EXCEEDED',
          `the chat has ${marked.length} characters, the context holds at most ${charactersMax}`,
          { param: 'messages' },
        );
      }
      return { prompt: marked.replaceAll(mark, ''), marked, mark };
    },
  };
}

function checkNames(templateArguments: TemplateArguments): void {
  for (const name of Object.keys(templateArguments)) {
    if (reservedNames.has(name)) {
      throw new GatewayError('INVALID_REQUEST', `'${name}' is set by the gateway`, {
        param: 'chat_template_kwargs',
      });
    }
  }
}

type Program = ReturnType<typeof parse>;

function parseTemplate(template: string): Program {
  if (template.length > templateCharactersMax) {
    throw new GatewayError(
      'INVALID_MODEL_FILE',
      `the chat template has ${template.length} characters, at most ${templateCharactersMax}`,
    );
  }
  let program: Program;
  try {
    program = parse(tokenize(template, { lstrip_blocks: true, trim_blocks: true }));
  } catch (cause) {
    throw new GatewayError('INVALID_MODEL_FILE', 'the chat template does not parse', { cause });
  }
  const name = findForbiddenName(program);
  if (name !== null) {
    throw new GatewayError('INVALID_MODEL_FILE', `the chat template uses the name '${name}'`);
  }
  return program;
}

// The interpreter only reaches its own tables of built-ins, never a JavaScript property, so these names cannot do harm
// (jinja 0.5.11, evaluateMemberExpression); a template that tries them is hostile all the same.
const forbiddenName = /^(?:__\w+__|constructor|prototype)$/;

function findForbiddenName(node: unknown): string | null {
  if (typeof node !== 'object' || node === null) return null;
  const { type, value } = node as { readonly type?: unknown; readonly value?: unknown };
  const isName = type === 'Identifier' || type === 'StringLiteral';
  if (isName && typeof value === 'string' && forbiddenName.test(value)) return value;
  // Some fields are Maps (object literals): their keys and values are nodes too.
  const children = node instanceof Map ? [...node.entries()].flat() : Object.values(node);
  for (const child of children) {
    const name = findForbiddenName(child);
    if (name !== null) return name;
  }
  return null;
}

/** What `raise_exception` throws: the template's own complaint about a chat, meant for whoever sent it. */
class TemplateComplaint extends Error {}

function setGlobals(environment: Environment, now: Date): void {
  const constants = { true: true, false: false, none: null, True: true, False: false, None: null };
  for (const [name, value] of Object.entries(constants)) environment.set(name, value);
  environment.set('raise_exception', (message: unknown) => {
    throw new TemplateComplaint(String(message).slice(0, 500));
  });
  environment.set('strftime_now', (format: unknown) => strftime(now, String(format)));
  environment.set('range', (first: unknown, second?: unknown, third?: unknown) =>
    range(Number(first), second === undefined ? null : Number(second), Number(third ?? 1)),
  );
}

function range(first: number, second: number | null, step: number): number[] {
  const [start, stop] = second === null ? [0, first] : [first, second];
  const count = Math.ceil((stop - start) / step);
  if (!(count <= rangeMax)) throw new Error(`range() of ${count} numbers; at most ${rangeMax}`);
  return Array.from({ length: Math.max(0, count) }, (_, index) => start + index * step);
}

const months =
  'January February March April May June July August September October November December';
const days = 'Sunday Monday Tuesday Wednesday Thursday Friday Saturday';

/** The directives that chat templates use; others stay as they are. English names, UTC. */
function strftime(date: Date, format: string): string {
  const two = (value: number): string => String(value).padStart(2, '0');
  const month = months.split(' ')[date.getUTCMonth()]!;
  const day = days.split(' ')[date.getUTCDay()]!;
  const values: Readonly<Record<string, string>> = {
    '%Y': String(date.getUTCFullYear()),
    '%m': two(date.getUTCMonth() + 1),
    '%d': two(date.getUTCDate()),
    '%H': two(date.getUTCHours()),
    '%M': two(date.getUTCMinutes()),
    '%S': two(date.getUTCSeconds()),
    '%B': month,
    '%b': month.slice(0, 3),
    '%A': day,
    '%a': day.slice(0, 3),
    '%%': '%',
  };
  return format.replace(/%[YmdHMSBbAa%]/g, (directive) => values[directive] ?? directive);
}

function run(program: Program, environment: Environment): string {
  try {
    return String(new Interpreter(environment).run(program).value);
  } catch (cause) {
    if (cause instanceof TemplateComplaint) {
      throw new GatewayError('INVALID_REQUEST', `the chat template says: ${cause.message}`, {
        param: 'messages',
      });
    }
    const reason = cause instanceof Error ? cause.message.slice(0, 200) : 'unknown';
    throw new GatewayError('UNSUPPORTED', `the chat template failed: ${reason}`, { cause });
  }
}
