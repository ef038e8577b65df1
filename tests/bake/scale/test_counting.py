"""Counting on workers against the single process: any partition, order, death and kill."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bake.clamp import find_site
from bake.errors import ScaleError
from bake.questions.corpora import OnDisk, Windows
from bake.recipe import Recipe
from bake.sae.folding import load_encoder, sha256_of
from bake.scale.counting import FeatureWorker, tokenizer_sha256
from bake.scale.parts import merged
from bake.search.cache import model_sha256
from bake.search.corpus_statistics import Material, Measured, measure
from bake.search.statistics import CONTEXTS, Counter, FeatureSite, count_windows, finished
from tests.bake.scale.counted import BATCH, SEQ, InProcess, assert_all_same, assert_same, statistics
from tests.worlds import KINDS, save_sae_lens, tiny_base, tiny_sae, tiny_tokenizer


def plain_recipe(folder: Path) -> Recipe:
    table = {"sae": {"path": "sae"}, "method": "zero", "features": [0]}
    data = {"schema": 1, "base": {"model": "base"}, "clamp": [table]}
    return Recipe.parse(data, name="test", folder=folder)


def test_parts_merged_in_any_order_are_what_plain_sums_and_sorting_give(tmp_path: Path) -> None:
    recipe = plain_recipe(tmp_path)
    tiny_base(tmp_path / "base")
    save_sae_lens(tmp_path / "sae", tiny_sae())
    material = Material(recipe)
    site = find_site(recipe.clamp[0], recipe, material.base)
    counter = Counter(FeatureSite(site.layer, load_encoder(site.files)), material.model)
    ids = np.random.default_rng(0).integers(3, 95, (60, SEQ)).astype(np.int32)
    ids[30:] = ids[:30]  # every activation comes twice: the earlier place counts
    windows = Windows("twice", ids, (0, 1, 2), 60)
    single = [
        count_windows(material.model, [counter], windows.part(i, i + 1), i) for i in range(60)
    ]
    values, places = (
        np.stack([state[f"0.top_{what}"][0].numpy() for state in single])
        for what in ("values", "places")
    )
    order = np.lexsort((places, -values), axis=0)[:CONTEXTS]
    for seed in range(4):
        rng, states = random.Random(seed), list(single)
        while len(states) > 1:  # in any shape of tree
            one, other = (states.pop(rng.randrange(len(states))) for _ in range(2))
            states.append(merged(one, other))
        found = finished(states[0], 0, windows.n_tokens)
        assert np.array_equal(found.top_values, np.take_along_axis(values, order, 0))
        assert np.array_equal(found.top_places, np.take_along_axis(places, order, 0))
        for name in ("fired", "near", "histogram"):
            expected = sum(state[f"0.{name}"].numpy() for state in single)
            assert np.array_equal(getattr(found, name), expected), name
        for name in ("total", "squares"):
            exact = [math.fsum(of) for of in np.stack([s[f"0.{name}"] for s in single]).T]
            np.testing.assert_allclose(getattr(found, name), exact, rtol=1e-12)
        assert found.fired.any() and (found.top_places < 30 * SEQ).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_counts_as_the_single_process_with_the_layers_it_needs(
    tmp_path: Path, kind: str
) -> None:
    recipe = plain_recipe(tmp_path)
    tiny_base(tmp_path / "base", kind)
    save_sae_lens(tmp_path / "sae", tiny_sae(), layer=1)
    material = Material(recipe)
    site = find_site(recipe.clamp[0], recipe, material.base)
    ids = np.random.default_rng(0).integers(3, 90, (9, SEQ)).astype(np.int32)
    windows = Windows("w", ids, (0, 1, 2), 9)
    encoder = FeatureSite(site.layer, load_encoder(site.files))
    (whole,) = statistics(material.model, [encoder], windows)
    worker = FeatureWorker(recipe, tokenizer_sha256(material.base))
    which = {0: sha256_of(site.files)}
    for _ in range(2):  # the second time with what the first one loaded
        start, stop, state = worker.count(which, model_sha256(material.base), windows, 0)
        assert (start, stop) == (0, 9)
        tensors = {name: torch.from_numpy(array) for name, array in state.items()}
        assert_same(whole, finished(tensors, 0, windows.n_tokens))
    with pytest.raises(ScaleError, match=r"base: is another one on .*Copy them there"):
        FeatureWorker(recipe, "").count(which, "0" * 64, windows, 0)
    with pytest.raises(ScaleError, match="sae: is another one on "):
        FeatureWorker(recipe, "").count({0: "0" * 64}, model_sha256(material.base), windows, 0)


def test_a_worker_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    recipe = plain_recipe(tmp_path)
    tiny_tokenizer(tiny_base(tmp_path / "base"))
    there = tokenizer_sha256(Material(recipe).base)
    ids, lengths = FeatureWorker(recipe, there).encode(["one two", "three"])
    assert len(lengths) == 2 and len(ids) == sum(lengths) > 2
    with (tmp_path / "base" / "tokenizer.json").open("a") as file:
        file.write("\n")
    with pytest.raises(ScaleError, match="base's tokenizer: is another one on "):
        FeatureWorker(recipe, there).encode(["one two"])


def test_windows_in_a_file_are_those_in_memory(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 90, (50, 7)).astype(np.int32)
    file = OnDisk(iter(ids), tmp_path / "new")
    assert file.shape == ids.shape and len(file) == 50
    for part in (slice(0, 50), slice(10, 13), slice(48, 60), slice(50, 60)):
        assert np.array_equal(file[part], ids[part])
    assert np.array_equal(file[49], ids[49])
    one, other = (Windows("w", of, (0, 1), 3) for of in (ids, file))
    assert one.sha256 == other.sha256 and one.n_tokens == other.n_tokens
    del file, other
    assert not list((tmp_path / "new").iterdir())


def test_the_driver_stopped_at_each_tenth_counts_nothing_twice(
    counted_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, cache = Recipe.load(counted_recipe), tmp_path / "cache"
    whole = measure(recipe, cache=tmp_path / "single")
    n_parts = sum(-(-len(whole.corpora[side].ids) // BATCH) for side in whole.corpora)
    assert n_parts >= 30
    monkeypatch.setattr("bake.search.cache.SAVING_SHARE", 0.0)  # the parts themselves carry it
    counted: list[int] = []
    found, runs = None, 0
    while found is None:
        crew: Any = InProcess(ahead=5, stop_after=n_parts // 10)
        try:
            found = measure(recipe, cache=cache, crew=crew)
        except KeyboardInterrupt:
            runs += 1
        counted += crew.counted
    assert runs >= 9
    assert len(counted) == n_parts
    assert_all_same(whole, found)
    left = [path.name for path in (cache / "statistics").rglob("*") if path.is_file()]
    assert sorted(left) == sorted(4 * ["about.json", "contexts.safetensors", "statistics.parquet"])


def test_merged_parts_go_as_soon_as_their_state_is_on_disk(
    counted_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bake.search.cache.SAVING_SHARE", 1e9)
    recipe, cache = Recipe.load(counted_recipe), tmp_path / "cache"
    most = 0

    def look(_what: str, _share: float) -> None:
        nonlocal most
        most = max(most, len(list(cache.rglob("*-*.safetensors"))))

    crew: Any = InProcess(ahead=4)
    found = measure(recipe, cache=cache, crew=crew, progress=look)
    assert 1 <= most <= 4
    assert_all_same(measure(recipe, cache=tmp_path / "single"), found)


def test_a_single_run_goes_on_where_a_crew_was_and_the_other_way_round(
    counted_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bake.search.cache.SAVING_SHARE", 1e9)
    recipe, cache = Recipe.load(counted_recipe), tmp_path / "cache"
    whole = measure(recipe, cache=tmp_path / "single")

    ran: list[float] = []

    def stop(what: str, share: float) -> None:
        if what == "forget corpus":
            ran.append(share)
            if share > 0.6:
                raise KeyboardInterrupt

    crew: Any = InProcess(stop_after=5)
    with pytest.raises(KeyboardInterrupt):
        measure(recipe, cache=cache, crew=crew)
    with pytest.raises(KeyboardInterrupt):
        measure(recipe, cache=cache, progress=stop)
    n_windows = len(whole.corpora["forget"].ids)
    assert ran[0] == pytest.approx(6 * BATCH / n_windows)
    crew = InProcess()
    assert_all_same(whole, measure(recipe, cache=cache, crew=crew))
    assert crew.counted[0] == round(ran[-2] * n_windows)  # the last one was not whole


def test_a_damaged_part_is_counted_anew(
    counted_recipe: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("bake.search.cache.SAVING_SHARE", 0.0)
    recipe, cache = Recipe.load(counted_recipe), tmp_path / "cache"
    crew: Any = InProcess(stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        measure(recipe, cache=cache, crew=crew)
    part = max(cache.rglob(f"{2 * BATCH}-*.safetensors"))
    part.write_bytes(part.read_bytes()[:200])
    crew = InProcess()
    found = measure(recipe, cache=cache, crew=crew)
    assert crew.counted[0] == 2 * BATCH
    assert_all_same(measure(recipe, cache=tmp_path / "single"), found)


def test_who_counts_the_same_at_the_same_time_waits_and_reads(
    counted_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bake.search.corpus_statistics.LOOK_AGAIN_SECONDS", 0.01)
    recipe, cache = Recipe.load(counted_recipe), tmp_path / "cache"
    recipe = recipe.with_clamps(recipe.clamp[:1])
    ran: list[str] = []
    begun = threading.Event()
    found: list[Measured] = []

    def second() -> None:
        def told(what: str, _share: float) -> None:
            ran.append(what)
            if what == "retain texts":  # it counts next
                begun.set()

        found.append(measure(recipe, cache=cache, progress=told))

    other = threading.Thread(target=second)

    def told(what: str, _share: float) -> None:
        if what == "forget corpus" and other.ident is None:
            other.start()
            assert begun.wait(60)
            time.sleep(0.2)

    crew: Any = InProcess()
    first = measure(recipe, cache=cache, crew=crew, progress=told)
    other.join()
    assert "forget corpus" not in ran
    assert_all_same(first, found[0])


def test_ray_is_neither_needed_nor_imported_where_it_is_not_asked_for(
    counted_recipe: Path, tmp_path: Path
) -> None:
    code = (
        "import sys\n"
        "from bakeout.cli import run\n"
        "assert run(['select', sys.argv[1]]) == 0\n"
        "assert 'ray' not in sys.modules\n"
        "sys.modules['ray'] = None\n"  # as where it is not installed
        "assert run(['select', sys.argv[1], '--ray']) == 2\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(counted_recipe)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"BAKEOUT_CACHE": str(tmp_path / "cache")},
    )
    said = "error: --ray: Ray is not here; pip install 'bakeout[scale]'\n"
    assert (done.returncode, done.stderr) == (0, said)
