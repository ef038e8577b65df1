"""Fit: do the SAEs belong to this checkpoint at all?

What the whole SAE reconstructs of the base's activations at its hook point, in float64, and of what
lies nearby: the layers before and after, its own input halved and doubled. One of another layer,
model, place or scale has features too, and a clamp on them is exact too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from bake.errors import BakeoutError
from bake.files.halving import in_halves, joined
from bake.questions.prompts import TEXT, Batch
from bake.sae.fit_figures import AGREEING, CLEARLY_MORE, LEAST_EXPLAINED, TIED, UNMEASURED, Fit
from verify.compare.comparison import BASE
from verify.engines.forward import run
from verify.report.findings import Failure, VerifyReport
from verify.work import Work

if TYPE_CHECKING:
    from torch import Tensor

    from verify.material import Material
    from verify.reference.whole_sae import Site

TOKENS, NEARBY_TOKENS = 2048, 256
"""Of text, on which it is measured, about; and on which it is compared with what lies nearby."""


@dataclass(frozen=True)
class SiteFit:
    """One SAE."""

    layer: int
    fit: Fit | None
    """None of a slice, which reconstructs nothing."""


def gather(work: Work, report: VerifyReport) -> VerifyReport:
    """Add the figures of every SAE."""
    batches = shown_batches(work.hooked.material)
    name = f"fit here and nearby {' '.join(batch.digest for batch in batches)}"
    found = work.journal.shared.once(name, lambda: _measured(work, batches))
    return replace(report, more={**report.more, "fit": found})


def failures(report: VerifyReport) -> Iterator[Failure]:
    """SAEs that do not fit, whatever the folder says of them."""
    for row in _rows(report):
        if (fit := row.fit) is None or not fit.unfit:
            continue
        shares = (fit.variance_explained, fit.standardised)
        measured = min(of for of in shares if of is not None) if None not in shares else None
        bar: float | str = LEAST_EXPLAINED
        if fit.explains:
            bar = f"that of {fit.elsewhere} to be at most {CLEARLY_MORE:g} more"
        what = f"variance that the SAE at layer {row.layer} explains"
        yield Failure("fit", BASE, what, measured, bar)


def lines(report: VerifyReport) -> Iterator[str]:
    """Each SAE, in a line."""
    for row in _rows(report):
        said = UNMEASURED if row.fit is None else row.fit.said
        unfit = row.fit is not None and row.fit.unfit
        yield f"fit        layer {row.layer}: {said}{': it does not fit' if unfit else ''}"


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
    """The figures of every SAE, by layer; of one that explains what it reads, also what it explains
    clearly more of, if anything nearby.

    Args:
        model: the stock base.
        sites: the recipe's clamps.
        batches: of text.
        special_ids: tokens that are not counted, BOS among them.
    """
    import torch

    from bake.stock import decoder_layers

    n_layers = len(decoder_layers(model))
    near = {
        site.layer: range(max(0, site.layer - 1), min(n_layers, site.layer + 2))
        for site in sites
        if site.reconstructs
    }
    sums = {site.layer: Sums(site) for site in sites if site.layer in near}
    first: dict[int, Tensor] = {}
    for given in _given(
        model, {of for around in near.values() for of in around}, batches, special_ids
    ):
        for layer, of in sums.items():
            of.add(given[layer])
        for layer, h in given.items():
            so_far = first.get(layer, h[:0])
            first[layer] = torch.cat([so_far, h[: NEARBY_TOKENS - len(so_far)]])
    found: dict[int, Fit | None] = {site.layer: None for site in sites}
    for layer, of in sums.items():
        fit = found[layer] = of.fit()
        if fit is not None and fit.explains and fit.trained:
            around = {other: first[other] for other in near[layer]}
            found[layer] = replace(fit, elsewhere=_elsewhere(of.site, around))
    return found


def _given(
    model: Any, layers: Collection[int], batches: Sequence[Batch], special_ids: Sequence[int]
) -> Iterator[dict[int, Tensor]]:
    """What some layers give for the counted tokens of each batch: [tokens, d_in] by layer."""
    import torch

    from bake.stock import decoder_layers

    given: dict[int, Tensor] = {}
    counted = special = torch.tensor(special_ids)

    def keep(layer: int, output: Any) -> None:
        h = output[0] if isinstance(output, tuple) else output
        given[layer] = h[counted.to(h.device)]

    def read(batch: Batch, rows: slice) -> dict[int, Tensor]:
        nonlocal counted
        ids, mask = batch.input_ids[rows], batch.attention_mask[rows]
        counted = mask.bool() & ~torch.isin(ids, special)
        run(model, ids, mask)
        return dict(given)

    with ExitStack() as hooks:
        for layer in layers:
            hook = decoder_layers(model)[layer].register_forward_hook(
                lambda _, __, output, layer=layer: keep(layer, output)
            )
            hooks.callback(hook.remove)
        for batch in batches:
            shape = batch.input_ids.shape
            yield joined(in_halves(model, "reading prompts", partial(read, batch), *shape))


def _elsewhere(site: Site, near: Mapping[int, Tensor]) -> str | None:
    """What of all nearby an SAE explains most, if that is clearly more than of what it reads.

    Args:
        site: the SAE.
        near: by layer, the same tokens' activations [tokens, d_in], its own layer's among them.
    """
    own = near[site.layer]
    places = {f"layer {layer}'s output": h for layer, h in near.items() if layer != site.layer}
    places |= {"its half": own * 0.5, "its double": own * 2.0}

    def explained(h: Tensor) -> Fit:
        sums = Sums(site)
        sums.add(h)
        fit = sums.fit()
        assert fit is not None  # there were tokens
        return fit

    here, there = explained(own), {name: explained(h) for name, h in places.items()}
    above = {
        name: fit.standardised or 0.0 for name, fit in there.items() if fit.clearly_above(here)
    }
    return max(above, key=lambda name: above[name]) if above else None


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
