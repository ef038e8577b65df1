"""vLLM on a CPU without its kernels: its own config, plugins, registry, loader, layers and logits.

Of vLLM's wheel, whose kernels are for GPUs, only those of attention cannot be done without; they
are written out below. Everything else has a form in plain torch, which is vLLM's own.

    python -m tests.serving.vllm_here REQUEST [alone]

For each of a JSON file's {"folder", "dtype", "rows", "logits", …} it writes [tokens, vocab] float32
of some sequences one after another into the file `logits`; where that fails, the reason, as text.
Alone: as if bakeout were not installed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

os.environ |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_LOGGING_LEVEL": "CRITICAL"}


def attention(self: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
    """[tokens, heads * size] each -> the same: causal, soft-capped, within the window, each
    sequence alone, from its position 0 on.
    """
    from vllm.forward_context import get_forward_context

    positions = get_forward_context().additional_kwargs["positions"]
    sequence = (positions == 0).cumsum(0)
    q, k, v = (
        of.view(len(positions), -1, self.head_size).transpose(0, 1).float()
        for of in (query, key, value)
    )
    k, v = (of.repeat_interleave(len(q) // len(of), 0) for of in (k, v))
    scores = q @ k.mT * self.impl.scale
    if cap := self.impl.logits_soft_cap:
        scores = (scores / cap).tanh() * cap
    ago = positions[:, None] - positions[None]
    seen = (sequence[:, None] == sequence[None]) & (ago >= 0)
    if self.impl.sliding_window > 0:
        seen &= ago < self.impl.sliding_window
    scores = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (scores @ v).transpose(0, 1).reshape(len(positions), -1).to(query.dtype)


@contextmanager
def loaded(folder: str, dtype: str, rows: Sequence[Sequence[int]], **engine: Any) -> Any:
    """(vLLM's model of a folder, its config), while it is the current one.

    Args:
        folder: as somebody would name it to `vllm serve`.
        dtype: as `--dtype` takes it.
        rows: the sequences that it is to have room for.
        engine: its other options.
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.model_loader import get_model
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    torch.accelerator.empty_cache = lambda: None
    Attention.forward = attention
    asked = EngineArgs(
        model=folder,
        dtype=dtype,
        enforce_eager=True,
        compilation_config={"custom_ops": ["none"]},  # its layers in plain torch
        max_model_len=max(map(len, rows)),
        max_num_batched_tokens=sum(map(len, rows)),
        max_num_seqs=len(rows),
        **engine,
    )
    config = asked.create_engine_config()
    with set_current_vllm_config(config), TemporaryDirectory() as scratch:
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{scratch}/store", 0, "gloo")
            initialize_model_parallel(1, 1)
        yield get_model(vllm_config=config), config


def logits_of(
    folder: str,
    dtype: str,
    rows: Sequence[Sequence[int]],
    *,
    wrapped: bool = False,
    **engine: Any,
) -> torch.Tensor:
    """Of every token of some sequences, which begin at position 0: [tokens, vocab] float32.

    Args:
        folder: as `loaded` takes it, like the following.
        dtype: too.
        rows: too.
        wrapped: whether layers are wrapped as they are made.
        engine: too.
    """
    from vllm.model_executor.offloader import base as offloading

    from tests.serving.offloading import wrap_forward

    class Wrapping(offloading.NoopOffloader):  # type: ignore[misc, name-defined]
        def wrap_modules(self, modules: Iterable[Any], prefix: str = "") -> list[Any]:
            return [wrap_forward(layer) for layer in modules]

    offloading.set_offloader(Wrapping() if wrapped else None)
    from vllm.forward_context import set_forward_context

    ids = torch.tensor([token for row in rows for token in row])
    positions = torch.tensor([at for row in rows for at in range(len(row))])
    with (
        torch.no_grad(),
        loaded(folder, dtype, rows, **engine) as (model, config),
        set_forward_context(None, config, num_tokens=len(ids)),
    ):
        from vllm.forward_context import get_forward_context

        get_forward_context().additional_kwargs["positions"] = positions
        model(ids, positions)  # what is put around a layer may come off at the first step
        logits: torch.Tensor = model.compute_logits(model(ids, positions)).float()
    return logits


if __name__ == "__main__":
    if "alone" in sys.argv[2:]:
        from tests.clients.asking import Blocker

        sys.meta_path.insert(0, Blocker())
    for asked in json.loads(Path(sys.argv[1]).read_text()):
        place = asked.pop("logits")
        try:
            torch.save(logits_of(**asked), place)
        except Exception as error:  # what vLLM says of it
            torch.save(f"{type(error).__name__}: {error}", place)
