"""SGLang on a CPU without its kernels: its own arguments, plugins, registry, loader and layers.

Its kernels are for GPUs. Of all but attention it has a form in plain torch, its own; attention is
written out below. Packages that it imports and has no use for here are made up.

    python -m tests.serving.sglang_here REQUEST

For each of a JSON file's {"folder", "dtype", "rows", "logits", …} it writes [tokens, vocab] float32
of some sequences one after another into the file `logits`; where that fails, the reason, as text.
First come those that trust a folder's code, as if bakeout were not installed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

os.environ |= {"SGLANG_USE_CPU_ENGINE": "1", "TORCH_COMPILE_DISABLE": "1"}
ABSENT = ("triton", "torchvision", "sgl_kernel", "IPython")
MODELS = ("gemma", "gemma2", "gemma3_causal", "transformers")
"""Which of its models SGLang's registry imports: all take it long."""


class Absent(ModuleType):
    """A module that has every name: a class where it begins with a capital, else a decorator."""

    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}) if name[0].isupper() else Absent(name))
        return getattr(self, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else self


class MakesUp(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in ABSENT else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def make_up() -> None:
    """Let SGLang be imported here, and its registry import no more than it is asked for."""
    import transformers  # noqa: F401  # before it finds what is made up

    if not any(isinstance(finder, MakesUp) for finder in sys.meta_path):
        sys.meta_path.insert(0, MakesUp())
        (sglang,) = find_spec("sglang").submodule_search_locations  # type: ignore[union-attr, misc]
        others = {of.stem for of in Path(sglang, "srt", "models").glob("*.py")} - {*MODELS}
        os.environ["SGLANG_DISABLED_MODEL_ARCHS"] = ",".join(others)


def attention(
    self: Any, query: Any, key: Any, value: Any, forward_batch: Any, *_: Any, **__: Any
) -> Any:
    """[tokens, heads * size] each -> the same: causal, soft-capped, within the window, each
    sequence alone, from its position 0 on.
    """
    positions = forward_batch.positions
    sequence = (positions == 0).cumsum(0)
    q, k, v = (
        of.reshape(len(sequence), -1, self.head_dim).transpose(0, 1).float()
        for of in (query, key, value)
    )
    k, v = (of.repeat_interleave(len(q) // len(of), 0) for of in (k, v))
    scores = q @ k.mT * self.scaling
    if cap := self.logit_cap:
        scores = (scores / cap).tanh() * cap
    ago = positions[:, None] - positions[None]
    seen = (sequence[:, None] == sequence[None]) & (ago >= 0)
    if self.sliding_window_size > 0:  # of the tokens before
        seen &= ago <= self.sliding_window_size
    scores = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (scores @ v).transpose(0, 1).reshape(len(sequence), -1).to(query.dtype)


def logits_of(
    folder: str,
    dtype: str,
    rows: Sequence[Sequence[int]],
    *,
    wrapped: bool = False,
    embeds: bool = False,
    **server: Any,
) -> torch.Tensor:
    """Of every token of some sequences, which begin at position 0: [tokens, vocab] float32.

    Args:
        folder: as somebody would name it to `sglang serve`.
        dtype: as `--dtype` takes it.
        rows: the sequences.
        wrapped: whether layers are wrapped as they are made, as offloading does it.
        embeds: whether the model gets embeddings, and ids that mean nothing.
        server: its other arguments.
    """
    make_up()
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.layers.logits_processor import LogitsProcessor
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_loader import get_model
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils import offloader

    from tests.serving.offloading import wrap_forward

    class Wrapping(offloader.NoopOffloader):  # type: ignore[misc]
        def wrap_modules(self, modules: Any, *_: Any, **__: Any) -> list[Any]:
            return [wrap_forward(layer) for layer in modules]

    if not server.get("trust_remote_code"):
        load_plugins()
    offloader.set_offloader(Wrapping() if wrapped else offloader.NoopOffloader())
    RadixAttention.forward = attention
    LogitsProcessor.forward = lambda self, ids, hidden, head, *_: self._get_logits(
        hidden, head, SimpleNamespace(next_token_logits_buffer=None)
    )
    args = ServerArgs(
        model_path=folder,
        dtype=dtype,
        device="cpu",
        attention_backend="torch_native",
        skip_tokenizer_init=True,
        **server,
    )
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0))
    if not torch.distributed.is_initialized():
        with TemporaryDirectory() as scratch:
            init_distributed_environment(1, 0, f"file://{scratch}/store", 0, "gloo")
            initialize_model_parallel()
    model = get_model(
        model_config=ModelConfig.from_server_args(args),
        load_config=LoadConfig(load_format=args.load_format),
        device_config=DeviceConfig("cpu"),
    )
    ids = torch.tensor([token for row in rows for token in row])
    batch = SimpleNamespace(
        input_ids=ids,
        positions=torch.tensor([at for row in rows for at in range(len(row))]),
        input_embeds=None,
    )
    with torch.no_grad():
        if embeds:
            batch.input_embeds = model.model.embed_tokens(ids)
            batch.input_ids = torch.ones_like(ids)
        for _ in range(2):  # what is put around a layer may come off at the first step
            given = None if batch.input_embeds is None else batch.input_embeds.clone()
            logits = model(batch.input_ids, batch.positions, batch, input_embeds=given)
    return logits.float()


if __name__ == "__main__":
    from tests.clients.asking import Blocker

    blocker = Blocker()
    sys.meta_path.insert(0, blocker)
    for asked in sorted(
        json.loads(Path(sys.argv[1]).read_text()), key=lambda of: not of["trust_remote_code"]
    ):
        if not asked["trust_remote_code"] and blocker in sys.meta_path:
            sys.meta_path.remove(blocker)
        place = asked.pop("logits")
        try:
            torch.save(logits_of(**asked), place)
        except Exception as error:  # what SGLang says of it
            torch.save(f"{type(error).__name__}: {error}", place)
