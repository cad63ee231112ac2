import type { Reporter, TestModule } from 'vitest/node';

// CI reads one plain line at the end of the run; vitest's own summary is not that line.
export default class CountReporter implements Reporter {
  onTestRunEnd(modules: readonly TestModule[]): void {
    const counts = { passed: 0, failed: 0, skipped: 0 };
    for (const module of modules) {
      let ownFailures = 0;
      for (const test of module.children.allTests()) {
        const state = test.result().state;
        if (state === 'passed') counts.passed++;
        else if (state === 'failed') ownFailures++;
        else counts.skipped++;
      }
      // A file that cannot be loaded, or whose hook fails, has failed although none of its tests has.
      counts.failed += module.state() === 'failed' ? Math.max(1, ownFailures) : ownFailures;
    }
    console.log(`\n${counts.passed} passed, ${counts.failed} failed, ${counts.skipped} skipped`);
  }
}
