"""Self-contained HTML pages: a recipe's features, and a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bake.errors import DataError
from bake.new_folder import write_whole
from bake.questions.corpora import Windows
from bake.reading.capped import read_json
from bake.recipe import Recipe
from bake.sae.layouts import neuronpedia_id
from bake.scale.cluster import cluster
from bake.search.corpus_statistics import Material, Measured, SiteStatistics, measure
from bake.search.select import Chosen
from bake.search.selection import Selection, selected_recipe
from bake.search.statistics import CONTEXTS
from bakeout.pages.charts import (
    Scatter,
    activation_histogram,
    share_scatter,
    sweep_scatter,
)
from bakeout.pages.selection_view import check_new_file
from bakeout.terminal import progress
from verify.page.histograms import HistogramPlot
from verify.page.html import environment, shown

AROUND = 18
"""Tokens shown on either side of the one that activates."""
NEURONPEDIA = "https://www.neuronpedia.org"


@dataclass(frozen=True)
class Context:
    """A piece of a corpus around the token on which a feature is strongest."""

    side: str
    """forget | retain."""
    value: float
    before: str
    token: str
    after: str


@dataclass(frozen=True)
class Card:
    """One selected feature."""

    feature: int
    why: Chosen | None
    """None where the recipe itself names it."""
    forget_share: float
    retain_share: float
    contexts: list[Context]
    """From both corpora, strongest first."""
    from_forget: int
    """How many of them are from the forget corpus."""
    histogram: HistogramPlot
    link: str | None


@dataclass(frozen=True)
class SiteView:
    """One [[clamp]] table."""

    name: str
    hook_point: str
    method: str
    trigger: float
    d_sae: int
    forget_tokens: int
    retain_tokens: int
    scatter: Scatter
    cards: list[Card]


def features_page(
    file: Path,
    html: Path,
    sweep: Path | None,
    ray: str | None,
    device: str,
    dtype: str | None,
    *,
    force: bool,
) -> None:
    """`bakeout features --html`: statistics, selection, page.

    Args:
        file: the recipe.
        html: the page.
        sweep: folder of a sweep that is shown too.
        ray: of the cluster that counts, as `cluster` takes it.
        device: as torch names it, where the model runs.
        dtype: in which it runs; what the recipe says by default.
        force: replace `html`.

    Raises:
        BakeoutError: of the kind of trouble it meets.
    """
    recipe = Recipe.load(file)
    check_new_file(recipe, html, force=force, option="--html")
    report = None if sweep is None else _sweep_report(sweep)
    with progress("features") as advance:
        with cluster(ray) as crew:
            material = Material(recipe, device, dtype)
            measured = measure(recipe, material=material, crew=crew, progress=advance)
        selected, selections = selected_recipe(recipe, measured=measured, progress=advance)
    views = site_views(selected, measured, selections)
    text = _render(
        title=f"Features of {measured.material.base.name}",
        sites=views,
        sweep=None if report is None else sweep_scatter(report),
        report=report,
    )
    write_whole(html, text, option=f"--html {html}")


def sweep_page(report: dict[str, Any]) -> str:
    """The page of a sweep: its Pareto plot and what the best point does on the test split."""
    return _render(title="Sweep", sites=[], sweep=sweep_scatter(report), report=report)


def site_views(
    recipe: Recipe, measured: Measured, selections: Sequence[Selection]
) -> list[SiteView]:
    """What the page shows of each table.

    Args:
        recipe: with feature numbers.
        measured: its statistics.
        selections: of the tables that were selected for.
    """
    why = {
        (selection.hook_point, chosen.feature): chosen
        for selection in selections
        for chosen in selection.chosen
    }
    views = []
    for clamp, statistics in zip(recipe.clamp, measured.sites, strict=True):
        assert isinstance(clamp.features, list)
        site = statistics.site
        stated = neuronpedia_id(clamp.sae, recipe)
        cards = [
            _card(
                feature,
                statistics,
                measured,
                why.get((site.hook_point, feature)),
                clamp.trigger,
                None if stated is None else f"{NEURONPEDIA}/{stated}/{feature}",
            )
            for feature in clamp.features
        ]
        views.append(
            SiteView(
                name=site.name,
                hook_point=site.hook_point,
                method=clamp.method,
                trigger=clamp.trigger,
                d_sae=site.d_sae,
                forget_tokens=statistics.forget.n_tokens,
                retain_tokens=statistics.retain.n_tokens,
                scatter=share_scatter(statistics.forget, statistics.retain, clamp.features),
                cards=cards,
            )
        )
    return views


def _card(
    feature: int,
    statistics: SiteStatistics,
    measured: Measured,
    why: Chosen | None,
    trigger: float,
    link: str | None,
) -> Card:
    if feature >= statistics.site.d_sae:
        raise DataError(
            f"SAE {statistics.site.name}: feature {feature} is out of range; "
            f"expected 0 to {statistics.site.d_sae - 1}"
        )
    contexts = top_contexts(feature, statistics, measured)
    return Card(
        feature=feature,
        why=why,
        forget_share=float(statistics.forget.share[feature]),
        retain_share=float(statistics.retain.share[feature]),
        contexts=contexts,
        from_forget=sum(context.side == "forget" for context in contexts),
        histogram=activation_histogram(statistics.forget, statistics.retain, feature, trigger),
        link=link,
    )


def top_contexts(feature: int, statistics: SiteStatistics, measured: Measured) -> list[Context]:
    """The strongest places of a feature in both corpora, at most `CONTEXTS`, one per window."""
    places = [
        (float(value), side, int(place))
        for side in ("forget", "retain")
        for value, place in zip(
            getattr(statistics, side).top_values[:, feature],
            getattr(statistics, side).top_places[:, feature],
            strict=True,
        )
        if place >= 0
    ]
    places.sort(key=lambda one: -one[0])
    tokenizer = measured.material.tokenizer
    return [
        Context(side, value, *_around(measured.corpora[side], place, tokenizer))
        for value, side, place in places[:CONTEXTS]
    ]


def _around(windows: Windows, place: int, tokenizer: Any) -> tuple[str, str, str]:
    """(text before, the token, text after) of a place in a corpus."""
    window, position = divmod(place, windows.ids.shape[1])
    ids = windows.ids[window].tolist()
    start, end = max(1, position - AROUND), position + 1 + AROUND

    def text(until: int) -> str:
        return str(tokenizer.decode(ids[start:until], clean_up_tokenization_spaces=False))

    before, upto, whole = text(position), text(position + 1), text(end)
    return (
        _shown(before),
        _shown(upto[len(before) :]) or "·",
        _shown(whole[len(upto) :]),
    )


def _shown(text: str) -> str:
    """Text of a corpus on one line; line ends show."""
    return shown(text.replace("\n", "⏎"))


def _sweep_report(folder: Path) -> dict[str, Any]:
    path = folder / "report.json"
    try:
        report: dict[str, Any] = read_json(path)
        sweep_scatter(report)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"--sweep {folder}: has no readable report.json; expected a finished sweep's folder"
        ) from error
    return report


def _render(**contents: Any) -> str:
    return environment("bakeout.pages").get_template("page.html.j2").render(**contents)
