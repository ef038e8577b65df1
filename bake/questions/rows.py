"""Rows of local files and of data sets, numbered, and what to call their source."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bake.errors import DataError, printable, short, shown
from bake.reading.capped import ROW_BYTES, UnreadableError, open_regular, parse_json
from bake.recipe import Recipe
from bake.sources import RowSource, TextSource, in_store, offline

Rows = Iterator[tuple[int, Any]]
"""(number from 1, row); of a file of lines, the number is that of the line."""


def rows_of(
    source: RowSource | TextSource, recipe: Recipe, *, streaming: bool = False
) -> tuple[str, Rows]:
    """What to call a source, and its rows in order.

    Args:
        source: what the recipe names.
        recipe: where relative paths start.
        streaming: read a hub data set row by row instead of downloading all of it.

    Raises:
        DataError: while rows are taken, when the source cannot be read.
    """
    if source.path is not None:
        path, name = recipe.local(source.path), printable(source.path)
        if in_store(source.path):
            return name, _store_rows(name, source.path)
        if path.suffix == ".parquet":
            return name, _parquet_rows(name, path)
        field = getattr(source, "field", None) if path.suffix == ".txt" else None
        return name, _line_rows(name, path, field)
    assert source.dataset is not None
    parts = (source.dataset, source.config, source.split)
    name = " ".join(printable(part) for part in parts if part)
    return name, _dataset_rows(name, source, recipe, streaming)


def field_of(name: str, number: int, row: Any, field: str) -> Any:
    """A row's field.

    Raises:
        DataError: the row is no object, or lacks the field.
    """
    if not isinstance(row, dict):
        raise DataError(f"{name}, row {number}: is {shown(row)}; expected a JSON object")
    if field not in row:
        keys = ", ".join(f"`{printable(key)}`" for key in row) or "no keys"
        raise DataError(
            f"{name}, row {number}: has no `{field}`; it has {short(keys)}. Rename one, or name "
            "another with `field`"
        )
    return row[field]


def check_whole(where: str, key: str, *texts: str) -> None:
    """Raise for half a character, which JSON can spell and no tokenizer can read."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: `{key}` holds {shown(text[error.start])}, half of a surrogate pair; "
                "expected text"
            ) from error


def _line_rows(name: str, path: Path, field: str | None) -> Rows:
    """JSON lines; with `field`, lines of plain text that become rows with that field."""
    number = 0
    try:
        with open_regular(path) as file:
            while data := file.readline(ROW_BYTES + 1):
                number += 1
                if len(data) > ROW_BYTES:
                    raise DataError(
                        f"{name}, row {number}: has more than {ROW_BYTES:,} bytes; expected JSONL, "
                        "one row a line"
                    )
                if line := data.decode("utf-8").strip():
                    yield number, {field: line} if field else _json(name, number, line)
    except OSError as error:
        raise DataError(
            f"{name}: cannot be read ({error.strerror}); expected a JSONL file beside the recipe"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: is no UTF-8 text ({error.reason}); expected JSONL") from error
    except UnreadableError as error:
        raise DataError(
            f"{name}: cannot be read ({error}); expected a JSONL file beside the recipe"
        ) from error


def _json(name: str, number: int, line: str) -> Any:
    try:
        return parse_json(line, of_data=True)
    except ValueError as error:
        raise DataError(f"{name}, row {number}: {error}; expected JSONL") from error


def _parquet_rows(name: str, path: Path) -> Rows:
    with _readable(name, "a Parquet file beside the recipe"), open_regular(path) as opened:
        yield from enumerate(_parquet(opened), 1)


def _store_rows(name: str, address: str) -> Rows:
    """Rows of the Parquet files at an address that fsspec knows, in the order of their names."""
    import fsspec

    number = 0
    with _readable(name, "Parquet in a store that this machine knows and may read"):
        store, path = fsspec.core.url_to_fs(address)
        pattern = path if "*" in path else f"{path.rstrip('/')}/**/*.parquet"
        alone = "*" not in path and path.endswith(".parquet")
        files = [path] if alone else sorted(store.glob(pattern))
        if not files:
            raise DataError(f"{name}: holds no Parquet file (.parquet); expected at least one")
        for file in files:
            with store.open(file) as opened:
                for row in _parquet(opened):
                    number += 1
                    yield number, row


def _parquet(opened: Any) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(opened) as file:
        for batch in file.iter_batches(batch_size=1024):
            yield from batch.to_pylist()


@contextmanager
def _readable(name: str, expected: str) -> Iterator[None]:
    """What libraries raise within the block becomes a line; stores raise every kind."""
    try:
        yield
    except (DataError, GeneratorExit):
        raise
    except Exception as error:
        reason = short(printable(next(iter(str(error).splitlines()), "") or type(error).__name__))
        raise DataError(f"{name}: cannot be read ({reason}); expected {expected}") from error


def _dataset_rows(
    name: str, source: RowSource | TextSource, recipe: Recipe, streaming: bool
) -> Rows:
    """Rows of a hub data set, or of a local folder in any layout that `datasets` reads."""
    dataset = source.dataset
    assert dataset is not None
    local = recipe.local(dataset)
    if not local.is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", dataset):
        raise DataError(
            f"{name}: no such folder beside the recipe; expected a folder, or a hub id (owner/name)"
        )
    if not local.is_dir() and Path(dataset).exists():
        raise DataError(
            f"{name}: the current folder holds a {dataset} too, which `datasets` would take for "
            "the hub's; expected none. Run this from elsewhere"
        )
    import datasets

    path = str(local) if local.is_dir() else dataset
    # Offline, a data set that was downloaded once is read from the cache, which cannot stream.
    options = {"streaming": True} if streaming and not offline() else {}
    try:
        rows = datasets.load_dataset(path, source.config, split=source.split, **options)
        yield from enumerate(rows, 1)
    except Exception as error:  # datasets raises many kinds, network errors among them
        reason = printable(next(iter(str(error).splitlines()), "") or type(error).__name__)
        if "gated" in f"{type(error).__name__} {error}".lower():
            raise DataError(
                f"{name}: is gated; ask for access on its page on the hub (datasets/{dataset}), "
                "then log in with `hf auth login`"
            ) from error
        raise DataError(
            f"{name}: cannot be loaded ({reason}); check the name, the split and the network, "
            "or name a local file with `path`"
        ) from error
