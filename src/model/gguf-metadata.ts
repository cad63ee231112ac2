// Typed access to the metadata of a GGUF file. Each getter throws INVALID_MODEL_FILE naming the key when it is absent or
// of another type: a number is never read out of bytes that were declared to be something else.

import { memorySource } from './byte-source.ts';
import {
  Cursor,
  invalid,
  type LazyArray,
  type MetadataValue,
  type Scalar,
  scalarTypes,
  stringBytesMax,
  typeString,
  viewOf,
} from './gguf-cursor.ts';
import { quoted } from './quoted.ts';

export class GgufMetadata {
  readonly #values: ReadonlyMap<string, MetadataValue>;

  constructor(values: ReadonlyMap<string, MetadataValue>) {
    this.#values = values;
  }

  get keys(): readonly string[] {
    return [...this.#values.keys()];
  }

  has(key: string): boolean {
    return this.#values.has(key);
  }

  #find(key: string, wanted: string): Scalar | LazyArray {
    const found = this.#values.get(key);
    if (found === undefined) throw invalid(`there is no ${key}, ${wanted}`);
    return found.value;
  }

  string(key: string): string {
    const value = this.#find(key, 'a string');
    if (typeof value !== 'string') throw invalid(`${key} is not a string`);
    return value;
  }

  boolean(key: string): boolean {
    const value = this.#find(key, 'a boolean');
    if (typeof value !== 'boolean') throw invalid(`${key} is not a boolean`);
    return value;
  }

  /** Any number, finite. */
  number(key: string): number {
    const value = this.#find(key, 'a number');
    const number = typeof value === 'bigint' ? Number(value) : value;
    if (typeof number !== 'number' || !Number.isFinite(number)) {
      throw invalid(`${key} is not a finite number`);
    }
    return number;
  }

  /** A whole number from 0 to 2^53 - 1, of whatever width the file gave it. */
  integer(key: string): number {
    const number = this.number(key);
    if (!Number.isSafeInteger(number) || number < 0) {
      throw invalid(`${key} is not a whole number ≥ 0`);
    }
    return number;
  }

  #array(key: string): LazyArray {
    const value = this.#find(key, 'an array');
    if (typeof value !== 'object') throw invalid(`${key} is not an array`);
    return value;
  }

  strings(key: string): string[] {
    const { type, count, bytes } = this.#array(key);
    if (type !== typeString) throw invalid(`${key} is not an array of strings`);
    const cursor = new Cursor(memorySource(bytes, 'INVALID_MODEL_FILE'));
    return Array.from({ length: count }, (_, i) =>
      cursor.string(`${quoted(key)}[${i}]`, stringBytesMax),
    );
  }

  /** Integers or floats, by their declared type. 64-bit integers must be safe. */
  numbers(key: string): number[] {
    const { type, count, bytes } = this.#array(key);
    const scalar = scalarTypes.get(type);
    if (scalar === undefined) throw invalid(`${key} is not an array of numbers`);
    const view = viewOf(bytes);
    return Array.from({ length: count }, (_, i) => {
      const value = scalar.read(view, i * scalar.bytes);
      if (typeof value === 'boolean') throw invalid(`${key} is not an array of numbers`);
      const number = Number(value);
      if (typeof value === 'bigint' && !Number.isSafeInteger(number)) {
        throw invalid(`${key}[${i}] is ${value}, which a double cannot hold`);
      }
      return number;
    });
  }

  integers(key: string): number[] {
    const numbers = this.numbers(key);
    const { type } = this.#array(key);
    if (type === 6 || type === 12) throw invalid(`${key} is not an array of integers`);
    return numbers;
  }
}
