"""ONNX Runtime against torch on the CPU: prefill and decode of a clamped model; the clamp's cost.

A random Gemma 2 of about 400 million parameters (float32) with a clamp of 20 features is baked and
exported. Engines run in turn within each round, so that a ratio compares neighbours in time.

    python benchmarks/runtime.py [--rounds 7] [--prompt 256] [--tokens 16] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tomli_w
import torch
import transformers as tf

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bake.modeling_clamped_gemma import ClampedGemma2ForCausalLM
from bake.recipe import Recipe
from export.carriers.checkpoint import plan_checkpoint, write_checkpoint
from export.carriers.onnx.onnx_folder import export_onnx
from verify.engines.onnx_files import open_graph
from verify.engines.onnx_runner import OnnxRunner

D_IN, D_SAE, LAYER = 1152, 4096, 3
SHAPE = {
    "vocab_size": 65536,
    "hidden_size": D_IN,
    "intermediate_size": 6912,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 256,
}
Steps = Callable[[torch.Tensor, int], Iterator[torch.Tensor]]
"""Given a prompt [1, seq] and how many, the next tokens one by one."""


def write_folder(folder: Path) -> Path:
    """Base, SAE, recipe, and the checkpoint with both graphs."""
    torch.manual_seed(0)
    tf.Gemma2ForCausalLM(tf.Gemma2Config(**SHAPE)).save_pretrained(folder / "base")
    rng = np.random.default_rng(0)
    sae = folder / f"layer_{LAYER}"
    sae.mkdir()
    np.savez(
        sae / "params.npz",
        W_enc=rng.standard_normal((D_IN, D_SAE), dtype=np.float32) * D_IN**-0.5,
        W_dec=rng.standard_normal((D_SAE, D_IN), dtype=np.float32) * D_IN**-0.5,
        b_enc=np.zeros(D_SAE, np.float32),
        b_dec=np.zeros(D_IN, np.float32),
        threshold=np.zeros(D_SAE, np.float32),
    )
    clamp = {
        "sae": {"path": sae.name},
        "method": "clamp",
        "features": list(range(20)),
        "value": -30.0,
    }
    recipe = {"schema": 1, "base": {"model": "base"}, "clamp": [clamp]}
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe))
    plan = plan_checkpoint(Recipe.load(folder / "recipe.toml"))
    out = write_checkpoint(plan, folder / "out", card="", witness_prompts=[])
    for precision in ("shared", "int4"):
        export_onnx(out, precision=precision)
    return out


def torch_steps(model: ClampedGemma2ForCausalLM) -> Steps:
    """Greedy decoding with a KV cache, no logits but the last, nothing around it."""

    def steps(ids: torch.Tensor, n: int) -> Iterator[torch.Tensor]:
        cache = None
        for _ in range(n):
            with torch.inference_mode():
                output = model(
                    input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
            cache = output.past_key_values
            ids = output.logits[:, -1:].argmax(-1)
            yield ids[:, 0]

    return steps


def onnx_steps(runner: OnnxRunner) -> Steps:
    """The same through `generate`."""
    return lambda ids, n: runner.generate(ids, torch.ones_like(ids), max_new_tokens=n)


def seconds(steps: Steps, prompt: torch.Tensor, n: int) -> tuple[float, float]:
    """(prefill, decode of one token)."""
    start = time.perf_counter()
    tokens = steps(prompt, n)
    next(tokens)
    first = time.perf_counter()
    for _ in tokens:
        pass
    return first - start, (time.perf_counter() - first) / (n - 1)


def clamp_cost(clamped: OnnxRunner, bare: OnnxRunner, n_tokens: int, pairs: int) -> list[float]:
    """Time of a forward with the clamp over the time without, one right after the other."""
    ids = torch.randint(3, SHAPE["vocab_size"], (1, n_tokens))
    mask, ratios = torch.ones_like(ids), []
    for pair in range(pairs + 2):
        took = {}
        for runner in (clamped, bare) if pair % 2 else (bare, clamped):
            start = time.perf_counter()
            runner.logits(ids, mask)
            took[runner] = time.perf_counter() - start
        ratios.append(took[clamped] / took[bare])
    return ratios[2:]


def quartiles(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = write_folder(Path(name))
        model = ClampedGemma2ForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        shared = open_graph("onnx", folder / "model.onnx")
        rounded = open_graph("onnx-int4", folder / "onnx" / "model_q4.onnx")
        threads = options.threads
        engines: dict[str, Steps] = {
            "torch": torch_steps(model),
            "onnx float32": onnx_steps(OnnxRunner(shared, threads=threads)),
            "onnx int4": onnx_steps(OnnxRunner(rounded, threads=threads)),
        }
        times: dict[str, list[tuple[float, float]]] = {engine: [] for engine in engines}
        for _ in range(options.rounds + 1):
            prompt = torch.randint(3, SHAPE["vocab_size"], (1, options.prompt))
            for engine, steps in engines.items():
                times[engine].append(seconds(steps, prompt, options.tokens))
        # One thread each: idle threads of a session spin for a while beside the other's.
        pair = [OnnxRunner(shared, threads=1, clamped=clamped) for clamped in (True, False)]
        costs = {n: clamp_cost(pair[0], pair[1], n, 150 if n == 1 else 16) for n in (1, 256)}
    print(f"{millions:.0f} M parameters, {threads} threads, prompt of {options.prompt} tokens")
    for part, what in enumerate(("prefill", "decode")):
        of = {engine: [pair[part] for pair in pairs[1:]] for engine, pairs in times.items()}
        for engine in ("onnx float32", "onnx int4"):
            ratios = [t / o for t, o in zip(of["torch"], of[engine], strict=True)]
            print(f"{what}: {engine} is {quartiles(ratios)} x as fast as torch eager")
    for n_tokens, ratios in costs.items():
        print(f"forward of {n_tokens} tokens: {quartiles(ratios)} x the time without the clamp")


if __name__ == "__main__":
    main()
