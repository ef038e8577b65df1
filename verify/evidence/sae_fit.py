"""Fit: do the SAEs belong to this checkpoint at all?

What the whole SAE reconstructs of the base's activations at its hook point, in float64. One of
another layer, model, place or scale has features too, and a clamp on them is exact too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from bake.errors import BakeoutError
from bake.questions.prompts import TEXT, Batch
from bake.sae.fit_figures import AGREEING, LEAST_EXPLAINED, TIED, UNMEASURED, Fit
from verify.compare.comparison import BASE
from verify.engines.runners import HookedRunner
from verify.report.findings import Failure, VerifyReport
from verify.work import Work

if TYPE_CHECKING:
    from torch import Tensor

    from verify.material import Material
    from verify.reference.whole_sae import Site

TOKENS = 2048
"""Of text, on which it is measured, about."""


@dataclass(frozen=True)
class SiteFit:
    """One SAE."""

    layer: int
    fit: Fit | None
    """None of a slice, which reconstructs nothing."""
    chosen: bool
    """The folder says that it was baked with --unfit."""


def gather(work: Work, report: VerifyReport) -> VerifyReport:
    """Add the figures of every SAE."""
    batches = shown_batches(work.hooked.material)
    name = f"fit {' '.join(batch.digest for batch in batches)}"
    found = work.journal.shared.once(name, lambda: _measured(work, batches))
    rows = [{**row, "chosen": row["layer"] in work.unfit} for row in found]
    return replace(report, more={**report.more, "fit": rows})


def failures(report: VerifyReport) -> Iterator[Failure]:
    """SAEs that do not fit, where nobody chose that."""
    for row in _rows(report):
        if row.fit is not None and row.fit.unfit and not row.chosen:
            shares = (row.fit.variance_explained, row.fit.standardised)
            measured = min(of for of in shares if of is not None) if None not in shares else None
            what = f"variance that the SAE at layer {row.layer} explains"
            yield Failure("fit", BASE, what, measured, LEAST_EXPLAINED)


def lines(report: VerifyReport) -> Iterator[str]:
    """Each SAE, in a line."""
    for row in _rows(report):
        said = UNMEASURED
        if row.fit is not None:
            said = row.fit.as_baked if row.chosen else row.fit.said
        yield f"fit        layer {row.layer}: {said}"


def shown_batches(material: Material) -> list[Batch]:
    """The first of the text."""
    windows, left = [], TOKENS
    for window in material.windows:
        if window.form == TEXT and left > 0:
            windows.append(window)
            left -= len(window.ids)
    return list(material.batches(windows))


def _measured(work: Work, batches: Sequence[Batch]) -> list[dict[str, Any]]:
    hooked = work.hooked
    special = hooked.material.tokenizer.all_special_ids
    found = measured_fits(hooked.model, hooked.sites, batches, special)
    return [
        {"layer": layer, "fit": None if fit is None else vars(fit)} for layer, fit in found.items()
    ]


def measured_fits(
    model: Any, sites: Sequence[Site], batches: Sequence[Batch], special_ids: Sequence[int]
) -> dict[int, Fit | None]:
    """The figures of every SAE, by layer.

    Args:
        model: the stock base.
        sites: the recipe's clamps.
        batches: of text.
        special_ids: tokens that are not counted, BOS among them.
    """
    import torch

    from verify.reference.oracle import Edited, Oracle

    sums = {site.layer: Sums(site) for site in sites if site.reconstructs}
    counted = torch.empty(0)

    def add(h: Tensor, site: Site, exempt: Tensor) -> Edited:
        if site.layer in sums:
            sums[site.layer].add(h[counted.to(h.device)])
        return Edited(h, exempt & False, h.new_zeros(*exempt.shape, len(site.features)).bool())

    runner = HookedRunner("fit", model, Oracle(model, sites, add))
    special = torch.tensor(special_ids)
    for batch in batches:
        counted = batch.attention_mask.bool() & ~torch.isin(batch.input_ids, special)
        runner.logits(batch.input_ids, batch.attention_mask)
    return {site.layer: sums[site.layer].fit() if site.layer in sums else None for site in sites}


class Sums:
    """What is added up over tokens, of one SAE."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.n = 0
        self.error: Any = 0.0
        self.total: Any = 0.0
        self.squares: Any = 0.0
        self.fired: Any = 0

    def add(self, h: Tensor) -> None:
        """Take in [tokens, d_in]."""
        import torch

        from verify.reference.oracle import CODE_BYTES

        sae = self.site.sae
        for x in torch.split(h.double(), max(1, CODE_BYTES // (8 * sae.cfg.d_sae))):
            acts = sae.encode(x)
            self.error = self.error + (x - sae.decode(acts)).square().sum(0)
            self.total, self.squares = self.total + x.sum(0), self.squares + x.square().sum(0)
            self.fired = self.fired + (acts > 0).sum(0)
            self.n += len(x)

    def fit(self) -> Fit | None:
        """The figures; none where there was no token."""
        if not self.n:
            return None
        spread = (self.squares - self.total.square() / self.n).clamp(min=0)
        return Fit.of(
            self.n,
            self.error.tolist(),
            spread.tolist(),
            l0=float(self.fired.sum()) / self.n,
            dead=float((self.fired == 0).double().mean()),
            agreement=self._agreement(),
        )

    def _agreement(self) -> float:
        """The mean cosine of encoder columns and decoder rows, in what random ones vary by."""
        import torch

        sae, d_sae = self.site.sae, int(self.site.sae.cfg.d_sae)
        some = torch.unique(torch.linspace(0, d_sae - 1, min(AGREEING, d_sae)).long())
        cosines = torch.cosine_similarity(sae.W_enc.T[some], sae.W_dec[some], dim=1)
        if float(cosines.median()) > TIED:
            return 0.0
        return float(cosines.mean() * math.sqrt(len(some) * sae.cfg.d_in))


def _rows(report: VerifyReport) -> list[SiteFit]:
    """What was found, which may come from a file."""
    try:
        return TypeAdapter(list[SiteFit]).validate_python(report.more.get("fit", []))
    except ValidationError as error:
        first = error.errors()[0]
        raise BakeoutError(
            f"report: fit.{'.'.join(map(str, first['loc']))}: {first['msg']}; write "
            "it again with `bakeout verify FOLDER --recipe RECIPE --json FILE`"
        ) from error
