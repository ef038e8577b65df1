"""Everything that is to be known of a GPU, in one script of under four minutes: ratios, in pairs.

Gemma 2 layers at gemma-2-2b's width with random weights, in bfloat16: what a clamp, a clamp with a
sequence gate and one of a TopK SAE add to prefill and decode, eager and compiled, and in how many
kernels; statistics of features beside the bare forward up to the hook layer; and parity of the
shipped miniature on the device, by `bakeout verify`.

    python benchmarks/gpu.py [--device cuda] [--layers 26] [--rounds 20]
    python benchmarks/gpu.py --device cpu --layers 2 --rounds 1   # whether it runs
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import StaticCache

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bake.questions.corpora import Windows
from bake.sae.folding import SAEEncoder
from bake.search.statistics import Counter, FeatureSite, count_windows
from bakeout.verbs.demo import MINIATURE
from benchmarks.overhead import D_IN, build

SITES: dict[str, dict[str, Any]] = {
    "clamp": {},
    "sequence gate": {"tau": 0.05},
    "TopK, 65k": {"topk": 64, "d_sae": 65536, "dtype": "bfloat16"},
}


class Machine:
    """A device and its clock."""

    def __init__(self, device: str) -> None:
        self.device, self.cuda = device, device.startswith("cuda")

    def seconds(self, work: Callable[[], Any]) -> float:
        """That some work takes until it is done."""
        self.wait()
        begun = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - begun

    def wait(self) -> None:
        """Until all that was asked of it is done."""
        if self.cuda:
            torch.cuda.synchronize()

    def kernels(self, work: Callable[[], Any]) -> int:
        """How many it launches; on a CPU, how many operations it takes, views among them."""
        work()
        with profile(
            activities=[ProfilerActivity.CUDA if self.cuda else ProfilerActivity.CPU]
        ) as of:
            work()
            self.wait()
        if self.cuda:
            return sum(event.device_type.name == "CUDA" for event in of.events())
        return sum(event.cpu_parent is None for event in of.events())


def pairs(machine: Machine, one: Callable[[], Any], other: Callable[[], Any], rounds: int) -> str:
    """Median and quartiles of one over the other, taken in turn."""
    ratios = []
    for number in range(rounds + 2):
        order = (one, other) if number % 2 else (other, one)
        took = {id(work): machine.seconds(work) for work in order}
        if number >= 2:
            ratios.append(took[id(one)] / took[id(other)])
    if len(ratios) < 2:
        return f"{ratios[0]:.3f} ×"
    low, _, high = statistics.quantiles(ratios)
    return f"{statistics.median(ratios):.3f} × ({low:.3f} to {high:.3f})"


def prefill(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    return lambda: model(input_ids=ids, use_cache=False)


def decode(model: Any, ids: torch.Tensor, steps: int = 256) -> Callable[[], Any]:
    """A token after a prompt, and then the next one, up to so many."""
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + steps)
    model(input_ids=ids, past_key_values=cache)
    return lambda: model(input_ids=ids[:, -1:], past_key_values=cache)


def overhead(machine: Machine, layers: int, rounds: int) -> None:
    for name, site in SITES.items():
        base, clamped = build(layers, torch.bfloat16, machine.device, site)
        if "tau" in site:
            clamped.config.sae_clamp["schema"] = 2
        for what, shape in (
            ("prefill, 4 × 1024", (4, 1024)),
            ("decode, batch 32", (32, 64)),
            ("decode, batch 1", (1, 64)),
        ):
            if not machine.cuda:
                shape = (min(shape[0], 2), min(shape[1], 16))
            ids = torch.randint(3, 1000, shape, device=machine.device)
            made = prefill if what.startswith("prefill") else decode
            ratio = pairs(machine, made(clamped, ids), made(base, ids), rounds)
            more = machine.kernels(made(clamped, ids)) - machine.kernels(made(base, ids))
            print(f"{name:14s} {what:18s} {ratio} of base, {more} kernels more")
        if machine.cuda and "topk" not in site:
            compiled = [torch.compile(of, fullgraph=True) for of in (clamped, base)]
            ids = torch.randint(3, 1000, (1, 64), device=machine.device)
            works = [decode(of, ids) for of in compiled]
            print(f"{name:14s} decode, compiled   {pairs(machine, *works, rounds)} of base")


def features(machine: Machine, layers: int, rounds: int) -> None:
    """Statistics at a quarter of the depth, beside the bare forward that far."""
    base, _ = build(layers, torch.bfloat16, machine.device, {})
    hook, n, seq = layers // 4, 16 if machine.cuda else 2, 256
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 1000, (n, seq)).astype(np.int32)
    windows = Windows("random", ids, (0, 1, 2), n)
    tokens = torch.from_numpy(ids.astype("int64")).to(machine.device)
    model = _Headed(base)

    def bare() -> None:
        h = base.embed_tokens(tokens)
        place = torch.arange(seq, device=machine.device)[None]
        turns = base.rotary_emb(h, place)
        for layer in base.layers[: hook + 1]:
            h = layer(h, position_embeddings=turns, attention_mask=None, position_ids=place)

    for d_sae in (16_384, 65_536):
        W = rng.standard_normal((D_IN, d_sae), dtype=np.float32) * np.float32(D_IN**-0.5)
        theta = np.full(d_sae, 2.5 * float(base.embed_tokens(tokens).float().std()), np.float32)
        site = FeatureSite(hook, SAEEncoder(W, np.zeros(d_sae, np.float32), theta, "random"))
        ours = partial(count_windows, model, [Counter(site, model)], windows)
        ratio = pairs(machine, bare, ours, rounds)
        print(f"statistics, d_sae {d_sae:6,d}: {ratio} of the bare forward's tokens/s")


class _Headed:
    """A backbone where a whole model is expected."""

    def __init__(self, backbone: Any) -> None:
        self.model, self.device, self.config = backbone, backbone.device, backbone.config

    def get_decoder(self) -> Any:
        return self.model

    def __call__(self, **given: Any) -> Any:
        return self.model(**given)


def parity(device: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        bakeout = [sys.executable, "-m", "bakeout.cli"]
        recipe, folder = str(MINIATURE / "recipe.toml"), f"{name}/out"
        subprocess.run([*bakeout, "bake", recipe, "--out", folder], check=True, capture_output=True)
        asked = ["--recipe", recipe, "--only", "parity", "--device", device]
        done = subprocess.run(
            [*bakeout, "verify", folder, *asked], check=False, capture_output=True, text=True
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith(("rounding", "pass"))]
        print(*(lines or [done.stdout + done.stderr]), sep="\n")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("no GPU here; --device cpu says whether the script runs")
        return
    machine = Machine(options.device)
    name = torch.cuda.get_device_name() if machine.cuda else "CPU"
    print(f"{name}, torch {torch.__version__}, {options.layers} layers of d_in {D_IN}, bfloat16")
    torch.manual_seed(0)
    overhead(machine, options.layers, options.rounds)
    features(machine, options.layers, options.rounds)
    parity(options.device)


if __name__ == "__main__":
    main()
