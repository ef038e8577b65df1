"""A recipe's feature statistics: read from the cache, or taken and put there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from bake.base import BaseModel, find_base
from bake.clamp import SAESite, find_site
from bake.errors import RecipeError
from bake.files.locks import TakenError, folder_lock
from bake.questions.corpora import Windows, load_windows
from bake.recipe import Recipe, Select
from bake.sae.folding import load_encoder, sha256_of
from bake.scale.counting import counted_on, encoded_on, start_workers
from bake.scale.crew import Crew
from bake.scale.parts import Count, Part, count_parts
from bake.search.cache import SCHEMA, Entry, Unfinished, cache_folder, model_sha256
from bake.search.statistics import (
    CONTEXTS,
    Counter,
    FeatureSite,
    FeatureStatistics,
    check_memory,
    count_windows,
    finished,
)
from bake.stock import load_base, load_tokenizer

Progress = Callable[[str, float], None]
"""Called with what is being done, and the share of it that is done, 0 to 1."""
SIDES = ("forget", "retain")
LOOK_AGAIN_SECONDS = 1.0
"""How often another process that counts the same is looked after."""


@dataclass(frozen=True)
class SiteStatistics:
    """What the features of one table's SAE did on both corpora."""

    site: SAESite
    forget: FeatureStatistics
    retain: FeatureStatistics


@dataclass(frozen=True)
class Measured:
    """Everything that statistics were taken from, and the statistics."""

    sites: list[SiteStatistics]
    """One for each [[clamp]] table, in the recipe's order."""
    corpora: dict[str, Windows]
    """forget and retain."""
    material: Material


class Material:
    """A recipe's model and tokenizer, each loaded when it is first needed.

    Args:
        recipe: whose they are.
        device: of the model, as torch names it.
    """

    def __init__(self, recipe: Recipe, device: str = "cpu") -> None:
        self.recipe, self._device = recipe, device

    @cached_property
    def base(self) -> BaseModel:
        """The model as it lies on disk."""
        return find_base(self.recipe)

    @cached_property
    def model(self) -> Any:
        """The stock model in memory."""
        return load_base(self.recipe, self._device)

    @cached_property
    def tokenizer(self) -> Any:
        """The base model's."""
        return load_tokenizer(self.recipe)


def select_table(recipe: Recipe) -> Select:
    """The recipe's [select] table.

    Raises:
        RecipeError: it has none.
    """
    if recipe.select is None:
        raise RecipeError(
            "the recipe has no [select] table; expected one that names a forget and a retain corpus"
        )
    return recipe.select


def measure(
    recipe: Recipe,
    *,
    material: Material | None = None,
    cache: Path | None = None,
    crew: Crew | None = None,
    progress: Progress = lambda _what, _share: None,
) -> Measured:
    """Take the statistics of every table's SAE on both corpora, or read them.

    Args:
        recipe: with a [select] table.
        material: the recipe's, where it is loaded already.
        cache: folder for statistics; the user's cache folder by default.
        crew: workers that tokenise and count; without it, this process does. The windows of the
            corpora lie in files then.
        progress: told how far it is.

    Raises:
        BakeoutError: of the kind of trouble it meets.
    """
    select = select_table(recipe)
    material = material or Material(recipe)
    sites = [find_site(clamp, recipe, material.base) for clamp in recipe.clamp]
    cache = cache or cache_folder()
    if crew is None:
        for site in sites:
            check_memory(site.name, site.d_in, site.d_sae)
    else:
        start_workers(crew, recipe, material.base, sites)
    corpora = {
        side: load_windows(
            getattr(select, side),
            recipe,
            material.tokenizer,
            seq_len=select.seq_len,
            n_seqs=select.n_seqs,
            seed=select.seed,
            encode=None if crew is None else partial(encoded_on, crew),
            on_disk=None if crew is None else cache,
            progress=partial(progress, f"{side} texts"),
        )
        for side in SIDES
    }
    weights = model_sha256(material.base)
    found: dict[str, list[FeatureStatistics]] = {}
    for side, windows in corpora.items():
        entries = [_entry(cache, site, weights, recipe, material.base, windows) for site in sites]
        told = partial(progress, f"{side} corpus")
        found[side] = _read_or_take(sites, entries, windows, material, crew, told)
    both = zip(sites, found["forget"], found["retain"], strict=True)
    return Measured([SiteStatistics(*of_site) for of_site in both], corpora, material)


def _entry(
    cache: Path, site: SAESite, weights: str, recipe: Recipe, base: BaseModel, windows: Windows
) -> Entry:
    files = site.files
    read_as = f"{files.architecture} {files.apply_b_dec_to_input} {files.input_scale}"
    about = {
        "schema": SCHEMA,
        "model": weights,
        "dtype": recipe.base.dtype,
        "layer": site.layer,
        "sae": f"{sha256_of(files)} {read_as}",
        "corpus": windows.sha256,
        "contexts": CONTEXTS,
        "names": {  # for a person who looks into the cache
            "model": base.name,
            "revision": base.revision or "",
            "sae": site.name,
            "corpus": Path(windows.name).name,
        },
    }
    return Entry(cache, about)


def _read_or_take(
    sites: list[SAESite],
    entries: list[Entry],
    windows: Windows,
    material: Material,
    crew: Crew | None,
    progress: Callable[[float], None],
) -> list[FeatureStatistics]:
    """One pass over the corpus for all SAEs whose statistics are not there yet.

    Another process that counts the same is waited for.
    """
    while True:
        found = [entry.read() for entry in entries]
        absent = [i for i, known in enumerate(found) if known is None]
        if not absent:
            break
        unfinished = Unfinished.beside([entries[i] for i in absent])
        unfinished.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with folder_lock(unfinished.parts):
                if entries[absent[0]].read() is not None:
                    continue  # which has just ended
                if crew is None:
                    at = [sites[i] for i in absent]
                    count = _own_count(material.model, at, windows, progress)
                else:
                    which = {i: sha256_of(sites[i].files) for i in absent}
                    count = partial(counted_on, crew, which, entries[0].about["model"])
                n_features = sum(sites[i].d_sae for i in absent)
                state = count_parts(count, windows, n_features, unfinished, progress)
                for place, i in enumerate(absent):
                    found[i] = taken = finished(state, place, windows.n_tokens)
                    entries[i].write(taken)
                unfinished.remove()
                break
        except TakenError:
            time.sleep(LOOK_AGAIN_SECONDS)
    return [known for known in found if known is not None]


def _own_count(
    model: Any, sites: list[SAESite], windows: Windows, progress: Callable[[float], None]
) -> Count:
    """Counts in this process, and tells after every batch how far it is."""
    at = [FeatureSite(site.layer, load_encoder(site.files)) for site in sites]
    counters = [Counter(site, model) for site in at]

    def count(parts: Iterator[tuple[Windows, int]]) -> Iterator[Part]:
        for part, start in parts:

            def told(done: int, start: int = start) -> None:
                progress((start + done) / len(windows.ids))

            state = count_windows(model, counters, part, start, told)
            yield start, start + len(part.ids), state

    return count
