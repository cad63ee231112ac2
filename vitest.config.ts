import { defineConfig, type ViteUserConfig } from 'vitest/config';

// forks: native code lives per process, so a crash in one file cannot take the others with it (design.md section 4).
// One worker: ggml's barriers spin, and two native suites at once on two cores measure each other (figures.md).
// RANKGATE_TIER=nightly (npm run test:nightly) runs what takes too long for every change, and nothing else.
const isNightly = process.env.RANKGATE_TIER === 'nightly';

const config: ViteUserConfig = defineConfig({
  test: {
    pool: 'forks',
    maxWorkers: 1,
    include: isNightly ? ['test/nightly/**/*.test.ts'] : ['test/**/*.test.ts'],
    exclude: isNightly ? [] : ['test/nightly/**'],
    testTimeout: 60_000,
    hookTimeout: 120_000,
    reporters: ['default', './test/support/count-reporter.ts'],
  },
});

export default config;
