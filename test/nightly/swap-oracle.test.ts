import { swapOracleSuite } from '../support/swap-oracle-suite.ts';

swapOracleSuite(600);
