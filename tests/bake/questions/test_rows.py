"""Rows of files and of data sets, and one line for each kind of trouble."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from bake.errors import DataError
from bake.questions.rows import rows_of
from bake.recipe import Recipe
from bake.sources import QuestionSource, TextSource


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    clamp = {"sae": {"path": "sae"}, "method": "zero", "features": [0]}
    data = {"schema": 1, "base": {"model": "base"}, "clamp": [clamp]}
    return Recipe.parse(data, name="test", folder=tmp_path)


def read(source: TextSource | QuestionSource, recipe: Recipe, **options: Any) -> list[Any]:
    return list(rows_of(source, recipe, **options)[1])


def test_parquet_text_and_json_lines(recipe: Recipe) -> None:
    parquet.write_table(pa.table({"body": ["one", "two"]}), recipe.local("t.parquet"))
    recipe.local("t.txt").write_text("one\n\n two \n")
    recipe.local("t.jsonl").write_text('{"body": "one"}\n\n{"body": "two"}\n')
    rows = [{"body": "one"}, {"body": "two"}]
    assert read(TextSource(path="t.parquet", field="body"), recipe) == list(enumerate(rows, 1))
    numbered = [(1, rows[0]), (3, rows[1])]
    assert read(TextSource(path="t.txt", field="body"), recipe) == numbered
    assert read(TextSource(path="t.jsonl", field="body"), recipe) == numbered


@pytest.mark.parametrize("name", ["absent.parquet", "bad.parquet", "absent.txt"])
def test_files_that_cannot_be_read(recipe: Recipe, name: str) -> None:
    recipe.local("bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=rf"{name}: cannot be read .*expected a"):
        read(TextSource(path=name), recipe)


class GatedRepoError(Exception):
    """As huggingface_hub raises it."""


@pytest.mark.parametrize(
    "error",
    [
        GatedRepoError("401 Client Error"),
        ValueError("Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated"),
    ],
)
def test_a_gated_set_says_how_to_get_it(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("datasets.load_dataset", refuse)
    source = TextSource(dataset="cais/wmdp-bio-forget-corpus")
    with pytest.raises(DataError, match=r"cais/wmdp-bio-forget-corpus train: is gated; ask"):
        read(source, recipe, streaming=True)


def test_streaming_is_asked_for_where_the_hub_can_be_reached(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> list[Any]:
        asked.append(options)
        return [{"text": "x"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for offline in ("false", "1"):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        assert read(TextSource(dataset="a/b"), recipe, streaming=True) == [(1, {"text": "x"})]
    assert asked == [{"split": "train", "streaming": True}, {"split": "train"}]
