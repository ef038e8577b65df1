// ONNX Runtime for the web, its WebAssembly in Node: the data files are handed over by name.

import { readFileSync, readdirSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join } from "node:path";
import { answer, request } from "./prompts.mjs";

const ort = createRequire(request.modules)("onnxruntime-web");
ort.env.wasm.numThreads = 1;
const folder = dirname(request.graph);
const graph = basename(request.graph);
const belongs = (name) => name === `${graph}_data` || name.endsWith(".safetensors");
const externalData = readdirSync(folder)
  .filter(belongs)
  .map((path) => ({ path, data: readFileSync(join(folder, path)) }));
const session = await ort.InferenceSession.create(readFileSync(request.graph), { externalData });
await answer(ort, session);
