"""Feature statistics: speed against a plain loop, and peak memory over a hundredfold corpus.

Speed: a random Gemma 2 of 24 layers, hook at a quarter of the depth. The plain loop is the one that
one writes first: the whole forward, then sae_lens's `encode`, then sums over the code. Both run in
turn on the same windows in the same batches. Memory: whole processes over the miniature.

    python benchmarks/features.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics as numbers
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from transformers import Gemma2Config, Gemma2ForCausalLM

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bake.questions.corpora import Windows
from bake.sae.folding import SAEEncoder
from bake.search.statistics import BATCH_TOKENS, Counter, FeatureSite, count_windows
from bakeout.verbs.demo import MINIATURE

D_IN, D_SAE, LAYERS, HOOK, VOCAB, SEQ, N_SEQS = 512, 8192, 24, 5, 32_000, 256, 24
MEMORY_RUN = """
import sys
from pathlib import Path
from bake.recipe import Recipe
from bake.search.corpus_statistics import measure
found = measure(Recipe.load(sys.argv[1]), cache=Path(sys.argv[2]))
status = Path("/proc/self/status").read_text()
print(found.sites[0].forget.n_tokens, status.split("VmHWM:")[1].split()[0])
"""
"""Prints its own peak: the one that a parent sees in ru_maxrss starts from the parent's."""


def random_model() -> Any:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=D_IN,
        intermediate_size=4 * D_IN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config).eval().requires_grad_(False)


def random_sae() -> Any:
    """About 1 in 100 features fires on a token, as in a trained SAE."""
    torch.manual_seed(1)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=False))
    sae.W_enc.data.normal_(std=D_IN**-0.5)
    sae.W_dec.data.normal_(std=D_IN**-0.5)
    return sae.requires_grad_(False)


@torch.no_grad()
def plain_loop(model: Any, sae: Any, windows: Windows) -> np.ndarray:
    """Firing counts; the sums beside them cost what they cost."""
    seen: list[torch.Tensor] = []
    handle = model.model.layers[HOOK].register_forward_hook(lambda _, __, h: seen.append(h))
    fired = torch.zeros(D_SAE, dtype=torch.int64)
    total, squares, largest = torch.zeros(3, D_SAE, dtype=torch.float64)
    ids = torch.from_numpy(windows.ids.astype("int64"))
    counted = torch.from_numpy(windows.counts(windows.ids))
    step = BATCH_TOKENS // SEQ
    for start in range(0, len(ids), step):
        model(input_ids=ids[start : start + step], use_cache=False)
        acts = sae.encode(seen.pop()[counted[start : start + step]])
        fired += (acts > 0).sum(0)
        total += acts.sum(0)
        squares += acts.square().sum(0)
        largest = torch.maximum(largest, acts.amax(0).double())
    handle.remove()
    return fired.numpy()


def speed(rounds: int) -> None:
    model, sae = random_model(), random_sae()
    rng = np.random.default_rng(0)
    ids = rng.integers(5, VOCAB, (N_SEQS, SEQ)).astype(np.int32)
    ids[:, 0] = 2
    windows = Windows("random", ids, (0, 1, 2), N_SEQS)
    h_scale = 100  # the residual stream of a random Gemma is large: one fires about that often
    with torch.no_grad():
        sae.threshold.data.fill_(0.0)
        seen: list[torch.Tensor] = []
        handle = model.model.layers[HOOK].register_forward_hook(lambda _, __, h: seen.append(h))
        model(input_ids=torch.from_numpy(ids[:1].astype("int64")))
        handle.remove()
        pre = (seen[0][0, 1:] @ sae.W_enc).flatten()
        sae.threshold.data.fill_(float(pre.kthvalue(len(pre) - len(pre) // h_scale).values))
    site = FeatureSite(
        HOOK,
        SAEEncoder(sae.W_enc.numpy(), sae.b_enc.numpy(), sae.threshold.numpy(), "random"),
    )
    ratios = []
    for round_number in range(rounds + 1):
        seconds = {}
        for name in ("plain", "ours")[:: 1 if round_number % 2 else -1]:
            begun = time.perf_counter()
            if name == "plain":
                expected = plain_loop(model, sae, windows)
            else:
                found = count_windows(model, [Counter(site, model)], windows)["0.fired"].numpy()
            seconds[name] = time.perf_counter() - begun
        differing = int((found != expected).sum())
        if not round_number:
            continue  # warm-up
        ratios.append(seconds["plain"] / seconds["ours"])
        rates = {name: windows.n_tokens / taken for name, taken in seconds.items()}
        print(
            f"round {round_number}: plain {rates['plain']:,.0f} tokens/s, statistics "
            f"{rates['ours']:,.0f} tokens/s, ratio {ratios[-1]:.2f}; counts differ for "
            f"{differing} of {D_SAE} features (float32 against float64 at the threshold)"
        )
    print(f"median ratio {numbers.median(ratios):.2f}")


def memory() -> None:
    text = (MINIATURE / "recipe.toml").read_text(encoding="utf-8")
    lines = (MINIATURE / "forget.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    peaks = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for entry in ("model", "sae", "questions", "text.jsonl"):
            (folder / entry).symlink_to(MINIATURE / entry)
        for n_tokens in (10_000, 1_000_000):
            n_seqs = n_tokens // 127 + 1
            (folder / "forget.jsonl").write_text("".join(lines * (1 + n_tokens // 40_000)))
            (folder / "retain.jsonl").write_text("".join(lines[:60]))
            recipe = folder / "recipe.toml"
            recipe.write_text(text.replace("n_seqs = 256", f"n_seqs = {n_seqs}"))
            command = [sys.executable, "-c", MEMORY_RUN, str(recipe), str(folder / f"{n_tokens}")]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            counted, peak = map(int, done.stdout.split())
            peaks[counted] = peak / 1024
            print(f"{counted:,} tokens: peak memory {peaks[counted]:.0f} MB")
    small, large = peaks.values()
    print(json.dumps({"peak memory, largest over smallest": round(large / small, 3)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="0 leaves out speed")
    options = parser.parse_args()
    if options.rounds:
        speed(options.rounds)
    memory()


if __name__ == "__main__":
    main()
