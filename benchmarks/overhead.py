"""What the clamp costs: the layer stack with it, and with a hook around the whole SAE, over base.

Gemma 2 layers at gemma-2-2b's width with random weights, one of them clamped (k = 20). Variants
run in turn within each round, so that a ratio compares neighbours in time.

    python benchmarks/overhead.py [--layers 6] [--rounds 40] [--dtype float32] [--device cpu]
        [--topk 64] [--d-sae 65536] [--stored bfloat16]  # of a TopK SAE, its whole encoder
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Gemma2Config, Gemma2Model

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bake.modeling_clamped_gemma import ClampedGemma2Config, ClampedGemma2Model

D_IN, D_SAE, K = 2304, 16384, 20


def shape(layers: int) -> dict[str, int]:
    """gemma-2-2b's shape, but for the number of layers and a short vocabulary."""
    return {
        "hidden_size": D_IN,
        "intermediate_size": 9216,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 1000,
    }


def build(
    layers: int, dtype: torch.dtype, device: str, topk: dict[str, object]
) -> tuple[Gemma2Model, ClampedGemma2Model]:
    """The base stack, and a clamped one that shares its weights; `topk` is what a site says of a
    TopK SAE.
    """
    sites = [{"layer": layers // 4, "k": K, "exempt_bos": True, **topk}]
    section = {"schema": 1, "sites": sites, "exempt_token_ids": [2]}
    with torch.device(device):
        base = Gemma2Model(Gemma2Config(**shape(layers))).to(dtype).eval()
        clamped = ClampedGemma2Model(ClampedGemma2Config(**shape(layers), sae_clamp=section))
    clamped = clamped.to(dtype).eval()
    clamped.load_state_dict(base.state_dict(), strict=False, assign=True)
    clamp = clamped.layers[layers // 4].sae_clamp
    for name, tensor in clamp.named_buffers():
        if name == "route":
            tensor.copy_(torch.eye(K))
        else:
            tensor.normal_(std=D_IN**-0.5)
    clamp.settle()
    return base, clamped


def whole_sae_hook(device: str) -> Callable[..., torch.Tensor]:
    """A notebook's hook: encode with all 16k features, set 20, decode, add the error."""
    W_enc = torch.randn(D_IN, D_SAE, device=device) * D_IN**-0.5
    W_dec = torch.randn(D_SAE, D_IN, device=device) * D_IN**-0.5

    def hook(module: object, args: object, h: torch.Tensor) -> torch.Tensor:
        acts = (h.float() @ W_enc).relu()
        error = h.float() - acts @ W_dec
        acts[..., :K] = torch.where(acts[..., :K] > 0, -300.0, acts[..., :K])
        return (acts @ W_dec + error).to(h.dtype)

    return hook


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--topk", type=int)
    parser.add_argument("--d-sae", type=int, default=65536)
    parser.add_argument("--stored", default="bfloat16")
    options = parser.parse_args()
    torch.manual_seed(0)
    topk: dict[str, object] = {}
    if options.topk:
        topk = {"topk": options.topk, "d_sae": options.d_sae, "dtype": options.stored}
    base, clamped = build(options.layers, getattr(torch, options.dtype), options.device, topk)
    size = sum(of.nbytes for name, of in clamped.named_buffers() if "sae_clamp" in name)
    print(f"the clamp's tensors: {size / 1e6:,.1f} MB")
    hook = whole_sae_hook(options.device)
    layer = base.layers[options.layers // 4]
    print(
        f"{options.layers} layers, d_in {D_IN}, k {K}, {options.dtype} on {options.device}, "
        f"{torch.get_num_threads()} threads"
    )

    def timed(model: torch.nn.Module, ids: torch.Tensor) -> float:
        if options.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        model(input_ids=ids, use_cache=False)
        if options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for tokens in (1, 512):
        ids = torch.randint(3, 1000, (1, tokens), device=options.device)
        rounds = options.rounds * (5 if tokens == 1 else 1)
        seconds: dict[str, list[float]] = {"base": [], "clamped": [], "hooked 16k SAE": []}
        for round_number in range(rounds + 2):
            order = ["base", "clamped"] if round_number % 2 else ["clamped", "base"]
            once = {name: timed(base if name == "base" else clamped, ids) for name in order}
            handle = layer.register_forward_hook(hook)
            once["hooked 16k SAE"] = timed(base, ids)
            handle.remove()
            if round_number >= 2:
                for name, took in once.items():
                    seconds[name].append(took)
        for name in ("clamped", "hooked 16k SAE"):
            pairs = [a / b for a, b in zip(seconds[name], seconds["base"], strict=True)]
            print(
                f"{tokens:4d} tokens: {name:14s} {statistics.median(pairs):.3f} × base "
                f"(quartiles {' to '.join(f'{q:.3f}' for q in statistics.quantiles(pairs)[::2])}; "
                f"base {statistics.median(seconds['base']) * 1e3:.1f} ms)"
            )


if __name__ == "__main__":
    main()
