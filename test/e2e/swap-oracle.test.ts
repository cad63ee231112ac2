import { swapOracleSuite } from '../support/swap-oracle-suite.ts';

swapOracleSuite({ seconds: 60, growthMax: 1.25 });
