"""The file of witnesses: prompts that fire the clamp, and the logits that were seen at export.

`witnesses.npz` lies in the folder, so that whoever has only the folder can check every engine found
in it against what the exporter saw, and see that the clamp acts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bake.errors import FolderError
from bake.files.folder_files import file_in
from bake.reading.arrays import read_npz
from bake.reading.capped import CAPS
from bake.reading.model_config import wrong_field
from bake.rounding import BAR
from export.manifest import AGAIN, read_json

if TYPE_CHECKING:
    from torch import Tensor

WITNESSES = "witnesses.npz"
_LOGITS = {"logits", "unclamped", "sensitivity"}
_LAYOUT = {"input_ids", "attention_mask", "places", "token_ids", *_LOGITS}


@dataclass(frozen=True)
class Witnesses:
    """What the file holds: integers as int64, logits as float32."""

    input_ids: Tensor
    """[n, seq], padded on the left."""
    attention_mask: Tensor
    """[n, seq]."""
    places: Tensor
    """[m, 2]: row and column of the tokens whose logits are recorded."""
    token_ids: Tensor
    """[m, w]: vocabulary entries that are recorded there."""
    logits: Tensor
    """[m, w]: with the clamp."""
    unclamped: Tensor
    """[m, w]: with the same weights and no clamp."""
    sensitivity: Tensor
    """[m, 1]: how far one rounding of every matrix and norm moved the token's logits at export.
    Whoever reads the file has another processor, and this tells what that explains."""

    @property
    def rounding(self) -> float:
        """The largest |Δlogit| that rounding explains."""
        return BAR * float(self.sensitivity.max())

    @property
    def telling(self) -> bool:
        """Whether the clamp does more to the logits than rounding."""
        return float((self.logits - self.unclamped).abs().max()) > self.rounding

    def save(self, folder: Path) -> Path:
        """Write them into a folder."""
        import numpy as np

        path = folder / WITNESSES
        np.savez(path, **{name: tensor.numpy() for name, tensor in vars(self).items()})
        return path

    @classmethod
    def load(cls, folder: Path) -> Witnesses:
        """Read a folder's.

        Raises:
            FolderError: the file is missing, damaged, of another layout, or leads beyond the model.
        """
        import torch

        path = folder / WITNESSES
        try:
            arrays = read_npz(file_in(folder, WITNESSES), CAPS[WITNESSES])
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        except (OSError, ValueError, TypeError) as error:
            raise FolderError(f"{path}: cannot be read ({error}); {AGAIN}") from error
        if set(tensors) != _LAYOUT:
            raise FolderError(
                f"{path}: holds {', '.join(sorted(tensors)) or 'nothing'}; expected "
                f"{', '.join(sorted(_LAYOUT))}; {AGAIN}"
            )
        witnesses = cls(**tensors)
        if not _fits(witnesses, _vocab_size(folder)):
            raise FolderError(
                f"{path}: its arrays do not fit each other or the model's vocabulary; expected "
                f"what `bakeout bake` wrote; {AGAIN}"
            )
        return witnesses


def _vocab_size(folder: Path) -> int:
    """Of the model; where config.json leaves it to its class, more than any model has."""
    path = folder / "config.json"
    config = read_json(path)
    if (wrong := wrong_field(config)) is not None:
        raise FolderError(f"{path}: {wrong}; {AGAIN}")
    return int({**config, **(config.get("text_config") or {})}.get("vocab_size") or 1 << 31)


def _fits(found: Witnesses, vocab: int) -> bool:
    """Whether the arrays are of the documented types and shapes, and lead nowhere outside."""
    import torch

    kinds = (torch.float32 if name in _LOGITS else torch.int64 for name in vars(found))
    tensors = vars(found).values()
    if any(t.dtype != kind or t.ndim != 2 for t, kind in zip(tensors, kinds, strict=True)):
        return False
    ids, mask, recorded = found.input_ids, found.attention_mask, found.logits.shape
    if ids.shape != mask.shape or found.places.shape != (recorded[0], 2):
        return False
    if not found.token_ids.shape == found.unclamped.shape == recorded or not recorded.numel():
        return False
    if found.sensitivity.shape != (recorded[0], 1) or not bool((found.sensitivity > 0).all()):
        return False
    rows, columns = found.places.unbind(-1)
    inside = all(
        bool(((values >= 0) & (values < end)).all())
        for values, end in (
            (ids, vocab),
            (mask, 2),
            (found.token_ids, vocab),
            (rows, ids.shape[0]),
            (columns, ids.shape[1]),
        )
    )
    return (
        inside
        and bool(mask[rows, columns].all())
        and bool(mask[:, -1].all() and (mask.diff(dim=1) >= 0).all())
        and bool(found.logits.isfinite().all() and found.unclamped.isfinite().all())
        and found.telling
    )
