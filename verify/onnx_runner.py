"""ONNX Runtime as an engine: logits for the comparison, and a small `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from bake.errors import BakeoutError, FolderError
from verify.onnx_files import CLAMP_OP, Graph
from verify.runners import check_padding

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
LOGIT_BYTES = 256 << 20
"""Most bytes of logits that one run of a session forms; longer batches are run in parts."""


class ProviderError(BakeoutError):
    """ONNX Runtime, or the execution provider that was asked for, is not installed."""


def open_session(
    model: ModelProto, folder: Path, *, device: str = "cpu", threads: int | None = None
) -> Any:
    """An ONNX Runtime session over a graph whose data lies in a folder.

    Raises:
        ProviderError: ONNX Runtime or the provider is not installed.
        FolderError: ONNX Runtime refuses the graph.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise ProviderError(
            "ONNX Runtime is not installed; pip install 'bakeout[cpu]', or 'bakeout[gpu]' for CUDA"
        ) from error
    provider = PROVIDERS.get(device.partition(":")[0])
    if provider not in ort.get_available_providers():
        extra = "gpu" if device.startswith("cuda") else "cpu"
        raise ProviderError(
            f"device {device}: ONNX Runtime here has {', '.join(ort.get_available_providers())}; "
            f"pip install 'bakeout[{extra}]' for {provider or 'a provider that bakeout knows'}"
        )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder.resolve())
    )
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=[provider])
    except Exception as error:  # its own types share no base
        reason = " ".join(str(error).split())
        raise FolderError(f"{folder.name}: ONNX Runtime cannot run it: {reason}") from error


def without_clamp(model: ModelProto) -> ModelProto:
    """The same graph with Identity in place of every clamp: what the clamp is measured against."""
    from onnx import ModelProto

    bare = ModelProto()
    bare.CopyFrom(model)
    for node in bare.graph.node:
        if (node.domain, node.op_type) == CLAMP_OP:
            node.op_type, node.domain = "Identity", ""
            del node.input[1:]
    return bare


class OnnxRunner:
    """A graph of a clamped folder, in ONNX Runtime.

    Args:
        graph: what `verify.onnx_files` opened.
        device: cpu or cuda.
        threads: of the session; all cores when None.
        clamped: False takes the clamp out, for comparison.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        device: str = "cpu",
        threads: int | None = None,
        clamped: bool = True,
    ) -> None:
        self.name = graph.name
        self._device = device.partition(":")[0]
        model = graph.model if clamped else without_clamp(graph.model)
        self._session = open_session(model, graph.path.parent, device=device, threads=threads)
        inputs = {value.name: value for value in self._session.get_inputs()}
        self._past = [value for name, value in inputs.items() if name.startswith("past_key_values")]
        self._present = [value.name.replace("past_key_values", "present") for value in self._past]
        self._vocab = int(self._session.get_outputs()[0].shape[-1])

    def logits(self, input_ids: Tensor, attention_mask: Tensor, last_only: bool) -> Tensor:
        """See `verify.runners.Runner`."""
        import torch

        check_padding(attention_mask, last_only)
        rows_at_once = max(1, LOGIT_BYTES // (4 * self._vocab * input_ids.shape[1]))
        parts = []
        for start in range(0, len(input_ids), rows_at_once):
            rows = slice(start, start + rows_at_once)
            mask = attention_mask[rows]
            feed = _feed(input_ids[rows], mask) | self._no_past(len(mask))
            (found,) = self._session.run(["logits"], feed)
            parts.append(torch.from_numpy(found[:, -1:] if last_only else found))
        return torch.cat(parts)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        max_new_tokens: int,
        eos_token_ids: Sequence[int] = (),
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[Tensor]:
        """Next tokens, one step at a time; keys and values stay in the runtime between steps.

        Args:
            input_ids: [batch, seq], padded on the left.
            attention_mask: [batch, seq], 1 at real tokens.
            max_new_tokens: how many steps at most.
            eos_token_ids: tokens that end a sequence; it goes on with the first of them.
            do_sample: draw from the distribution; else the likeliest token.
            temperature: divides the logits; above 0.
            top_k: draw among so many likeliest tokens; 0 is all.
            top_p: draw among the fewest tokens that have this share of the probability.
            seed: of the draws.

        Yields:
            [batch] int64. Ends when every sequence has ended.
        """
        import torch

        check_padding(attention_mask, last_only=True)
        generator = torch.Generator().manual_seed(seed)
        ended = torch.zeros(len(input_ids), dtype=torch.bool)
        ends = torch.tensor(list(eos_token_ids), dtype=torch.long)
        cache = self._first_cache(len(input_ids))
        ids, mask = input_ids, attention_mask
        for _ in range(max_new_tokens):
            last, cache = self._step(_feed(ids, mask), cache)
            if do_sample:
                token = sample(last, temperature, top_k, top_p, generator)
            else:
                token = last.argmax(dim=-1)
            if len(ends):
                token = torch.where(ended, ends[0], token)
                ended |= torch.isin(token, ends)
            yield token
            if len(ends) and bool(ended.all()):
                return
            ids = token[:, None]
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)

    def _step(self, feed: dict[str, Any], cache: list[Any]) -> tuple[Tensor, list[Any]]:
        """(logits of the last token [batch, vocab], the new cache)."""
        import torch

        binding = self._session.io_binding()
        for name, array in feed.items():
            binding.bind_cpu_input(name, array)
        for value, kept in zip(self._past, cache, strict=True):
            binding.bind_ortvalue_input(value.name, kept)
        binding.bind_output("logits")
        for name in self._present:
            binding.bind_output(name, self._device)
        self._session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        return torch.from_numpy(logits.numpy()[:, -1]).float(), present

    def _first_cache(self, batch: int) -> list[Any]:
        import onnxruntime as ort

        empty = self._no_past(batch)
        return [
            ort.OrtValue.ortvalue_from_numpy(empty[value.name], self._device)
            for value in self._past
        ]

    def _no_past(self, batch: int) -> dict[str, Any]:
        """Keys and values of nothing: [batch, heads, 0, head_dim] each."""
        return {
            value.name: np.zeros(
                (batch, value.shape[1], 0, value.shape[3]),
                np.float16 if value.type == "tensor(float16)" else np.float32,
            )
            for value in self._past
        }

    def close(self) -> None:
        """Let go of the session."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self.close()


def _feed(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
    """The graph's inputs but its cache; the mask covers what is cached too."""
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
    return {
        "input_ids": input_ids.contiguous().numpy(),
        "attention_mask": attention_mask.contiguous().numpy(),
        "position_ids": positions.contiguous().numpy(),
    }


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: Any) -> Tensor:
    """Draw one token per row: [batch, vocab] -> [batch].

    Raises:
        ValueError: a parameter is out of range.
    """
    import torch

    if temperature <= 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature {temperature}, top_k {top_k}, top_p {top_p}; expected above 0, at least "
            "0, above 0 and at most 1"
        )
    ordered, tokens = (logits / temperature).sort(dim=-1, descending=True)
    shares = ordered.softmax(dim=-1)
    before = shares.cumsum(dim=-1) - shares
    shares = shares.masked_fill(before >= top_p, 0.0)
    if top_k:
        shares[:, top_k:] = 0.0
    drawn = torch.multinomial(shares, 1, generator=generator)
    return tokens.gather(-1, drawn).squeeze(-1)
