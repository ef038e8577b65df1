"""How well an SAE fits a checkpoint: what it reconstructs of the activations at its hook point.

An SAE of another layer, model, place or scale has features all the same, and a clamp on them
changes something all the same: only its reconstruction tells that they are not this checkpoint's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from bake.base import BaseModel, find_base
from bake.clamp import SAESite, find_site
from bake.errors import DataError, ModelError, RanOutError, SAEError
from bake.questions.multiple_choice import load_texts
from bake.questions.prompts import bos_id
from bake.recipe import Recipe
from bake.sae.codes import agreement, decode, encode
from bake.sae.fit_figures import AGREEING, LEAST_AGREEMENT, LEAST_EXPLAINED, Fit
from bake.search.neutral_text import NEUTRAL_TEXT
from bake.sources import in_store
from bake.tensors import Array

WINDOW = 128
"""Tokens of one window, BOS included."""
FEWEST_TOKENS, MOST_TOKENS = 32, 508
"""On which it is measured, besides BOS."""
CODE_NUMBERS = 1 << 24
"""Most numbers of the codes of all tokens, the fewest tokens apart."""


def checked_fits(recipe: Recipe, *, unfit: bool = False) -> dict[int, Fit]:
    """Measure how every table's SAE fits the recipe's base.

    Args:
        recipe: whose own text is taken where it has a local one.
        unfit: do not refuse one that does not, nor a base that does not run.

    Returns:
        layer → figures, where there are some: a slice of an SAE reconstructs nothing, one of random
        directions belongs nowhere, and of a base without tokenizer there is no text.

    Raises:
        SAEError: one does not fit, or has a tensor that is missing or not finite.
        ModelError: the base does not run.
    """
    base = find_base(recipe)
    sites = [find_site(clamp, recipe, base) for clamp in recipe.clamp]
    sites = [
        site
        for site in sites
        if not site.files.is_slice and agreement(site.files, AGREEING) >= LEAST_AGREEMENT
    ]
    try:
        found = measure_fits(recipe, base, sites)
    except (ModelError, RanOutError):
        if not unfit:
            raise
        return {}
    for site in sites:
        if not unfit and site.layer in found and found[site.layer].unfit:
            fit = found[site.layer]
            more = "" if fit.elsewhere is None else ", and clearly more of nothing else"
            raise SAEError(
                f"SAE {site.name}: does not fit {base.name} at {site.hook_point}: {fit.said}; "
                f"expected at least {LEAST_EXPLAINED:g} of either{more}. It is of another layer, "
                "place, model or scale: "
                "take one of this checkpoint, or bake with --unfit"
            )
    return found


def measure_fits(recipe: Recipe, base: BaseModel, sites: list[SAESite]) -> dict[int, Fit]:
    """The figures of some SAEs by layer; none where the base has no tokenizer.

    Raises:
        SAEError: a tensor of an SAE is missing, or not finite.
        ModelError: the base does not run.
    """
    if not sites:
        return {}
    import torch

    from bake.search.layerwise import layer_outputs, table_rows
    from bake.stock import load_tokenizer

    widest = max(site.d_sae for site in sites)
    n_tokens = max(FEWEST_TOKENS, min(MOST_TOKENS, CODE_NUMBERS // widest))
    try:
        tokenizer = load_tokenizer(recipe)
        bos = bos_id(tokenizer)
    except ModelError:  # whoever needs text says so
        return {}
    most = table_rows(base)
    stream = (token for token in _tokens(recipe, tokenizer) if token < most)
    body = list(islice(stream, n_tokens))
    special = torch.tensor(sorted({bos, *tokenizer.all_special_ids}))
    rows = [body[i : i + WINDOW - 1] for i in range(0, len(body), WINDOW - 1)]
    rows = [row for row in rows if len(row) == WINDOW - 1] or rows[:1]
    ids = torch.tensor([[bos, *row] for row in rows])
    counted = ~torch.isin(ids, special)
    if bos >= most or not counted.any():
        return {}
    near = {layer for site in sites for layer in _near(site, base)}
    streams = layer_outputs(base, sorted(near), ids)
    first, found = counted & (torch.arange(len(ids)) == 0)[:, None], {}
    for site in sites:
        agreed = agreement(site.files, AGREEING)
        fit = fit_of(site, streams[site.layer][counted].numpy(), agreed)
        if fit.explains and fit.trained:
            some = {layer: streams[layer][first].numpy() for layer in _near(site, base)}
            fit = replace(fit, elsewhere=explained_elsewhere(site, some, agreed))
        found[site.layer] = fit
    return found


def _near(site: SAESite, base: BaseModel) -> range:
    """Its layer, and the ones before and after."""
    return range(max(0, site.layer - 1), min(base.n_layers, site.layer + 2))


def explained_elsewhere(site: SAESite, streams: Mapping[int, Array], agreed: float) -> str | None:
    """What of all near its hook point an SAE explains most, if that is clearly more.

    Args:
        site: the SAE.
        streams: layer → the same tokens' activations [tokens, d_in], its own layer's among them.
        agreed: of its encoder and decoder.
    """
    own = streams[site.layer]
    others = {f"layer {layer}'s output": x for layer, x in streams.items() if layer != site.layer}
    others |= {"its half": own * np.float32(0.5), "its double": own * np.float32(2)}
    here = fit_of(site, own, agreed)
    fits = {name: fit_of(site, x, agreed) for name, x in others.items()}
    above = {name: fit.standardised or 0.0 for name, fit in fits.items() if fit.clearly_above(here)}
    return max(above, key=lambda name: above[name]) if above else None


def fit_of(site: SAESite, x: Array, agreed: float) -> Fit:
    """The figures of an SAE on activations [tokens, d_in]; `agreed` is that of its two sides."""
    with np.errstate(over="ignore", invalid="ignore"):  # told by figures that are not finite
        acts = encode(site.files, x)
        error = x.astype(np.float64) - decode(site.files, acts)
        spread = x - x.mean(0, dtype=np.float64)
        errors, variances = (_sums(of) for of in (error, spread))
    fired = acts > 0
    return Fit.of(
        len(x),
        errors,
        variances,
        l0=float(fired.sum(1).mean()),
        dead=float((~fired.any(0)).mean()),
        agreement=agreed,
    )


def _sums(of: NDArray[np.float64]) -> list[float]:
    sums: list[float] = np.square(of).sum(0).tolist()
    return sums


def _tokens(recipe: Recipe, tokenizer: object) -> Iterator[int]:
    """Of the recipe's own local text, then of the neutral one."""
    verify, select = recipe.verify, recipe.select
    sources = [] if verify is None else [verify.text]
    sources += [] if select is None else [select.retain]
    texts: list[str] = []
    for source in sources:
        if source.path is not None and not in_store(source.path) and not texts:
            try:
                texts = [text.text for text in load_texts(source, recipe)]
            except DataError:  # said by whoever needs it
                continue
    for text in (*texts, NEUTRAL_TEXT):
        yield from tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
