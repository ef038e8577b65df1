"""Witnesses: does an engine say what the exporter's said, and does the clamp act in it?

They need neither the base model nor the SAE: the folder brings a few prompts that fire the clamp,
and the logits that were seen at export, with the clamp and without it.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

from bake.errors import FolderError
from verify.engines import Engines
from verify.onnx_files import EXACT
from verify.report import EngineReport, Failure, VerifyReport, Witnessed
from verify.runners import Runner

if TYPE_CHECKING:
    from torch import Tensor

FILE = "witnesses.npz"
MAX_ABS_LOGIT = 1e-3
"""Bar for an engine that has the checkpoint's own weights, in float32; it allows for another
machine's arithmetic."""
MIN_EFFECT = 0.5
"""Bar for one with rounded weights: how much of the clamp's effect it shows, 1 being all of it."""
_LOGITS = {"logits", "unclamped"}
_LAYOUT = {"input_ids", "attention_mask", "places", "token_ids", *_LOGITS}


@dataclass(frozen=True)
class Witnesses:
    """`witnesses.npz`."""

    input_ids: Tensor
    """[n, seq], padded on the left."""
    attention_mask: Tensor
    """[n, seq]."""
    places: Tensor
    """[m, 2]: row and column of the tokens whose logits are recorded."""
    token_ids: Tensor
    """[m, w]: vocabulary entries that are recorded there."""
    logits: Tensor
    """[m, w] float32."""
    unclamped: Tensor
    """[m, w] float32."""

    def seen(self, runner: Runner) -> Tensor:
        """What an engine says at the recorded places: [m, w]."""
        logits = runner.logits(self.input_ids, self.attention_mask, last_only=False)
        rows, columns = self.places.unbind(-1)
        return logits[rows, columns].gather(-1, self.token_ids)


def load_witnesses(folder: Path) -> Witnesses | None:
    """A folder's witnesses, or None where it has none.

    Raises:
        FolderError: the file is damaged, or of another layout.
    """
    import numpy as np
    import torch

    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with np.load(path) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays}
    except (OSError, EOFError, ValueError, TypeError, BadZipFile, zlib.error) as error:
        raise FolderError(f"{path}: cannot be read ({error}); download it again") from error
    if set(tensors) != _LAYOUT:
        raise FolderError(
            f"{path}: holds {', '.join(sorted(tensors)) or 'nothing'}; expected "
            f"{', '.join(sorted(_LAYOUT))}"
        )
    witnesses = Witnesses(**tensors)
    if not _fits(witnesses, _vocab_size(folder)):
        raise FolderError(
            f"{path}: its arrays do not fit each other or the model's vocabulary; expected what "
            "`bakeout bake` wrote. Download it again"
        )
    return witnesses


def _vocab_size(folder: Path) -> int:
    """Of the model; where config.json leaves it to its class, more than any model has."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FolderError(f"{path}: cannot be read ({error}); download it again") from error
    return int({**config, **(config.get("text_config") or {})}.get("vocab_size", 1 << 31))


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
        and bool(found.logits.isfinite().all() and found.unclamped.isfinite().all())
        and not torch.equal(found.logits, found.unclamped)
    )


def with_witnesses(report: VerifyReport, witnesses: Witnesses, engines: Engines) -> VerifyReport:
    """A report, and what every engine of the folder says to the witnesses, one after another, in
    float32.
    """
    found: dict[str, Witnessed] = {}
    if engines.torch is not None:
        engines.torch.load("float32", device=engines.device, threads=engines.threads)
        found[engines.torch.name] = _compare(witnesses, witnesses.seen(engines.torch))
    for graph in engines.graphs:
        with engines.open(graph) as runner:
            seen = witnesses.seen(runner)
        if graph.name == EXACT or report.carrier == "compiled":
            found[graph.name] = _compare(witnesses, seen)
            continue
        with engines.open(graph, clamped=False) as runner:
            found[graph.name] = _compare(witnesses, seen, witnesses.seen(runner))
    failures = [
        failure
        for name, measured in found.items()
        for failure in _failures(
            name, measured, exact=report.exact and name in (EXACT, "checkpoint")
        )
    ]
    return replace(
        report,
        engines=tuple(EngineReport(name, witnessed=seen) for name, seen in found.items()),
        failures=(*report.failures, *failures),
    )


def _compare(witnesses: Witnesses, seen: Tensor, unclamped: Tensor | None = None) -> Witnessed:
    """Distance to what was seen at export, and the share of the clamp's effect that is shown:
    the engine's effect projected on the true one. Rounding moves both sides of an effect alike,
    so an engine with rounded weights is measured against itself without the clamp.
    """
    true = (witnesses.logits - witnesses.unclamped).double()
    effect = (seen - (witnesses.unclamped if unclamped is None else unclamped)).double()
    return Witnessed(
        tokens=len(witnesses.places),
        max_abs_logit=float((seen - witnesses.logits).abs().max().nan_to_num(float("inf"))),
        effect=float((effect * true).sum() / (true * true).sum()),
    )


def _failures(name: str, measured: Witnessed, *, exact: bool) -> list[Failure]:
    failures = []
    if exact and not measured.max_abs_logit <= MAX_ABS_LOGIT:
        what = "max_abs_logit"
        failures.append(Failure("witnesses", name, what, measured.max_abs_logit, MAX_ABS_LOGIT))
    if not measured.effect >= MIN_EFFECT:
        what = "share of the clamp's effect"
        failures.append(Failure("witnesses", name, what, measured.effect, MIN_EFFECT))
    return failures
