"""A sweep on workers against the single process: any order, an interruption, other files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bake.base import find_base
from bake.clamp import find_site
from bake.errors import ScaleError
from bake.questions.multiple_choice import load_texts
from bake.recipe import Recipe
from bake.sae.folding import sha256_of
from bake.scale.measuring import SettingWorker
from bake.search.asking_bench import Asked
from bake.search.cache import model_sha256
from bake.search.selection import split_questions
from bake.search.study import Study
from bake.search.sweep import run_sweep
from bakeout.pages.sweep_view import sweep_dict
from tests.bake.scale.counted import InProcess
from tests.bake.swept import AXES, without_times


def test_a_crew_that_is_interrupted_goes_on_to_the_single_process_report(
    swept_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.load(swept_recipe)
    single = run_sweep(recipe, AXES, tmp_path / "single")
    told: list[int] = []
    real_tell = Study.tell

    def counted(self: Study, trial: Any, *found: Any) -> None:
        told.append(trial.number)
        real_tell(self, trial, *found)

    monkeypatch.setattr(Study, "tell", counted)
    for _ in range(2):
        crew: Any = InProcess(ahead=2, stop_after=3, method="measure")
        with pytest.raises(KeyboardInterrupt):
            run_sweep(recipe, AXES, tmp_path / "crew", crew=crew)
    crew = InProcess(ahead=3)
    found = run_sweep(recipe, AXES, tmp_path / "crew", crew=crew)
    assert single is not None and found is not None
    assert len(told) == 8  # nothing twice
    assert without_times(sweep_dict(single)) == without_times(sweep_dict(found))


def test_a_worker_with_other_files_is_refused(swept_recipe: Path) -> None:
    recipe = Recipe.load(swept_recipe)
    assert recipe.verify is not None
    base = find_base(recipe)
    split, texts = split_questions(recipe), load_texts(recipe.verify.text, recipe)
    asked = Asked(split, "chat", texts)
    clamp = recipe.clamp[0].model_copy(update={"features": [1, 2]})
    named = recipe.with_clamps([clamp])
    saes = [sha256_of(find_site(clamp, recipe, base).files)]
    outcome = SettingWorker(recipe, asked, model_sha256(base)).measure(named, "test", saes)
    assert outcome.found.loss is not None and outcome.found != outcome.base
    with pytest.raises(ScaleError, match=r"base: is another one on .*Copy them there"):
        SettingWorker(recipe, asked, "0" * 64).measure(named, "test", saes)
    with pytest.raises(ScaleError, match="layer_1: is another one on "):
        SettingWorker(recipe, asked, model_sha256(base)).measure(named, "test", ["0" * 64])
