// What was learned, back from its text.

import type { z } from 'zod';

/** null: damaged, or of another kind. */
export function parseSaved<T>(text: string, schema: z.ZodType<T>): T | null {
  try {
    return schema.safeParse(JSON.parse(text)).data ?? null;
  } catch {
    return null;
  }
}
