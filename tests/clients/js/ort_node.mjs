// ONNX Runtime's binding for Node: a graph by its path.

import { createRequire } from "node:module";
import { answer, request } from "./prompts.mjs";

const ort = createRequire(request.modules)("onnxruntime-node");
await answer(ort, await ort.InferenceSession.create(request.graph));
