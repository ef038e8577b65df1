// transformers.js, as docs/onnx.md has it.

import { writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname } from "node:path";
import { pathToFileURL } from "node:url";
import { request } from "./prompts.mjs";

const entry = createRequire(request.modules).resolve("@huggingface/transformers");
const { AutoConfig, AutoModelForCausalLM, Tensor, env } = await import(pathToFileURL(entry));
env.allowRemoteModels = false;
env.localModelPath = `${dirname(request.folder)}/`;
const folder = basename(request.folder);

const config = await AutoConfig.from_pretrained(folder);
config.model_type = config.model_type.replace("clamped_", "");
const dtype = { float32: "fp32", int4: "q4" }[request.dtype] ?? request.dtype;
const model = await AutoModelForCausalLM.from_pretrained(folder, { config, dtype });

const parts = [];
for (const ids of request.prompts) {
  const row = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, ids.length]);
  const inputs = { input_ids: row(ids), attention_mask: row(ids.map(() => 1)) };
  const { logits } = await model(inputs);
  parts.push(Buffer.from(Float32Array.from(logits.data).buffer));
}
writeFileSync(request.out, Buffer.concat(parts));
