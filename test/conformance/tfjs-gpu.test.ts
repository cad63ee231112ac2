import { tfjsSuite } from './tfjs.suite.ts';

tfjsSuite('@tensorflow/tfjs-node-gpu');
