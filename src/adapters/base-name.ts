// Does the base model that an adapter's config names clearly differ from ours? Names are free text: they decide a refusal
// only when they disagree on the family or the size, and nothing is ever fetched by them (faults.md B32).

import type { GgufMetadata } from '../model/gguf-values.ts';

export type NameVerdict = 'same' | 'unclear' | 'other';

/** `theirs` is base_model_name_or_path; `ours` are the base's names: general.name, general.basename, its file's label. */
export function judgeBaseName(theirs: string, ours: readonly string[]): NameVerdict {
  if (!/^[\w.-]+\/[\w.-]+$/.test(theirs)) return 'unclear'; // A path, or a name nobody published.
  const want = words(theirs);
  const known = ours.map(words).filter((name) => name.length > 0);
  if (known.length === 0 || want.length === 0) return 'unclear';
  if (known.some((name) => name.join(' ') === want.join(' '))) return 'same';
  return known.some((name) => mayBeOne(name, want)) ? 'unclear' : 'other';
}

const noise: ReadonlySet<string> = new Set(['gguf', 'hf', 'f16', 'f32', 'bf16', 'fp16', 'fp32']);
const quantisation = /[-._ ]i?q\d(_(k|s|m|l|xs|xxs|nl|\d))*(?=$|[-._ ])/g; // Q4_1, IQ3_XXS, Q4_K_M
const size = /^\d+(\.\d+)?[bm]$/;

/** `HuggingFaceTB/SmolLM2-135M-Instruct-GGUF`, `SmolLM2-135M-Instruct.Q4_1.gguf` → smollm2 135m instruct. */
function words(name: string): string[] {
  const last = name.split('/').at(-1) ?? '';
  return last
    .toLowerCase()
    .replaceAll(quantisation, ' ')
    .replaceAll(/(?<!\d)\.|\.(?!\d)/g, ' ') // A dot between digits is a version: Llama-3.2.
    .split(/[^a-z0-9.]+/)
    .filter((word) => word !== '' && !noise.has(word));
}

function mayBeOne(ours: readonly string[], theirs: readonly string[]): boolean {
  if (ours[0] !== theirs[0]) return false;
  const ourSize = ours.find((word) => size.test(word));
  const theirSize = theirs.find((word) => size.test(word));
  return ourSize === undefined || theirSize === undefined || ourSize === theirSize;
}

/** Under which a base is known: its label (its file's name, or what it was fetched as), and what its file says. */
export function baseNamesOf(label: string, metadata: GgufMetadata): string[] {
  const named = ['general.name', 'general.basename'].filter((key) => metadata.has(key));
  return [label, ...named.map((key) => metadata.string(key))];
}
