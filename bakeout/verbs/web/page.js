// The page: a prompt, and the answers of the clamped model and, where it was asked for, its base.

import { ClampedModel } from "/clamped_model.js";
import * as ort from "/modules/onnxruntime-web.mjs";
import { Tokenizer } from "/modules/tokenizers.mjs";

const element = (id) => document.getElementById(id);
const json = async (url) => (await fetch(url)).json();

ort.env.wasm.wasmPaths = "/modules/";
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;

const facts = await json("/facts.json");
const tokenizer = new Tokenizer(await json("/folder/tokenizer.json"), facts.tokenizer_config);
const ends = new Set(facts.ends);
document.title = facts.name;
element("name").textContent = facts.name;
element("what").textContent = facts.what;

const models = {};
for (const { name, graph } of facts.models) {
  say(`loading ${name}…`);
  models[name] = await ClampedModel.open(ort, graph, facts.data);
  const column = element("column").content.cloneNode(true).firstElementChild;
  column.dataset.model = name;
  column.querySelector("h2").textContent = name;
  element("answers").append(column);
}
say("");
element("send").disabled = false;

function say(text) {
  element("status").textContent = text;
}

/** A prompt in the folder's chat template, as token ids. */
function promptIds(prompt) {
  const text = `${facts.before}${prompt.trim()}${facts.after}`;
  const { ids } = tokenizer.encode(text, { add_special_tokens: false });
  return facts.bos === null || ids[0] === facts.bos ? ids : [facts.bos, ...ids];
}

/** Tokens as spans, those on which the clamp fired marked. */
function show(place, ids, fired) {
  place.replaceChildren(
    ...ids.map((id, at) => {
      const span = document.createElement(fired[at] ? "mark" : "span");
      span.textContent = tokenizer.decode([id], { skip_special_tokens: false });
      return span;
    }),
  );
}

/**
 * The answer of one model.
 *
 * @param {string} name of the model.
 * @param {string} prompt
 * @param {number} most tokens at most.
 * @param {Set<number>} stops tokens that end it.
 * @returns {Promise<{ids: number[], tokens: number[], fired: boolean[]}>} the prompt, what was
 *   said, and of each token of both whether the clamp fired on it.
 */
async function answer(name, prompt, most, stops = ends) {
  const column = element("answers").querySelector(`[data-model="${name}"]`);
  const ids = promptIds(prompt);
  const room = Math.max(0, Math.min(most, facts.context - ids.length));
  const tokens = [];
  const fired = [];
  const begin = performance.now();
  for await (const step of models[name].tokens(ids, room, stops)) {
    if (tokens.length === 0) column.dataset.first = Math.round(performance.now() - begin);
    tokens.push(step.token);
    fired.push(...(step.fired ?? []));
    const said = tokens.filter((token) => !ends.has(token));
    column.querySelector(".said").textContent = tokenizer.decode(said, {
      skip_special_tokens: true,
    });
    show(column.querySelector(".tokens"), [...ids, ...tokens], fired);
    await new Promise(requestAnimationFrame);
  }
  const n = fired.filter(Boolean).length;
  column.querySelector(".count").textContent = models[name].tellsFired
    ? `the clamp fired on ${n} of ${fired.length} tokens`
    : "";
  return { ids, tokens, fired };
}

element("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  element("send").disabled = true;
  try {
    for (const name of Object.keys(models)) {
      say(`${name} answers…`);
      await answer(name, element("prompt").value, Number(element("most").value));
    }
    say("");
  } catch (error) {
    say(String(error));
  }
  element("send").disabled = false;
});

// For programs that drive the page.
globalThis.bakeout = { answer, promptIds, models: Object.keys(models) };
document.body.dataset.ready = "true";
