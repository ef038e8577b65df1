// What the scripts share: the request, a prompt's inputs, and where the logits go.

import { readFileSync, writeFileSync } from "node:fs";

export const request = JSON.parse(readFileSync(process.argv[2], "utf8"));

/** Inputs of one prompt with an empty cache; `ort` is any ONNX Runtime for JavaScript. */
export function feed(ort, session, ids) {
  const row = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, ids.length]);
  const given = {
    input_ids: row(ids),
    attention_mask: row(ids.map(() => 1)),
    position_ids: row(ids.map((_, place) => place)),
  };
  for (const input of session.inputMetadata) {
    if (!input.name.startsWith("past_key_values")) continue;
    const empty = input.type === "float16" ? new Uint16Array(0) : new Float32Array(0);
    given[input.name] = new ort.Tensor(input.type, empty, [1, input.shape[1], 0, input.shape[3]]);
  }
  return given;
}

export async function answer(ort, session) {
  const parts = [];
  for (const ids of request.prompts) {
    const { logits } = await session.run(feed(ort, session, ids));
    parts.push(Buffer.from(Float32Array.from(logits.data).buffer));
  }
  writeFileSync(request.out, Buffer.concat(parts));
}
