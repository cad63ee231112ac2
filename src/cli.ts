#!/usr/bin/env node
// The entry of the command line. Sets the exit code and lets Node end by itself: exit() would cut output short.

import { runCommand } from './commands.ts';
import { processEnvironment } from './config.ts';

process.exitCode = await runCommand(process.argv.slice(2), {
  out: (text) => void process.stdout.write(text),
  err: (text) => void process.stderr.write(text),
  isTerminal: process.stderr.isTTY === true,
  environment: processEnvironment,
});
