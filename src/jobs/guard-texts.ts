// Plain English of many kinds, which no adapter is about: what an adapter's refresh must not forget.

import type { ExampleShape } from './example-lines.ts';

const texts = [
  'Water boils at one hundred degrees Celsius at sea level and freezes at zero.',
  'The bus leaves the station every fifteen minutes on weekdays and every half hour on Sundays.',
  'Preheat the oven, butter the tin, and bake the cake until a knife comes out clean.',
  'A prime number has exactly two divisors: one and itself. Two is the only even prime.',
  'She closed the door behind her, took off her wet coat, and put the kettle on the stove.',
  'To reset the device, hold the power button for ten seconds and wait for the light to blink.',
  'The committee met on Tuesday to discuss the budget and postponed its decision until May.',
  'Bees carry pollen from flower to flower, and without them most fruit trees would bear nothing.',
  'Dear Sir or Madam, I am writing to ask whether the position is still open.',
  'The river rises in the mountains, crosses the plain, and reaches the sea after three hundred miles.',
  'A function that calls itself needs a case in which it returns without calling itself again.',
  'If the weather holds, we will walk along the coast and have lunch at the harbour.',
];

/** Each goes on from its first words. */
export const guardExamples: readonly ExampleShape[] = texts.map((text) => {
  const end = text.indexOf(' ', 24);
  return { kind: 'text', prompt: text.slice(0, end), completion: text.slice(end) };
});
