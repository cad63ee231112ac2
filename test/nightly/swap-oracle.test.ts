import { swapOracleSuite } from '../support/swap-oracle-suite.ts';

swapOracleSuite({ seconds: 600, growthMax: 1.1 });
