"""The outputs of a model's first layers, computed with one layer in memory at a time.

A bake never holds the model, however large: of the embedding table only the rows of the tokens at
hand are read, and each decoder layer is read, run and dropped.
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
from bake.errors import ModelError, short
from bake.stock import quiet
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
    """
    tensors = indexed_tensors(base.folder, base.weight_map)
    seen: dict[int, Tensor] = {}
    try:
        with quiet():
            _run(base, tensors, layers, ids, seen)
    except ModelError:
        raise
    except Exception as error:  # transformers raises every kind
        reason = short(" ".join(f"{type(error).__name__}: {error}".split()))
        raise ModelError(
            f"base model {base.name}: does not run up to layer {max(layers)} ({reason}); expected "
            "a model that transformers runs. Download it again, or bake with --unfit, which does "
            "without"
        ) from error
    return seen


def _run(
    base: BaseModel,
    tensors: dict[str, StoredTensor],
    layers: Sequence[int],
    ids: Tensor,
    seen: dict[int, Tensor],
) -> None:
    """One forward over the layers up to the highest. Changes `seen`."""
    model, layer_class = _backbone(base)
    text = model.config
    table = tensors[_table_name(base)]
    known, places = torch.unique(ids, return_inverse=True)
    rows = np.concatenate([table.rows(row, row + 1) for row in known.tolist()])
    model.embed_tokens.weight = nn.Parameter(torch.from_numpy(rows), requires_grad=False)
    text.num_hidden_layers = max(layers) + 1
    model.layers = nn.ModuleList(
        _Read(base, tensors, layer_class, text, i) for i in range(max(layers) + 1)
    )
    for layer in layers:
        model.layers[layer].keep_in = seen
    model.norm = nn.Identity()
    model(input_ids=places, use_cache=False)


def table_rows(base: BaseModel) -> int:
    """How many tokens a model's embedding table has rows for."""
    return indexed_tensors(base.folder, base.weight_map)[_table_name(base)].shape[0]


def _table_name(base: BaseModel) -> str:
    return f"{base.layer_prefix.removesuffix('layers.')}embed_tokens.weight"


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
    model = transformers.AutoModel.from_config(
        text, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    )
    name = base.family.rope.replace("RotaryEmbedding", "DecoderLayer")
    return model.eval(), getattr(sys.modules[type(model).__module__], name)
