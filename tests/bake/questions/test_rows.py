"""Rows of files and of data sets, and one line for each kind of trouble."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import parquet
from pydantic import ValidationError

from bake.errors import DataError
from bake.questions.rows import rows_of
from bake.recipe import Recipe
from bake.sources import Corpus, QuestionSource, TextSource


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


class _Closed(MemoryFileSystem):
    """A store that lets nobody read."""

    protocol = "closed"

    def glob(self, path: str, **_: Any) -> list[str]:
        raise PermissionError(f"Access Denied: {path}")

    def open(self, path: str, *_: Any, **__: Any) -> Any:
        raise PermissionError(f"Access Denied: {path}")


@pytest.fixture
def store() -> Iterator[MemoryFileSystem]:
    """A store with two Parquet files of texts."""
    files = MemoryFileSystem()
    for name, texts in (("b/2.parquet", ["three"]), ("b/1.parquet", ["one", "two"])):
        with files.open(f"/corpus/{name}", "wb") as file:
            parquet.write_table(pa.table({"text": texts}), file)
    fsspec.register_implementation("closed", _Closed, clobber=True)
    yield files
    files.rm("/corpus", recursive=True)


@pytest.mark.parametrize("path", ["corpus", "corpus/", "corpus/b", "corpus/*/*.parquet"])
def test_parquet_of_a_store_in_the_order_of_its_names(
    recipe: Recipe, store: MemoryFileSystem, path: str
) -> None:
    texts = [(n, {"text": text}) for n, text in enumerate(["one", "two", "three"], 1)]
    assert read(Corpus(path=f"memory://{path}"), recipe) == texts
    assert read(Corpus(path="memory://corpus/b/2.parquet"), recipe) == [(1, {"text": "three"})]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("memory://corpus/c", r"memory://corpus/c: holds no Parquet file \(.parquet\); expected"),
        ("memory://corpus/3.parquet", r"cannot be read \(.*\); expected Parquet in a store that"),
        ("closed://corpus", r"cannot be read \(Access Denied: .*\); expected Parquet in a store"),
        ("closed://a.parquet", r"cannot be read \(Access Denied: .*\); expected Parquet in a"),
        ("nosuch://corpus", r"corpus: cannot be read \(Protocol not known: nosuch\)"),
    ],
)
def test_a_store_without_access_is_one_line(
    recipe: Recipe, store: MemoryFileSystem, path: str, said: str
) -> None:
    with pytest.raises(DataError, match=said) as caught:
        read(Corpus(path=path), recipe)
    assert "\n" not in str(caught.value)


def test_a_server_that_refuses_is_one_line(recipe: Recipe) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(403)

        def do_HEAD(self) -> None:
            self.send_error(403)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/a.parquet"
        with pytest.raises(DataError, match=r"cannot be read \(.*\); expected Parquet in a store"):
            read(Corpus(path=address), recipe)
        server.shutdown()


def test_addresses_go_with_corpora_alone_and_hold_no_password(recipe: Recipe) -> None:
    for path, said in (
        ("s3://me:secret@host/a", "with a password"),
        ("zip://a.parquet::file:///home/a.zip", "a chain of addresses"),
        ("dir://a::/home", "a chain of addresses"),
        ("file:///home/a.parquet", "expected the file's path"),
    ):
        with pytest.raises(ValidationError, match=said):
            Corpus(path=path)
    assert Corpus(path="abfs://box@account.dfs.core.windows.net/a:b").path is not None
    for kind in (TextSource, QuestionSource):
        with pytest.raises(ValidationError, match="is an address; expected a file beside"):
            kind(path="s3://bucket/a.parquet")
    select = {"forget": {"path": "s3://bucket/a"}, "retain": {"path": "b.jsonl"}}
    data = recipe.to_dict() | {"select": select}
    there = Recipe.parse(data, name="test", folder=recipe.folder)
    for moved in (there.at(recipe.folder / "deep"), there.shareable()):
        assert moved.select is not None and moved.select.forget.path == "s3://bucket/a"
        assert moved.select.retain.path != "s3://bucket/a"
