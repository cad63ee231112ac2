import { describe, expect, it } from 'vitest';
import { GatewayError } from '../../../../src/errors.ts';
import {
  devicePackages,
  type FoundDevice,
  selectDevice,
} from '../../../../src/kernels/ggml/select-device.ts';

const gigabyte = 1e9;
const cpu: FoundDevice = { name: 'CPU', description: 'EPYC', kind: 'cpu', freeBytes: 64e9 };
const device = (name: string, freeBytes: number, kind: FoundDevice['kind'] = 'gpu') =>
  ({ name, description: `card ${name}`, kind, freeBytes }) as const;
const cuda0 = device('CUDA0', 8e9);
const cuda1 = device('CUDA1', 24e9);
const vulkan0 = device('Vulkan0', 16e9);
const shared = device('Vulkan1', 48e9, 'integrated');
const metal = device('MTL0', 12e9);

describe('selectDevice', () => {
  it('auto takes the discrete GPU with the most free memory', () => {
    const choice = selectDevice([cpu, cuda0, cuda1], 'auto', gigabyte);
    expect(choice.device).toBe(cuda1);
    expect(choice.reason).toBe('CUDA1 (card CUDA1): 1000 MB needed, 24000 MB free');
  });

  it('auto stays on the CPU and says why', () => {
    for (const [devices, reason] of [
      [[cpu], 'the CPU: no CUDA or Vulkan GPU among CPU (EPYC)'],
      [[cuda0, cpu], 'the CPU: 9000 MB needed, CUDA0 (card CUDA0) has 8000 MB free'],
      [[shared, cpu], 'the CPU: no CUDA or Vulkan GPU among Vulkan1 (card Vulkan1), CPU (EPYC)'],
      [[metal, cpu], 'the CPU: no CUDA or Vulkan GPU among MTL0 (card MTL0), CPU (EPYC)'],
    ] as const) {
      expect(selectDevice(devices, 'auto', 9e9)).toEqual({ device: null, reason });
    }
  });

  it('a named wish takes its own kind only, discrete before integrated', () => {
    const all = [cpu, cuda1, shared, vulkan0, metal];
    expect(selectDevice(all, 'vulkan', gigabyte).device).toBe(vulkan0);
    expect(selectDevice([cpu, shared], 'vulkan', gigabyte).device).toBe(shared);
    expect(selectDevice(all, 'cuda', gigabyte).device).toBe(cuda1);
    expect(selectDevice(all, 'metal', gigabyte).device).toBe(metal);
    expect(selectDevice(all, 'cpu', gigabyte).device).toBeNull();
  });

  it('exactly enough memory is enough; unknown memory is not refused', () => {
    expect(selectDevice([cuda0], 'cuda', 8e9).device).toBe(cuda0);
    expect(() => selectDevice([cuda0], 'cuda', 8e9 + 1)).toThrow(GatewayError);
    const silent = device('Vulkan0', 0);
    expect(selectDevice([silent], 'vulkan', 1e15)).toMatchObject({
      device: silent,
      reason: expect.stringContaining('free memory unknown'),
    });
  });

  it('a named wish that cannot be met is refused with what was found', () => {
    expect(() => selectDevice([cpu, vulkan0], 'cuda', 1)).toThrow(
      /--device cuda: no cuda device among CPU \(EPYC\), Vulkan0 .*driver/,
    );
    expect(() => selectDevice([cuda0], 'cuda', 9e9)).toThrow(
      /9000 MB needed, CUDA0 \(card CUDA0\) has 8000 MB free; ask for --device cpu/,
    );
  });

  it('does not depend on the order of the list', () => {
    const devices = [cpu, cuda0, cuda1, vulkan0];
    const choices = [devices, devices.toReversed()].map((list) => selectDevice(list, 'auto', 1));
    expect(choices[0]).toEqual(choices[1]);
  });
});

describe('devicePackages', () => {
  it('auto looks for what brings a GPU first and ends with the CPU', () => {
    expect(devicePackages('linux-x64', 'auto')).toEqual([
      'linux-x64-cuda',
      'linux-x64-vulkan',
      'linux-x64',
    ]);
    expect(devicePackages('darwin-arm64', 'auto')).toEqual(['mac-arm64-metal']);
  });

  it('a named wish is one package', () => {
    expect(devicePackages('win32-x64', 'vulkan')).toEqual(['win-x64-vulkan']);
    expect(devicePackages('linux-x64', 'cpu')).toEqual(['linux-x64']);
    expect(devicePackages('darwin-arm64', 'metal')).toEqual(['mac-arm64-metal']);
  });

  it('refuses what nobody publishes', () => {
    for (const [platform, wish] of [
      ['linux-arm64', 'cuda'],
      ['linux-x64', 'metal'],
      ['darwin-x64', 'metal'],
      ['sunos-x64', 'auto'],
    ] as const) {
      expect(() => devicePackages(platform, wish)).toThrow(GatewayError);
    }
  });
});
