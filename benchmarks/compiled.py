"""Compiling a 5 GB checkpoint against `cp -r`, and what the compiled layers cost.

Time and peak memory: random bf16 weights at gemma-2-2b's shape and a random 16k SAE, baked once,
then compiled and copied in turn, as whole processes, both brought to disk (about 22 GB of disk).
Cost: weights by their shapes; forward time of a few layers of that width, base and compiled in
pairs, scaled to the whole depth.

    python benchmarks/compiled.py [--rounds 3] [--dir DIR] [--only files|forward]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != HERE]  # has a bake.py
spec = importlib.util.spec_from_file_location("bake_benchmark", HERE / "bake.py")
assert spec is not None and spec.loader is not None
inputs = sys.modules["bake_benchmark"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(inputs)
D_IN, HEADS, KV_HEADS, HEAD_DIM = inputs.D_IN, inputs.HEADS, inputs.KV_HEADS, inputs.HEAD_DIM
LAYERS, MLP = inputs.LAYERS, inputs.MLP
run, write_inputs = inputs.run, inputs.write_inputs

K = 20
"""Features of the recipe."""
DEPTH = 3
"""Layers that are timed."""


def files(rounds: int, where: Path | None) -> None:
    """Time and memory of `bakeout export compiled`."""
    bakeout = [sys.executable, "-m", "bakeout"]
    imports = (
        "import bakeout.cli, bakeout.exporting, torch, transformers, rich.progress; "
        "from transformers import Gemma2ForCausalLM, AutoConfig"
    )
    with tempfile.TemporaryDirectory(dir=where) as name:
        folder = Path(name)
        writer = multiprocessing.get_context("spawn").Process(target=write_inputs, args=(folder,))
        writer.start()
        writer.join()
        config = json.loads((folder / "base" / "config.json").read_text())
        sizes = {
            "vocab_size": 256000,
            "intermediate_size": MLP,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
        }
        (folder / "base" / "config.json").write_text(json.dumps(config | sizes))
        run([*bakeout, "bake", str(folder / "recipe.toml"), "--out", str(folder / "checkpoint")])
        shutil.rmtree(folder / "base")
        size = sum(path.stat().st_size for path in (folder / "checkpoint").iterdir())
        _, bare = run([sys.executable, "-c", imports])
        print(f"checkpoint {size / 1e9:.2f} GB; bare imports {bare:.0f} MB")
        out, copied = folder / "out", folder / "copy"
        export = [*bakeout, "export", "compiled", str(folder / "checkpoint"), "--out", str(out)]
        copy = ["cp", "-r", str(folder / "checkpoint"), str(copied)]
        ratios, peaks = [], []
        for round_number in range(rounds):
            seconds = {}
            for command in [export, copy] if round_number % 2 else [copy, export]:
                shutil.rmtree(out, ignore_errors=True)
                shutil.rmtree(copied, ignore_errors=True)
                seconds[command[0]], peak = run(command)
                if command is export:
                    peaks.append(peak - bare)
                    grown = sum(path.stat().st_size for path in out.iterdir()) / size
            ratios.append(seconds[export[0]] / seconds["cp"])
            print(
                f"round {round_number + 1}: compile {seconds[export[0]]:.1f} s, cp -r "
                f"{seconds['cp']:.1f} s, ratio {ratios[-1]:.2f}, peak over imports "
                f"{peaks[-1]:.0f} MB, size {grown:.3f} x"
            )
        print(
            f"median ratio {statistics.median(ratios):.2f}; peak {max(peaks):.0f} MB over imports"
        )


def stack(width: int) -> Any:
    """A few decoder layers of gemma-2-2b's shape, random, with a small vocabulary."""
    import torch
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=MLP,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        attn_implementation="eager",
    )
    return Gemma2Model(config).eval()


def layer_and_head_bytes(width: int) -> tuple[int, int]:
    """Size of one layer and of the embedding, which is the head too."""
    attention = 2 * (HEADS + KV_HEADS) * HEAD_DIM * width
    return 2 * (attention + 3 * MLP * width), 2 * 256000 * width


def forward(rounds: int) -> None:
    """Forward time, in pairs."""
    import torch

    from export.carriers.compiled.widening import choose_width

    width = choose_width(D_IN, K + 3, 8, HEADS, "bfloat16", None)
    models = {"base": stack(D_IN), "compiled": stack(width)}
    for tokens in (1, 256):
        ids = torch.randint(1, 1000, (1, tokens))
        ratios = []
        with torch.inference_mode():
            for model in models.values():
                model(input_ids=ids)
            for _ in range(max(rounds, 5) * 2):
                seconds = {}
                for name, model in models.items():
                    start = time.perf_counter()
                    model(input_ids=ids)
                    seconds[name] = time.perf_counter() - start
                ratios.append(seconds["compiled"] / seconds["base"])
        layer = statistics.median(ratios)
        layers, head = layer_and_head_bytes(D_IN)
        share = LAYERS * layers / (LAYERS * layers + head)
        total = share * layer * (LAYERS + 2) / LAYERS + (1 - share) * width / D_IN
        print(
            f"{tokens} tokens: a layer of width {width} takes {layer:.3f} x one of {D_IN}; with "
            f"{LAYERS + 2} layers for {LAYERS} and the head by its size, {total:.3f} x in all"
        )
    wide, wide_head = layer_and_head_bytes(width)
    grown = ((LAYERS + 2) * wide + wide_head) / (LAYERS * layers + head)
    print(f"weights: {grown:.3f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=None, help="where the 22 GB go")
    parser.add_argument("--only", choices=["files", "forward"], default=None)
    options = parser.parse_args()
    if options.only != "forward":  # first: a child's peak memory starts from its parent's
        files(options.rounds, options.dir)
    if options.only != "files":
        forward(options.rounds)


if __name__ == "__main__":
    main()
