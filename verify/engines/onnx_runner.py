"""ONNX Runtime as an engine: logits for the comparison, and a small `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from bake.errors import BakeoutError, FolderError
from bake.files.halving import in_halves, joined
from export.carriers.onnx.precisions import EXACT, PRECISIONS
from export.clamped import clamped_layers, read_config
from export.manifest import Manifest
from verify.engines.forward import parted
from verify.engines.heap import by_halves, give_back
from verify.engines.onnx_files import CLAMP_OPS, Graph, graph_failures, open_graph, unlinked
from verify.engines.onnx_head import ROWS, with_rows
from verify.engines.runners import DecodingRunner, Reading
from verify.engines.sampling import Chooser, check_padding, check_prompts

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
LOGIT_BYTES = 256 << 20
"""Most bytes of logits that one run of a session forms; longer batches are run in parts."""


class ProviderError(BakeoutError):
    """ONNX Runtime, or the execution provider that was asked for, is not installed."""


def open_session(
    model: ModelProto, path: Path, *, device: str = "cpu", threads: int | None = None
) -> Any:
    """An ONNX Runtime session over a graph.

    Args:
        model: the graph, perhaps changed since it was read.
        path: where it was read from, and beside which its data lies.
        device: cpu or cuda.
        threads: all cores when None.

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
    kind, _, index = device.partition(":")
    provider = PROVIDERS.get(kind)
    if provider not in ort.get_available_providers():
        extra = "gpu" if device.startswith("cuda") else "cpu"
        raise ProviderError(
            f"device {device}: ONNX Runtime here has {', '.join(ort.get_available_providers())}; "
            f"pip install 'bakeout[{extra}]' for {provider or 'a provider that bakeout knows'}"
        )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False  # it keeps what the largest batch took
    model, folder = unlinked(model, path)
    key = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(key, str(folder))
    if threads is not None:
        options.intra_op_num_threads = threads
    wanted = (provider, {"device_id": index}) if index and kind != "cpu" else provider
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=[wanted])
    except Exception as error:  # its own types share no base
        reason = " ".join(str(error).split())
        raise FolderError(f"{path}: ONNX Runtime cannot run it: {reason}; export it") from error
    # A provider whose own libraries are not there is replaced by the CPU's with a mere warning.
    if provider not in session.get_providers():
        raise ProviderError(
            f"device {device}: {provider} is installed but does not start; look whether the GPU's "
            "driver and the libraries that onnxruntime-gpu needs are there"
        )
    return session


def open_runner(
    folder: Path, file: str | None = None, *, device: str = "cpu", threads: int | None = None
) -> OnnxRunner:
    """Open a graph of a clamped folder, to run it.

    Args:
        folder: the checkpoint, or what `bakeout export onnx --out` wrote.
        file: the graph's path in the folder; default: the exact one, then the smallest.
        device: cpu or cuda.
        threads: of the session; all cores when None.

    Raises:
        FolderError: there is no graph, it is damaged, or it does not hold the folder's clamps.
        ProviderError: ONNX Runtime or the provider is not installed.
    """
    layers = clamped_layers(read_config(folder))
    by_size = sorted(PRECISIONS.values(), key=lambda of: (not of.shared, of.bits))
    files = [of.file for of in by_size] if file is None else [file]
    found = next((name for name in files if (folder / name).is_file()), None)
    if found is None:
        raise FolderError(
            f"{folder}: has no {file or 'ONNX graph'}; write it with `bakeout export onnx {folder}`"
        )
    names = {of.file: of.engine for of in by_size}
    graph = open_graph(names.get(found, EXACT), folder / found)
    if failures := graph_failures([graph], layers, Manifest.read(folder).files):
        raise FolderError(f"{folder}: {failures[0].what}; export it again")
    return OnnxRunner(graph, device=device, threads=threads)


def without_clamp(model: ModelProto) -> ModelProto:
    """The same graph with Identity in place of every clamp: what the clamp is measured against."""
    from onnx import ModelProto

    bare = ModelProto()
    bare.CopyFrom(model)
    for node in bare.graph.node:
        if (node.domain, node.op_type) in CLAMP_OPS:
            node.op_type, node.domain = "Identity", ""
            del node.input[1:]
    return bare


class OnnxRunner(DecodingRunner):
    """A graph of a clamped folder, in ONNX Runtime.

    Args:
        graph: what `onnx_files.py` opened.
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
        kind, _, index = device.partition(":")
        self._place = (kind, int(index or 0))
        model = graph.model if clamped else without_clamp(graph.model)
        picking = with_rows(model)
        self._picks = picking is not None
        model = picking or model
        self._session = open_session(model, graph.path, device=device, threads=threads)
        inputs = {value.name: value for value in self._session.get_inputs()}
        past = {name: of for name, of in inputs.items() if name.startswith("past_key_values")}
        # By name, heads, head_dim and type: what ONNX Runtime says of an input keeps its session.
        self._past = {name: (of.shape[1], of.shape[3], of.type) for name, of in past.items()}
        self._present = [name.replace("past_key_values", "present") for name in self._past]
        self._vocab = int(self._session.get_outputs()[0].shape[-1])

    def read(
        self, input_ids: Tensor, attention_mask: Tensor, wanted: Tensor, scored: Tensor
    ) -> Reading:
        """See `verify.engines.runners.Runner.read`."""
        import torch

        (n, seq), formed = input_ids.shape, wanted | scored
        per_row = int(formed.sum(dim=-1).max()) if self._picks else seq
        rows_at_once = max(1, LOGIT_BYTES // (4 * self._vocab * max(1, per_row)))

        def run(rows: slice) -> Any:
            ids, mask = input_ids[rows], attention_mask[rows]
            feed = self._feed(ids, mask, formed[rows]) | self._no_past(len(mask))
            logits = torch.from_numpy(self._session.run(["logits"], feed)[0])
            logits = logits if self._picks else logits[formed[rows]]
            return parted(logits, wanted[rows], scored[rows], ids)

        parts = in_halves(self, f"{self.name}: read", run, n, seq, rows_at_once)
        return Reading(*joined(parts))

    @by_halves
    def go_on(
        self, input_ids: Tensor, attention_mask: Tensor, stops: Sequence[int], most: int
    ) -> Tensor:
        """See `verify.engines.runners.Runner.go_on`."""
        import torch

        ended = torch.zeros(len(input_ids), dtype=torch.bool)
        ends, steps = torch.tensor(list(stops), dtype=torch.long), []
        said = self.generate(input_ids, attention_mask, max_new_tokens=most, eos_token_ids=stops)
        for token in said:
            steps.append(token.masked_fill(ended, -1))
            ended |= torch.isin(token, ends)
        return torch.stack(steps, dim=1)

    @by_halves
    def decoded(self, input_ids: Tensor, attention_mask: Tensor, n_last: int) -> Tensor:
        """See `verify.engines.runners.DecodingRunner.decoded`."""
        import torch

        check_padding(attention_mask)
        seq = input_ids.shape[1]
        begin, mask = seq - n_last, attention_mask
        _, cache = self._read(input_ids[:, :begin], mask[:, :begin], self._first_cache(len(mask)))
        found = []
        for column in range(begin, seq):
            last, cache = self._step(
                input_ids[:, column : column + 1], mask[:, : column + 1], cache
            )
            found.append(last.clone())
        return torch.stack(found, dim=1)

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

        Returns:
            An iterator over the steps: [batch] int64. Ends when every sequence has ended.

        Raises:
            ValueError: an argument is out of range, or a prompt is padded elsewhere than left.
        """
        ids, mask = input_ids.long(), attention_mask.long()
        check_prompts(ids, mask, self._vocab)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {max_new_tokens}; expected at least 1")
        choose = Chooser(do_sample, temperature, top_k, top_p, seed)
        return self._generate(ids, mask, max_new_tokens, list(eos_token_ids), choose)

    def _generate(
        self,
        ids: Tensor,
        mask: Tensor,
        max_new_tokens: int,
        eos_token_ids: list[int],
        choose: Chooser,
    ) -> Iterator[Tensor]:
        import torch

        ended, ends = torch.zeros(len(ids)).bool(), torch.tensor(eos_token_ids, dtype=torch.long)
        cache = self._first_cache(len(ids))
        for _ in range(max_new_tokens):
            last, cache = self._read(ids, mask, cache)
            token = choose(last)
            if len(ends):
                token = torch.where(ended, ends[0], token)
                ended |= torch.isin(token, ends)
            yield token
            if len(ends) and bool(ended.all()):
                return
            ids = token[:, None]
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)

    def _read(self, ids: Tensor, mask: Tensor, cache: list[Any]) -> tuple[Tensor, list[Any]]:
        """Next tokens' last logits and the cache with them. A graph that forms the logits of every
        token that it is given is given a long prompt in parts.
        """
        n_cached, seq = mask.shape[1] - ids.shape[1], ids.shape[1]
        width = seq if self._picks else max(1, LOGIT_BYTES // (4 * self._vocab * len(ids)))
        for start in range(0, seq, width):
            stop = min(start + width, seq)
            last, cache = self._step(ids[:, start:stop], mask[:, : n_cached + stop], cache)
        return last, cache

    def _step(self, ids: Tensor, mask: Tensor, cache: list[Any]) -> tuple[Tensor, list[Any]]:
        """(logits of the last token [batch, vocab], the new cache)."""
        import torch

        last = torch.zeros_like(ids, dtype=torch.bool)
        last[:, -1] = True
        binding = self._session.io_binding()
        for name, array in self._feed(ids, mask, last).items():
            binding.bind_cpu_input(name, array)
        for name, kept in zip(self._past, cache, strict=True):
            binding.bind_ortvalue_input(name, kept)
        binding.bind_output("logits")
        for name in self._present:
            binding.bind_output(name, *self._place)
        self._session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        found = torch.from_numpy(logits.numpy())
        return found if self._picks else found[:, -1], present

    def _first_cache(self, batch: int) -> list[Any]:
        import onnxruntime as ort

        empty = self._no_past(batch)
        return [ort.OrtValue.ortvalue_from_numpy(empty[name], *self._place) for name in self._past]

    def _no_past(self, batch: int) -> dict[str, Any]:
        """Keys and values of nothing: [batch, heads, 0, head_dim] each."""
        return {
            name: np.zeros((batch, heads, 0, dim), "f2" if kind == "tensor(float16)" else "f4")
            for name, (heads, dim, kind) in self._past.items()
        }

    def _feed(self, input_ids: Tensor, attention_mask: Tensor, formed: Tensor) -> dict[str, Any]:
        """The graph's inputs but its cache; the mask covers what is cached too.

        Args:
            input_ids: [batch, seq].
            attention_mask: [batch, cached + seq].
            formed: [batch, seq] bool, where logits are asked for.
        """
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        feed = {
            "input_ids": input_ids.contiguous().numpy(),
            "attention_mask": attention_mask.contiguous().numpy(),
            "position_ids": positions.contiguous().numpy(),
        }
        return feed | ({ROWS: formed.flatten().nonzero()[:, 0].numpy()} if self._picks else {})

    def close(self) -> None:
        """Let go of the session, and of what its weights took."""
        self._session = None
        give_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self.close()
