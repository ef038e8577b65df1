"""A clamped checkpoint run in float32 with one layer of it in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import bake.modeling_clamped_gemma as modeling
from bake.families import unread_tensors
from bake.rounding import DRAWS, EPSILON, disturbed_part, rounding_parts
from bake.stock import placed
from bake.tensors import StoredTensor
from export.clamped import Clamped


@dataclass(frozen=True)
class Run:
    """What one forward showed."""

    logits: Tensor
    """[n, vocab] float32, at the places that were asked for."""
    read: dict[int, Tensor]
    """By clamped layer: the residual stream before its clamp, [batch, seq, d_in]."""
    moved: dict[int, Tensor]
    """By clamped layer: where its clamp changed the residual stream, [batch, seq] bool."""
    active: dict[int, Tensor]
    """By clamped layer: which features were above their trigger there, [batch, seq, k] bool."""
    margins: list[Tensor]
    """For each clamp: by how much its nearest feature misses theta and trigger, [batch, seq]."""
    edges: list[Tensor]
    """For each clamp: how close its nearest gate is to its other side, in roundings of what the
    clamp reads, [batch, seq]."""


class StreamedModel:
    """The checkpoint's own classes, from this installation; each layer is read when it runs.

    Args:
        clamped: the folder.
        device: as torch names it, where the layers run; what they give comes back to the CPU.

    Raises:
        ModelError: torch cannot run it there.
    """

    def __init__(self, clamped: Clamped, device: str = "cpu") -> None:
        self._clamped, self._device = clamped, device
        self._unread = unread_tensors(clamped.base_config)
        config = clamped.config
        config._attn_implementation = "eager"
        with torch.device("meta"):
            self._model = getattr(modeling, clamped.model_class)(config).eval()
        text = self._model.model
        text = self._text = getattr(text, "language_model", text)
        text.rotary_emb = placed(type(text.rotary_emb)(text.config), device)
        table = clamped.tensors[f"{clamped.backbone_prefix}embed_tokens.weight"]
        text.embed_tokens = _Table(table, text.config.hidden_size**0.5, device)
        if width := getattr(text.config, "hidden_size_per_layer_input", 0):
            self._fill_per_layer(width)
        text.norm.load_state_dict(self._tensors(f"{clamped.backbone_prefix}norm."), assign=True)
        self._model.lm_head = self._head = _Head(clamped.tensors[clamped.head])
        self._layers = text.layers
        self._clamping = True
        self._read: dict[int, Tensor] = {}
        self._moved: dict[int, Tensor] = {}
        self._active: dict[int, Tensor] = {}
        self._margins: list[Tensor] = []
        self._edges: list[Tensor] = []
        self._noise: tuple[int, torch.Generator] | None = None
        for index, layer in enumerate(text.layers):
            layer.register_forward_pre_hook(self._fill(index))
            layer.register_forward_hook(lambda module, _, __: module.to("meta") and None)
            for part in rounding_parts(layer):
                part.register_forward_hook(self._disturb_part)
            if layer.sae_clamp is not None:
                layer.sae_clamp.register_forward_pre_hook(
                    lambda clamp, given: (self._disturb_part(clamp, given, given[0]), *given[1:])
                )
                layer.sae_clamp.register_forward_hook(self._watch(index))

    def run(self, input_ids: Tensor, attention_mask: Tensor, places: Tensor) -> Run:
        """One forward over left-padded prompts.

        Args:
            input_ids: [batch, seq].
            attention_mask: [batch, seq], 1 at real tokens.
            places: [n, 2], (row, column) of the tokens whose logits are wanted.
        """
        self._head.places = places
        logits = self._forward(self._model, input_ids, attention_mask).logits
        return Run(
            logits[0].cpu(), self._read, self._moved, self._active, self._margins, self._edges
        )

    def run_disturbed(
        self, input_ids: Tensor, attention_mask: Tensor, places: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The logits of `run`, and how far one rounding of every matrix and norm moves them. The
        model is read once for all.

        Returns:
            [n, vocab]; [n], the largest |Δlogit| of any of the draws.
        """
        n = len(input_ids)
        copies = 1 + DRAWS
        rows = torch.arange(copies)[:, None] * n + places[:, 0]
        every = torch.stack([rows, places[:, 1].expand_as(rows)], dim=-1).flatten(0, 1)
        self._noise = n, torch.Generator().manual_seed(0)
        try:
            run = self.run(input_ids.repeat(copies, 1), attention_mask.repeat(copies, 1), every)
        finally:
            self._noise = None
        logits, *others = torch.chunk(run.logits, copies)
        moved = EPSILON["float32"] * logits.abs().amax(dim=-1)  # the logits are rounded too
        for other in others:
            moved = moved.maximum((other - logits).abs().amax(dim=-1))
        return logits, moved

    def run_to_last_clamp(self, input_ids: Tensor, attention_mask: Tensor) -> Run:
        """The same up to the last clamped layer, without logits: [0, vocab]."""
        last = self._clamped.sites[-1].layer
        self._text.layers = self._layers[: last + 1]
        try:
            self._forward(self._text, input_ids, attention_mask)
        finally:
            self._text.layers = self._layers
        nothing = torch.empty(0, self._head.vocab)
        return Run(nothing, self._read, self._moved, self._active, self._margins, self._edges)

    @contextmanager
    def unclamped(self) -> Iterator[None]:
        """Within the block no clamp acts: the base model."""
        self._clamping = False
        try:
            yield
        finally:
            self._clamping = True

    def _forward(self, model: Any, input_ids: Tensor, mask: Tensor) -> Any:
        self._read, self._moved, self._active, self._margins, self._edges = {}, {}, {}, [], []
        with torch.inference_mode():
            mask = mask.to(self._device)
            return model(
                input_ids=input_ids.to(self._device),
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                use_cache=False,
            )

    def _fill_per_layer(self, width: int) -> None:
        """What a Gemma 4 gives each layer of each token."""
        text, prefix = self._text, self._clamped.backbone_prefix
        table = self._clamped.tensors[f"{prefix}embed_tokens_per_layer.weight"]
        text.embed_tokens_per_layer = _Table(table, width**0.5, self._device)
        for part in ("per_layer_model_projection", "per_layer_projection_norm"):
            loaded = self._tensors(f"{prefix}{part}.")
            getattr(text, part).load_state_dict(loaded, assign=True)

    def _fill(self, index: int) -> Any:
        prefix = f"{self._clamped.layer_prefix}{index}."

        def fill(layer: nn.Module, _: Any) -> None:
            layer.load_state_dict(self._tensors(prefix), assign=True)

        return fill

    def _watch(self, index: int) -> Any:
        def watch(clamp: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            h = inputs[0]
            if not self._clamping:
                return h
            self._read[index] = h.cpu()
            self._moved[index] = (output != h).any(dim=-1).cpu()
            self._active[index] = (clamp.feature_acts(h) > clamp.trigger).cpu()
            W, b = clamp.W_enc[:, : clamp.k].float(), clamp.b_enc[: clamp.k]
            if clamp.topk:
                W = W * clamp.gain[: clamp.k]
                pre, gate = _rank_gate(clamp, h)
            else:
                pre, gate = h.float() @ W + b, clamp.theta
            margin = pre - gate.maximum(clamp.trigger)
            spread = (h.float().square() @ W.square()).sqrt() + b.abs()
            self._margins.append(margin.amax(dim=-1).cpu())
            edges = (margin.abs() / (EPSILON["float32"] * spread)).amin(dim=-1)
            if len(inputs) > 1 and inputs[1] is not None:  # exempt: nothing is decided there
                edges = edges.masked_fill(inputs[1], torch.inf)
            self._edges.append(edges.cpu())
            return output

        return watch

    def _disturb_part(self, part: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """What a part gives, [batch, seq, d], with one rounding more in the prompts' copies."""
        if self._noise is None:
            return y
        n, generator = self._noise
        copies = disturbed_part(part, given[0][n:], y[n:], generator, EPSILON["float32"])
        return torch.cat([y[:n], copies])

    def _tensors(self, prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): torch.from_numpy(tensor.array()).to(self._device)
            for name, tensor in self._clamped.tensors.items()
            if name.startswith(prefix) and not self._unread.fullmatch(name)
        }


def _rank_gate(clamp: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    """Of a TopK SAE: its features' pre-activations, and those of what would take their places, or
    whose places they would take: [batch, seq, k] both.
    """
    pre, last_in = clamp.topk_pre(h, clamp.topk)
    if clamp.topk == clamp.W_enc.shape[1]:  # none is left out
        return pre, torch.full_like(pre, -torch.inf)
    _, first_out = clamp.topk_pre(h, clamp.topk + 1)
    return pre, torch.where(pre >= last_in, first_out, last_in)


class _Table(nn.Module):
    """An embedding table of which only the rows that are asked for are read."""

    def __init__(self, table: StoredTensor, scale: float, device: str) -> None:
        super().__init__()
        self._table, self._scale, self._device = table, scale, device

    def forward(self, input_ids: Tensor) -> Tensor:
        """[batch, seq] -> [batch, seq, d_in]."""
        ids, places = torch.unique(input_ids, return_inverse=True)
        rows = [torch.from_numpy(self._table.rows(i, i + 1)) for i in ids.tolist()]
        return torch.cat(rows).to(self._device)[places] * self._scale

    @property
    def weight(self) -> _Table:
        """Itself: of the table one row is asked for, the padding's."""
        return self

    def __getitem__(self, place: tuple[int, slice]) -> Tensor:
        """A row, unscaled: [d_in]."""
        row, columns = place
        return torch.from_numpy(self._table.rows(row, row + 1)).to(self._device)[0, columns]


class _Head(nn.Module):
    """An output matrix that is read block by block, and asked about a few tokens only."""

    def __init__(self, matrix: StoredTensor) -> None:
        super().__init__()
        self._matrix = matrix
        self.vocab = matrix.shape[0]
        self.places = torch.empty(0, 2, dtype=torch.long)

    def forward(self, h: Tensor) -> Tensor:
        """[batch, seq, d_in] -> [1, n places, vocab]."""
        rows, columns = self.places.unbind(-1)
        chosen = h[rows, columns]
        blocks = (torch.from_numpy(self._matrix.rows(*rows)) for rows in self._matrix.blocks())
        found = [chosen @ block.to(h.device).T for block in blocks]
        return torch.cat(found, dim=-1).unsqueeze(0)
