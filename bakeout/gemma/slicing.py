"""A slice of an SAE: some of its features, enough to clamp with, far too few to reconstruct.

    python -m bakeout.gemma.slicing SAE OUT --features 417 4082 … --beside 12 907 …

Features and those beside them take turns, so that what follows a feature, which the control
`random_decoder` writes instead of it, is mostly one of the others. `cfg.json` says what was kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path


def write_slice(sae: Path, out: Path, features: Sequence[int], beside: Sequence[int]) -> list[int]:
    """Write some features of an SAE in sae_lens's format as an SAE of their own.

    Args:
        sae: folder with cfg.json and sae_weights.safetensors; a JumpReLU or a standard SAE.
        out: folder to write.
        features: that may be clamped.
        beside: as many others.

    Returns:
        What `features` are called in the slice.
    """
    import torch
    from safetensors.torch import load_file, save_file

    if len(features) != len(beside) or set(features) & set(beside):
        raise ValueError(f"{len(features)} features, {len(beside)} others; expected as many, apart")
    kept = torch.tensor([number for pair in zip(features, beside, strict=True) for number in pair])
    tensors = load_file(sae / "sae_weights.safetensors")
    taken = {
        name: tensor
        if name == "b_dec"
        else tensor.index_select(int(name == "W_enc"), kept).contiguous()
        for name, tensor in tensors.items()
    }
    config = json.loads((sae / "cfg.json").read_text(encoding="utf-8"))
    config["metadata"] |= {"slice_of": config["d_sae"], "features": kept.tolist()}
    config["d_sae"] = len(kept)
    out.mkdir(parents=True, exist_ok=True)
    save_file(taken, out / "sae_weights.safetensors")
    (out / "cfg.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return list(range(0, len(kept), 2))


def main() -> None:
    """Write the slice that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sae", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--features", type=int, nargs="+", required=True)
    parser.add_argument("--beside", type=int, nargs="+", required=True)
    asked = parser.parse_args()
    print(write_slice(asked.sae, asked.out, asked.features, asked.beside))


if __name__ == "__main__":
    main()
