// What turns gradients into steps: the contract, and every optimiser by its name. State is f32, arithmetic f64; the same
// gradients give the same bytes, and a restored optimiser goes on as the saved one would have.

import { type AdabeliefOptions, createAdabelief } from './adabelief.ts';
import { type AdamwOptions, createAdamw } from './adam.ts';
import { createDctAdamw, type DctAdamwOptions } from './dct-adamw.ts';
import { createFrugal, type FrugalOptions } from './frugal.ts';
import {
  createLoraPro,
  createLoraProSgd,
  type LoraProOptions,
  type LoraProSgdOptions,
} from './lora-pro.ts';
import { createSgd, type SgdOptions } from './sgd.ts';

export interface ParameterShape {
  readonly name: string;
  readonly rows: number;
  readonly columns: number;
}

export interface Parameter extends ParameterShape {
  readonly values: Float32Array; // [rows, columns]
  readonly gradient: Float32Array; // [rows, columns]
}

export interface Optimizer {
  readonly name: string;
  /** Changes the values, and no gradient. */
  step(parameters: readonly Parameter[], learningRate: number): void;
  readonly stateBytes: number;
  save(): Uint8Array;
  /** Of one made with the same options and parameters; throws SHAPE_MISMATCH, with nothing changed, for another's. */
  restore(bytes: Uint8Array): void;
}

export type OptimizerOptions =
  | AdamwOptions
  | SgdOptions
  | AdabeliefOptions
  | FrugalOptions
  | DctAdamwOptions
  | LoraProOptions
  | LoraProSgdOptions;

/** `step` wants exactly these parameters, each time. Options are the recipe's, within its limits. */
export function createOptimizer(
  options: OptimizerOptions,
  parameters: readonly ParameterShape[],
): Optimizer {
  switch (options.name) {
    case 'adamw':
      return createAdamw(options, parameters);
    case 'sgd':
      return createSgd(options, parameters);
    case 'adabelief':
      return createAdabelief(options, parameters);
    case 'frugal':
      return createFrugal(options, parameters);
    case 'dct-adamw':
      return createDctAdamw(options, parameters);
    case 'lora-pro':
      return createLoraPro(options, parameters);
    case 'lora-pro-sgd':
      return createLoraProSgd(options, parameters);
  }
}
