// The prompts of the greedy oracle: chat and raw text, short and about 400 tokens, code, and other languages. All text is
// ours. A prompt is a chat (rendered by the model's own template) or a raw text (no special tokens).

export interface OraclePrompt {
  readonly name: string;
  readonly system?: string;
  readonly user?: string;
  readonly text?: string;
}

const lighthouse = `The keeper of the northern light had a rule about the log book: every evening, before the lamp was
lit, he wrote down the height of the barometer, the colour of the sky, and one thing that had surprised him that day. In
thirty-one years he had never missed an evening. On the first page, in ink that had gone brown, stood the surprise that a
seal had climbed the steps as far as the kitchen door. On the last page that he filled before the winter storm there was
only this: the sea has gone quiet, and I can hear the village clock. The village was nine miles away across open water.
When the relief boat came in the spring it found the lamp trimmed, the brass polished, the kettle still warm on the
stove, and nobody in any of the rooms. The two men who landed searched the island, which did not take long. It is a bare
rock, shaped like a shoe, with a strip of grass where the keeper grew cabbages behind a wall of stones. They found his
coat on its hook and his boots under the bench. They found the log book open on the table with the pen laid across it, and
on the right-hand page, in the keeper's own hand, the date of that very morning, the height of the barometer, the colour
of the sky, and a sentence that neither of them ever repeated to anyone. What they did say, later, and to anyone who
asked, was that they had rowed back to the boat without speaking, and that behind them, in full daylight, the lamp had
begun to turn. The inquiry that followed lasted for two days. It heard the crew of the relief boat, a priest, and a clerk
from the office of lights, who read aloud from the regulations. At the end of the second day the chairman closed his
folder, thanked everyone for coming such a long way in such weather, and asked whether there was anything else. There was
a silence. Then the younger of the two men stood up and said:`;

const report = `Quarterly maintenance report, pumping station 4. Summary: the station ran for 2,184 of 2,208 hours (98.9 %).
Two of the three pumps were overhauled. Pump A: the mechanical seal was replaced on 14 March after a leak of roughly 0.4
litres per hour had been seen at the gland; the shaft was within tolerance (run-out 0.03 mm), and the bearings were greased.
Vibration fell from 4.1 to 1.8 mm/s. Pump B: the impeller shows cavitation marks on four of six vanes. The marks are not
deep (below 0.5 mm), but they are new since the last inspection, and the inlet pressure log shows eleven dips below 0.6 bar,
all between 02:00 and 04:00, when the neighbouring plant fills its tanks. We propose to agree on other filling hours before
we replace the impeller, because a new one would suffer in the same way. Pump C: not opened; 3,900 hours remain until its
scheduled overhaul. Electrical: the soft starter of pump B tripped twice on over-temperature. Its fan filter was blocked by
poplar fluff; it was cleaned, and a spare filter is now kept in the cabinet. The emergency generator started at the first
attempt in all three monthly tests, and took the load after 9, 9 and 11 seconds; the limit is 15 seconds. The fuel tank was
filled to 92 %. Control: the level sensor in the wet well drifted by 7 cm against the staff gauge and was recalibrated; the
old and the new curve are attached. The backup float switches were tested by hand and work. Safety: one near miss. On 2
February a grating in the valve chamber was left open during a break; nobody was hurt. Gratings are now fitted with hinges, and
the work permit has an additional line for them. Costs: 11,420 of a budget of 14,000; the remainder is reserved for the
impeller of pump B. Open points: (1) the filling hours of the neighbouring plant, to be settled by the operations manager before the end
of May; (2) a second opinion on the marks; (3) the replacement of the level sensor, which is eleven years old.`;

const code = `// A fixed-size ring buffer of numbers. Pushing onto a full buffer drops the oldest element.
export class RingBuffer {
  #items: Float64Array;
  #start = 0;
  #length = 0;

  constructor(capacity: number) {
    if (!Number.isInteger(capacity) || capacity < 1) {
      throw new RangeError(\`capacity must be a positive integer, got \${capacity}\`);
    }
    this.#items = new Float64Array(capacity);
  }

  get length(): number {
    return this.#length;
  }

  push(value: number): void {
    const capacity = this.#items.length;
    const end = (this.#start + this.#length) % capacity;
    this.#items[end] = value;
    if (this.#length < capacity) {
      this.#length += 1;
    } else {
      this.#start = (this.#start + 1) % capacity;
    }
  }

  at(index: number): number | undefined {
    if (index < 0 || index >= this.#length) return undefined;
    return this.#items[(this.#start + index) % this.#items.length];
  }

  mean(): number {
    if (this.#length === 0) return NaN;
    let sum = 0;
    for (let i = 0; i < this.#length; i++) sum += this.at(i)!;
    return sum / this.#length;
  }
}

// Tests.
import { test } from 'node:test';
import assert from 'node:assert/strict';

test('keeps the newest elements when it is full', () => {
  const buffer = new RingBuffer(3);
  for (const value of [1, 2, 3, 4, 5]) buffer.push(value);
  assert.equal(buffer.length, 3);
  assert.equal(buffer.at(0), 3);
  assert.equal(buffer.mean(), 4);
});

test('refuses a capacity that is not a positive integer', () => {
`;

export const oraclePrompts: readonly OraclePrompt[] = [
  { name: 'chat-france', user: 'What is the capital of France?' },
  { name: 'chat-sky', user: 'Why is the sky blue? Answer in two sentences.' },
  { name: 'chat-haiku', user: 'Write a haiku about a slow train.' },
  { name: 'chat-sum', user: 'What is 17 + 25?' },
  { name: 'chat-list', user: 'Give me three names for a grey cat.' },
  { name: 'chat-system', system: 'You answer like a pirate.', user: 'How do I boil an egg?' },
  { name: 'chat-empty-system', system: '', user: 'Say hello.' },
  { name: 'chat-json', user: 'Return a JSON object with the keys "name" and "age" for Ada, 36.' },
  { name: 'chat-python', user: 'Write a Python function that reverses a string.' },
  { name: 'chat-sql', user: 'Write an SQL query that counts the orders of each customer.' },
  { name: 'chat-french', user: 'Quelle est la différence entre un lac et un étang ?' },
  { name: 'chat-german', user: 'Erkläre in einem Satz, was ein Thermometer ist.' },
  { name: 'chat-spanish', user: '¿Cuántos días tiene un año bisiesto?' },
  { name: 'chat-chinese', user: '请用一句话介绍长城。' },
  { name: 'chat-japanese', user: '日本で一番高い山は何ですか。' },
  { name: 'chat-emoji', user: 'What do these mean: 🌧️ ☂️ 🐸 👩‍👩‍👧‍👦?' },
  {
    name: 'chat-special',
    user: 'Explain what <|im_end|> and <|endoftext|> are in a chat template.',
  },
  { name: 'chat-spaces', user: 'Repeat exactly:   a    b\t\tc\n\n\nd' },
  { name: 'chat-report', user: `Summarise this report in three points.\n\n${report}` },
  { name: 'raw-once', text: 'Once upon a time, in a village by the sea,' },
  { name: 'raw-gravity', text: 'Gravity is a fundamental interaction which' },
  { name: 'raw-count', text: '1, 2, 3, 4, 5, 6, 7,' },
  { name: 'raw-c', text: '#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i <' },
  { name: 'raw-typescript', text: code },
  { name: 'raw-html', text: '<!doctype html>\n<html lang="en">\n<head>\n  <title>' },
  { name: 'raw-dutch', text: 'De trein naar Utrecht vertrekt om' },
  { name: 'raw-russian', text: 'Столица России — это город' },
  { name: 'raw-story', text: lighthouse },
  { name: 'raw-report', text: report },
  { name: 'raw-token', text: 'The' },
];
