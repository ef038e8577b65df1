"""The pages: everything in one file, nothing unescaped, and a browser that shows it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bake.recipe import Recipe
from bake.search.corpus_statistics import Measured, measure
from bake.search.selection import selected_recipe
from bakeout.cli import run
from bakeout.pages.search_pages import site_views, top_contexts
from bakeout.verbs.demo import MINIATURE
from tests.worlds import (
    RecipeWriter,
    save_sae_lens,
    tiny_base,
    tiny_sae,
    tiny_tokenizer,
    tiny_words,
    write_jsonl,
    write_texts,
)

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
TABLE: dict[str, Any] = {
    "sae": {"path": "sae"},
    "method": "clamp",
    "features": "select",
    "value": -6.0,
}
HOSTILE = "<script>document.title = 'taken'</script>&amp;"


@pytest.fixture
def recipe(tmp_path: Path, write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BAKEOUT_CACHE", str(tmp_path / "cache"))
    tokenizer = tiny_tokenizer(tiny_base(tmp_path / "base")) / "tokenizer.json"
    data = json.loads(tokenizer.read_text())
    for i, character in enumerate("<>/=&"):  # in place of letters that no made-up word has
        data["model"]["vocab"][character] = data["model"]["vocab"].pop("QWXYZ"[i])
    tokenizer.write_text(json.dumps(data))
    texts = [
        {"text": f"{tiny_words(12, seed)} {HOSTILE} {tiny_words(9, seed)}"} for seed in range(9)
    ]
    write_jsonl(tmp_path / "forget.jsonl", texts)
    write_texts(tmp_path / "retain.jsonl", 12, seed=1)
    folder = save_sae_lens(tmp_path / "sae", tiny_sae())
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["metadata"]["neuronpedia_id"] = "tiny/1-res"
    (folder / "cfg.json").write_text(json.dumps(cfg))
    select = {
        "forget": {"path": "forget.jsonl"},
        "retain": {"path": "retain.jsonl"},
        "retain_threshold": 0.5,
        "n_features": 3,
        "seq_len": 64,
        "n_seqs": 20,
    }
    return write_recipe(TABLE, select=select)


SWEEP = {
    "prompt": "chat",
    "objective": "alignment",
    "questions": {"validation": {"forget": 4, "retain": 4}, "test": {"forget": 6, "retain": 6}},
    "validation": {
        "base": {"forget": {"chat": 1.0}, "retain": {"chat": 1.0}},
        "points": [
            {"settings": {"value": value}, "forget": 0.2, "retain": 0.9} for value in (-1, -2)
        ],
        "front": [
            {
                "settings": {"value": -2},
                "forget": 0.2,
                "retain": 0.9,
                "controls": {"random_decoder": {"forget": {"chat": 0.8}, "retain": {"chat": 0.7}}},
            }
        ],
        "best": {"settings": {"value": -2}},
    },
    "test": {
        "best": {
            "forget": {"chat": 0.25, "plain": 0.3},
            "retain": {"chat": 0.9, "plain": 0.8},
            "loss_added": 0.01,
            "alignment": 0.875,
        }
    },
}


def written(recipe: Path, tmp_path: Path, *options: str) -> str:
    page = tmp_path / "page.html"
    assert run(["features", str(recipe), "--html", str(page), *options]) == 0
    return page.read_text(encoding="utf-8")


def dump(page: Path, tmp_path: Path) -> str:
    """The DOM as a browser leaves it, from file://."""
    if CHROMIUM is None:
        pytest.skip("no Chromium installed; apt-get install chromium")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=120, env=environment
    )
    return done.stdout


def test_a_page_is_one_file_and_escapes_what_it_shows(recipe: Path, tmp_path: Path) -> None:
    page = written(recipe, tmp_path)
    assert page.count("<script") == 1
    assert unescape(re.sub(r"<[^>]+>", "", page)).count("<script>document.title") > 0
    assert not re.findall(r"""(?:src|@import|url\()\s*=?\s*["']?""", page)
    links = set(re.findall(r'href="(?!#)([^"]+)"', page))
    assert links and all(
        re.fullmatch(r"https://www\.neuronpedia\.org/tiny/1-res/\d+", x) for x in links
    )
    assert page.count('<article class="card"') == 3
    assert "prefers-color-scheme: dark" in page and "@media print" in page
    assert str(tmp_path) not in page


def test_a_browser_shows_it(recipe: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / "report.json").write_text(json.dumps(SWEEP))
    page = written(recipe, tmp_path, "--sweep", str(sweep))
    probe = """<script>
    const circle = document.querySelector("circle.chosen");
    circle.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
    document.body.dataset.told = String(
      document.getElementById("tip-1").textContent === circle.querySelector("title").textContent);
    document.body.dataset.wide = String(document.documentElement.scrollWidth <= innerWidth);
    </script></body>"""
    file = tmp_path / "probed.html"
    file.write_text(page.replace("</body>", probe), encoding="utf-8")
    dom = dump(file, tmp_path)
    assert "<title>Features of base</title>" in dom  # the hostile text did not run
    assert 'data-told="true"' in dom and 'data-wide="true"' in dom
    assert dom.count('<article class="card"') == 3 and dom.count("<mark>") >= 3
    assert dom.count('class="control"') == 1 and "Pareto: value -2" in dom


def test_contexts_are_where_the_feature_is_strongest(recipe: Path, tmp_path: Path) -> None:
    loaded = Recipe.load(recipe)
    measured = measure(loaded, cache=tmp_path / "cache")
    selected, selections = selected_recipe(loaded, measured=measured)
    (view,) = site_views(selected, measured, selections)
    for card in view.cards:
        values = [context.value for context in card.contexts]
        assert values == sorted(values, reverse=True) and values[0] > 0
        found = measured.sites[0]
        both = max(found.forget.maximum[card.feature], found.retain.maximum[card.feature])
        assert values[0] == pytest.approx(float(both))
        assert card.from_forget == sum(c.side == "forget" for c in card.contexts)


def word(context: Any) -> str | None:
    """The domain that a context of the miniature speaks of, by its own words."""
    text = f"{context.before}{context.token}{context.after}".lower()
    kinds = {"bell": "bells", "ferry": "ferries", "kite": "kites", "fruit": "orchards"}
    seen = Counter({domain: text.count(kind) for kind, domain in kinds.items()})
    ((domain, n),) = seen.most_common(1)
    return domain if n else None


def domains(features: list[int], measured: Measured) -> Counter[str]:
    found: Counter[str] = Counter()
    for feature in features:
        found.update(filter(None, map(word, top_contexts(feature, measured.sites[0], measured))))
    return found


def test_what_the_miniature_selects_is_its_forget_domain(tmp_path: Path) -> None:
    loaded = Recipe.load(MINIATURE / "recipe.toml")
    measured = measure(loaded, cache=tmp_path)
    features = selected_recipe(loaded, measured=measured)[0].clamp[0].features
    assert isinstance(features, list)
    chosen = domains(features, measured)
    share = measured.sites[0].retain.share
    common = [int(f) for f in np.argsort(-share)[:100]]
    others = domains(common, measured)
    print(f"selected: {dict(chosen)}; the 100 most frequent on retain: {dict(others)}")
    assert chosen.total() > 300 and chosen["bells"] >= 0.95 * chosen.total()
    assert others["bells"] <= 0.6 * others.total()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--html", "{folder}/recipe.toml", "--force"], "is an input; choose another name"),
        (["--html", "{folder}/forget.jsonl"], "is an input; choose another name"),
        (["--html", "{folder}/absent/page.html"], "its folder does not exist"),
        (["--html", "{folder}/page.html", "--sweep", "{folder}"], "expected a finished sweep's"),
    ],
)
def test_bad_usage(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    match: str,
) -> None:
    before = recipe.read_text()
    assert run(["features", str(recipe), *(o.format(folder=tmp_path) for o in options)]) == 2
    assert match in capsys.readouterr().err
    assert recipe.read_text() == before and not (tmp_path / "page.html").exists()
