// A clamped graph in ONNX Runtime for the web: greedy tokens, and where the clamp fired.

const integers = (ort, values, shape) =>
  new ort.Tensor("int64", BigInt64Array.from(values, BigInt), shape);

/** Index of the largest number; the first of several. */
function likeliest(logits) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  return best;
}

export class ClampedModel {
  /**
   * @param {object} ort ONNX Runtime for the web.
   * @param {string} graph URL of the graph.
   * @param {{path: string, url: string}[]} data files that hold its weights.
   */
  static async open(ort, graph, data) {
    const externalData = data.map(({ path, url }) => ({ path, data: url }));
    const session = await ort.InferenceSession.create(graph, {
      executionProviders: ["wasm"],
      externalData,
    });
    return new ClampedModel(ort, session);
  }

  constructor(ort, session) {
    this.ort = ort;
    this.session = session;
    this.past = session.inputMetadata.filter(({ name }) => name.startsWith("past_key_values"));
    this.picksRows = session.inputNames.includes("logit_rows");
    this.tellsFired = session.outputNames.includes("fired");
  }

  /**
   * Goes on with a prompt, the likeliest token each time.
   *
   * @param {number[]} ids the prompt.
   * @param {number} most tokens to make at most.
   * @param {Set<number>} ends tokens that end the answer; they are given too.
   * @returns steps `{token, fired}`: the new token, and of each token that was just read whether
   *   the clamp fired on it (the prompt's first, then each new one's); null where it cannot be told.
   */
  async *tokens(ids, most, ends) {
    const { ort } = this;
    let cache = this.#empty();
    let read = ids;
    let length = 0;
    for (let made = 0; made < most; made++) {
      const begin = length;
      length += read.length;
      const feed = {
        input_ids: integers(ort, read, [1, read.length]),
        attention_mask: integers(ort, Array(length).fill(1), [1, length]),
        position_ids: integers(ort, read.map((_, place) => begin + place), [1, read.length]),
        ...cache,
      };
      if (this.picksRows) feed.logit_rows = integers(ort, [read.length - 1], [1]);
      const output = await this.session.run(feed);
      const vocab = output.logits.dims.at(-1);
      const token = likeliest(output.logits.data.subarray(-vocab));
      const fired = this.tellsFired ? Array.from(output.fired.data, (flag) => flag > 0) : null;
      cache = {};
      for (const { name } of this.past) {
        cache[name] = output[name.replace("past_key_values", "present")];
      }
      yield { token, fired };
      if (ends.has(token)) return;
      read = [token];
    }
  }

  #empty() {
    const cache = {};
    for (const { name, type, shape } of this.past) {
      const nothing = type === "float16" ? new Uint16Array(0) : new Float32Array(0);
      cache[name] = new this.ort.Tensor(type, nothing, [1, shape[1], 0, shape[3]]);
    }
    return cache;
  }
}
