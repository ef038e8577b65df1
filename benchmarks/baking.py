"""Baking a 5 GB checkpoint against `cp -r`: time, and peak memory over the bare imports.

Random bf16 weights at gemma-2-2b's shape in several shards, and a random 16k Gemma Scope SAE, are
written to a temporary folder (about 16 GB of disk). Each round runs both in turn, as whole
processes, and brings what they wrote to disk.

    python benchmarks/baking.py [--rounds 3] [--dir DIR]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

D_IN, D_SAE, VOCAB, LAYERS, MLP = 2304, 16384, 256000, 26, 9216
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 256
RECIPE = """schema = 1
[base]
model = "base"
license = "gemma"
[[clamp]]
sae = { path = "layer_7/width_16k" }
method = "clamp"
features = [11766, 9723, 4788, 1709, 9186, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
value = -300.0
"""


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of gemma-2-2b's tensors."""
    layer = {
        "self_attn.q_proj.weight": (HEADS * HEAD_DIM, D_IN),
        "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, D_IN),
        "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, D_IN),
        "self_attn.o_proj.weight": (D_IN, HEADS * HEAD_DIM),
        "mlp.gate_proj.weight": (MLP, D_IN),
        "mlp.up_proj.weight": (MLP, D_IN),
        "mlp.down_proj.weight": (D_IN, MLP),
        "input_layernorm.weight": (D_IN,),
        "post_attention_layernorm.weight": (D_IN,),
        "pre_feedforward_layernorm.weight": (D_IN,),
        "post_feedforward_layernorm.weight": (D_IN,),
    }
    shapes = {"model.embed_tokens.weight": (VOCAB, D_IN), "model.norm.weight": (D_IN,)}
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], rng: np.random.Generator) -> None:
    """A safetensors file of random bf16 weights, written a block at a time."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, offset, 1 << 26):
            size = min(1 << 26, offset - start) // 2
            normal = rng.standard_normal(size, dtype=np.float32) * np.float32(0.02)
            file.write((normal.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def write_inputs(folder: Path, shards: int = 3) -> None:
    """Base, SAE and recipe."""
    rng = np.random.default_rng(0)
    base = folder / "base"
    base.mkdir()
    shapes = list(tensor_shapes().items())
    weight_map = {}
    per_shard = -(-len(shapes) // shards)
    for i in range(shards):
        part = dict(shapes[i * per_shard : (i + 1) * per_shard])
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        write_shard(base / name, part, rng)
        weight_map |= dict.fromkeys(part, name)
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    )
    config = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "hidden_size": D_IN}
    (base / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    sae = folder / "layer_7" / "width_16k"
    sae.mkdir(parents=True)
    np.savez(
        sae / "params.npz",
        W_enc=rng.standard_normal((D_IN, D_SAE), dtype=np.float32),
        W_dec=rng.standard_normal((D_SAE, D_IN), dtype=np.float32),
        b_enc=np.zeros(D_SAE, np.float32),
        b_dec=np.zeros(D_IN, np.float32),
        threshold=np.ones(D_SAE, np.float32),
    )
    (folder / "recipe.toml").write_text(RECIPE)


def run(command: list[str]) -> tuple[float, float]:
    """(seconds until what it wrote is on disk, peak memory in MB) of a process."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{command[0]} failed")
    os.sync()
    return time.monotonic() - start, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=None, help="where the 16 GB go")
    options = parser.parse_args()
    bakeout = [sys.executable, "-m", "bakeout"]
    imports = "import bakeout.cli, bakeout.baking, rich.progress, numpy, safetensors.numpy"
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        # In a process of its own: a child's peak memory starts from its parent's.
        writer = multiprocessing.get_context("spawn").Process(target=write_inputs, args=(folder,))
        writer.start()
        writer.join()
        size = sum(path.stat().st_size for path in (folder / "base").iterdir())
        bake = [*bakeout, "bake", str(folder / "recipe.toml"), "--out", str(folder / "out")]
        copy = ["cp", "-r", str(folder / "base"), str(folder / "copy")]
        _, bare = run([sys.executable, "-c", imports])
        print(f"base {size / 1e9:.2f} GB; bare imports {bare:.0f} MB")
        ratios, peaks = [], []
        for round_number in range(options.rounds):
            order = [bake, copy] if round_number % 2 else [copy, bake]
            seconds = {}
            for command in order:
                shutil.rmtree(folder / "out", ignore_errors=True)
                shutil.rmtree(folder / "copy", ignore_errors=True)
                os.sync()
                seconds[command[0]], peak = run(command)
                if command is bake:
                    peaks.append(peak - bare)
            ratios.append(seconds[bake[0]] / seconds["cp"])
            print(
                f"round {round_number + 1}: bake {seconds[bake[0]]:.1f} s, "
                f"cp -r {seconds['cp']:.1f} s, ratio {ratios[-1]:.2f}, "
                f"peak over imports {peaks[-1]:.0f} MB"
            )
        median, peak = statistics.median(ratios), max(peaks)
        print(f"median ratio {median:.2f}; peak {peak:.0f} MB over imports")


if __name__ == "__main__":
    main()
