"""The outputs of a model's first layers, computed with one layer in memory at a time.

A bake never holds the model, however large: of embedding tables only the rows of the tokens at hand
are read, and each decoder layer is read, run and dropped.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bake.base import BaseModel
from bake.errors import BakeoutError, ModelError, short
from bake.files.halving import in_halves, joined
from bake.stock import quiet, read_whole
from bake.strangers.model_view import shown_model
from bake.tensors import StoredTensor, indexed_tensors


@torch.inference_mode()
def layer_outputs(base: BaseModel, layers: Sequence[int], ids: Tensor) -> dict[int, Tensor]:
    """What `bake.search.statistics.residuals` gives of a model in memory, in float32.

    Args:
        base: the model as it lies on disk.
        layers: decoder layers, from 0; nothing above the highest of them is read.
        ids: [batch, seq], each below the number of the embedding table's rows.

    Returns:
        layer → [batch, seq, d_in], float32.

    Raises:
        ModelError: transformers does not run the model.
        RanOutError: memory runs out at one row.
    """
    tensors = indexed_tensors(base.folder, base.weight_map)

    def run(rows: slice) -> dict[int, Tensor]:
        seen: dict[int, Tensor] = {}
        with quiet():
            _run(base, tensors, layers, ids[rows], seen)
        return seen

    try:
        return joined(in_halves(layer_outputs, f"base model {base.name}", run, *ids.shape))
    except BakeoutError:
        raise
    except Exception as error:  # transformers raises every kind
        reason = short(" ".join(f"{type(error).__name__}: {error}".split()))
        raise ModelError(
            f"base model {base.name}: does not run up to layer {max(layers)} ({reason}); expected "
            "a model that transformers runs. Download it again, or bake with --unfit, which does "
            "without"
        ) from error


def _run(
    base: BaseModel,
    tensors: dict[str, StoredTensor],
    layers: Sequence[int],
    ids: Tensor,
    seen: dict[int, Tensor],
) -> None:
    """One forward over the layers up to the highest. Changes `seen`."""
    model, layer_class = _backbone(base)
    text, run = model.config, range(max(layers) + 1)
    text.num_hidden_layers = base.n_layers  # what a Gemma 4 makes of a token is cut by it
    known, places = torch.unique(ids, return_inverse=True)
    before = base.layer_prefix.removesuffix("layers.")
    model.norm = nn.Identity()
    for name, _ in list(model.named_parameters()):
        stored, (module, _, field) = tensors[before + name], name.rpartition(".")
        rows = (stored.rows(row, row + 1) for row in known.tolist())
        numbers = np.concatenate([*rows]) if name.startswith("embed_tokens") else stored.array()
        weight = nn.Parameter(torch.from_numpy(numbers), requires_grad=False)
        setattr(model.get_submodule(module), field, weight)
    model.layers = nn.ModuleList(_Read(base, tensors, layer_class, text, i) for i in run)
    for layer in layers:
        model.layers[layer].keep_in = seen
    read_whole(model)
    model(input_ids=places, use_cache=False)


def table_rows(base: BaseModel) -> int:
    """How many tokens a model's embedding table has rows for."""
    name = f"{base.layer_prefix.removesuffix('layers.')}embed_tokens.weight"
    return indexed_tensors(base.folder, base.weight_map)[name].shape[0]


class _Read(nn.Module):
    """A decoder layer that is in memory only while it runs."""

    def __init__(
        self,
        base: BaseModel,
        tensors: dict[str, StoredTensor],
        layer_class: type[nn.Module],
        config: Any,
        index: int,
    ) -> None:
        super().__init__()
        begin = f"{base.layer_prefix}{index}."
        self.tensors = {n.removeprefix(begin): t for n, t in tensors.items() if n.startswith(begin)}
        self.made = layer_class, config, index
        self.keep_in: dict[int, Tensor] | None = None

    def forward(self, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer_class, config, index = self.made
        with torch.device("meta"):
            layer = layer_class(config, index)
        wanted = layer.state_dict()  # others, as some files hold, are not read
        numbers = {name: torch.from_numpy(self.tensors[name].array()) for name in wanted}
        layer.load_state_dict(numbers, assign=True)
        output = layer.eval()(h, *args, **kwargs)
        h = output[0] if isinstance(output, tuple) else output
        if self.keep_in is not None:
            self.keep_in[index] = h
        return h


def _backbone(base: BaseModel) -> tuple[Any, type[nn.Module]]:
    """(transformers' text model of a base without layers and tokens, its class of layers)."""
    import transformers

    with shown_model(base.folder) as folder:
        whole = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    text = copy.deepcopy(whole.get_text_config())
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 0, 1, 0
    text.vocab_size_per_layer_input = 1
    model = transformers.AutoModel.from_config(
        text, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    )
    name = base.family.rope.replace("RotaryEmbedding", "DecoderLayer")
    return model.eval(), getattr(sys.modules[type(model).__module__], name)
