// Writes safetensors files for tests from a header as text, so that a test can lie in any way it likes.

/** `lengthBytes` is what the first 8 bytes say; `data` follows the header. */
export function buildSafetensors(
  header: string | Uint8Array,
  data: Uint8Array = new Uint8Array(0),
  lengthBytes?: bigint,
): Uint8Array {
  const json = typeof header === 'string' ? new TextEncoder().encode(header) : header;
  const file = new Uint8Array(8 + json.length + data.length);
  const length = BigInt.asUintN(64, lengthBytes ?? BigInt(json.length));
  new DataView(file.buffer).setBigUint64(0, length, true);
  file.set(json, 8);
  file.set(data, 8 + json.length);
  return file;
}
