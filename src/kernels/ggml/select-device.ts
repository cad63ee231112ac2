// Which of ggml's devices holds the model: a pure choice over what the library found, with the reason that doctor prints.
// A named wish is met or refused; `auto` takes a GPU only where the package that brings it was installed for that, and
// falls back to the CPU with a reason.

import { GatewayError } from '../../errors.ts';

export const deviceWishes = ['auto', 'cpu', 'cuda', 'vulkan', 'metal'] as const;
export type DeviceWish = (typeof deviceWishes)[number];

export interface FoundDevice {
  /** ggml's name: CPU, CUDA0, Vulkan1, MTL0. */
  readonly name: string;
  readonly description: string;
  readonly kind: 'cpu' | 'gpu' | 'integrated' | 'other';
  /** 0 where the driver does not say. */
  readonly freeBytes: number;
}

export interface DeviceChoice<Device extends FoundDevice> {
  /** null: the CPU alone. */
  readonly device: Device | null;
  readonly reason: string;
}

const namesOf: Readonly<Record<DeviceWish, RegExp>> = {
  auto: /^(CUDA|Vulkan)\d/, // every macOS package carries Metal: nobody chose it by installing
  cpu: /^CPU/,
  cuda: /^CUDA\d/,
  vulkan: /^Vulkan\d/,
  metal: /^MTL\d/,
};

const label = ({ name, description }: FoundDevice): string => `${name} (${description.trim()})`;
const megabytes = (bytes: number): string => `${Math.ceil(bytes / 1e6)} MB`;
const fits = (device: FoundDevice, bytes: number): boolean =>
  device.freeBytes === 0 || device.freeBytes >= bytes;

/** `bytesNeeded`: weights, cache and adapter pages together. Throws UNSUPPORTED where a named wish cannot be met. */
export function selectDevice<Device extends FoundDevice>(
  devices: readonly Device[],
  wish: DeviceWish,
  bytesNeeded: number,
): DeviceChoice<Device> {
  if (wish === 'cpu') return { device: null, reason: 'the CPU was asked for' };
  const named = devices.filter(({ name }) => namesOf[wish].test(name));
  // An integrated GPU shares the CPU's memory and its bandwidth, which is what decoding waits for: only on request.
  const candidates = named.filter(({ kind }) => kind === 'gpu' || wish !== 'auto');
  const roomy = candidates.filter((device) => fits(device, bytesNeeded));
  const best = roomy.sort(
    (a, b) => rankOf(a) - rankOf(b) || b.freeBytes - a.freeBytes || (a.name < b.name ? -1 : 1),
  )[0];
  if (best !== undefined) {
    const room = best.freeBytes === 0 ? 'free memory unknown' : `${megabytes(best.freeBytes)} free`;
    return {
      device: best,
      reason: `${label(best)}: ${megabytes(bytesNeeded)} needed, ${room}`,
    };
  }
  const small = candidates
    .map((device) => `${label(device)} has ${megabytes(device.freeBytes)} free`)
    .join(', ');
  const reason =
    small === ''
      ? `no ${wish === 'auto' ? 'CUDA or Vulkan GPU' : `${wish} device`} among ${devices.map(label).join(', ')}`
      : `${megabytes(bytesNeeded)} needed, ${small}`;
  if (wish === 'auto') return { device: null, reason: `the CPU: ${reason}` };
  const advice = small === '' ? 'is its driver installed?' : 'ask for --device cpu';
  throw new GatewayError('UNSUPPORTED', `--device ${wish}: ${reason}; ${advice}`);
}

/** A discrete GPU before an integrated one. */
function rankOf({ kind }: FoundDevice): number {
  return kind === 'gpu' ? 0 : 1;
}

/** Packages that bring a device to this platform, in the order that `auto` looks for them; the CPU's comes last. */
export function devicePackages(platform: string, wish: DeviceWish): readonly string[] {
  const cpuPackages: Record<string, string> = {
    'linux-x64': 'linux-x64',
    'linux-arm64': 'linux-arm64',
    'darwin-arm64': 'mac-arm64-metal',
    'darwin-x64': 'mac-x64',
    'win32-x64': 'win-x64',
  };
  const cpu = cpuPackages[platform];
  if (cpu === undefined) {
    throw new GatewayError('UNSUPPORTED', `ggml: no prebuilt library is published for ${platform}`);
  }
  const published = /^(linux|win32)-x64$/.test(platform) ? ['cuda', 'vulkan'] : [];
  if (wish === 'cpu' || (wish === 'metal' && platform === 'darwin-arm64')) return [cpu];
  if (wish === 'auto') return [...published.map((kind) => `${cpu}-${kind}`), cpu];
  if (published.includes(wish)) return [`${cpu}-${wish}`];
  throw new GatewayError(
    'UNSUPPORTED',
    `--device ${wish}: no library is published for ${platform}`,
  );
}
