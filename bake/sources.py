"""TOML tables as typed models, and those that say where SAEs, texts, questions and prompts come
from; what is wrong with a table in a single line; which layer a hook point means.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from bake.errors import RecipeError, short, shown
from bake.reading.capped import CAPS, parse_toml, read_bytes


def offline() -> bool:
    """Whether the hub's library is kept from the network, read as it reads the variables itself."""
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.upper() in ("1", "ON", "YES", "TRUE")


class Table(BaseModel):
    """A TOML table: unknown keys are errors, numbers are finite, types are not coerced."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        frozen=True,
        populate_by_name=True,
    )


def _short_enough(name: str) -> str:
    if len(name) > 4000 or any(len(part.encode()) > 255 for part in name.split("/")):
        raise ValueError(f"{shown(name)} is longer than the name of a file can be")
    return name


def in_store(path: str) -> bool:
    """Whether a path is an address in a store, `s3://bucket/folder`, and no file here."""
    return re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


PathName = Annotated[str, AfterValidator(_short_enough)]
"""A path, or a hub id."""


class SAESource(Table):
    """Where an SAE comes from: `release` and `id`, or `path`."""

    release: str | None = None
    """sae_lens release, or a hub repository in sae_lens's format."""
    id: str | None = None
    """The SAE's id within the release."""
    path: PathName | None = None
    """A sae_lens or Gemma Scope folder, relative to the recipe file."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.path is None) == (self.release is None) or (self.release is None) != (
            self.id is None
        ):
            raise ValueError("expected either `path`, or `release` and `id`")
        return self


class Source(Table):
    """A local file (`path`), or a hub data set (`dataset`, `split`)."""

    path: PathName | None = None
    """A JSONL or Parquet (.parquet) file, relative to the recipe file."""
    dataset: PathName | None = None
    """Hub id of a data set, or a local folder."""
    config: str | None = None
    """Configuration of the data set."""
    split: str
    """Split of the data set."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("expected either `path` or `dataset`")
        if self.path is not None and {"config", "split"} & self.model_fields_set:
            raise ValueError("`config` and `split` go with `dataset`, not with `path`")
        if self.path is not None and in_store(self.path):
            self._check_store(self.path)
        return self

    def _check_store(self, _: str) -> None:
        raise ValueError("`path` is an address; expected a file beside the recipe")


class TextSource(Source):
    """Texts; a file may also be plain (.txt), one text a line."""

    split: str = "train"
    """Split of the data set."""
    field: str = "text"
    """Key of each row that holds the text."""


class Corpus(TextSource):
    """Texts that feature statistics are taken over.

    `path` may also be Parquet in a store that fsspec knows: s3://…, gs://…, https://…; one file, a
    folder, or a pattern with `*`.
    """

    chat: bool = False
    """Put each text (or list of messages) through the tokenizer's chat template first."""

    def _check_store(self, address: str) -> None:
        store, _, rest = address.partition("://")
        if store in ("file", "local"):
            raise ValueError(f"`path` is a {store}:// address; expected the file's path")
        if "::" in address:
            raise ValueError(
                "`path` is a chain of addresses, which may lead to files of this machine; expected "
                "one address"
            )
        if ":" in rest.partition("/")[0].rpartition("@")[0]:
            raise ValueError(
                f"`path` is a {store}:// address with a password, which would go wherever the "
                "recipe goes; expected none. Put it where the store's own library looks for it"
            )


class RowSource(Source):
    """Rows with the keys that whoever reads them expects."""

    split: str = "test"
    """Split of the data set."""


class QuestionSource(RowSource):
    """Multiple-choice questions (`question`, `choices`, `answer`, optional `subject`)."""

    topic: str | None = None
    """Named in the prompt where a row has no `subject`."""


def rewrite_paths(table: dict[str, Any], folder: Path, rewrite: Callable[[Path], str]) -> None:
    """Rewrite a table's local paths in place; hub ids stay.

    Args:
        table: TOML data, with tables and lists of tables in it.
        folder: where its paths start.
        rewrite: says how a path is to stand there.
    """
    for key, entry in table.items():
        for child in entry if isinstance(entry, list) else [entry]:
            if isinstance(child, dict):
                rewrite_paths(child, folder, rewrite)
        if not isinstance(entry, str):  # a table may be called as a key is
            continue
        hub_key = key in ("model", "dataset")
        local = key == "path" and not in_store(entry)
        if local or (hub_key and (entry[0] in "./~" or (folder / entry).exists())):
            table[key] = rewrite(folder / entry)


MOST_FEATURES = 8192
"""Most features of one clamp, whose table of routes has that number squared: 64 MB."""
_MOST_FLOAT32 = 3.4028234663852886e38


def feature_numbers(features: Any) -> list[int]:
    """Features as a recipe lists them.

    Raises:
        ValueError: they are no list of different whole numbers from 0, empty, or too many.
    """
    whole = isinstance(features, list) and all(type(f) is int for f in features)
    if not whole or not features:
        raise ValueError('expected a list of at least one feature number, or "select"')
    if len(features) > MOST_FEATURES:
        raise ValueError(
            f"lists {len(features):,} features; expected at most {MOST_FEATURES:,}: any may "
            "trigger any other, which is a table of that size squared"
        )
    if negative := [f for f in features if f < 0]:
        raise ValueError(f"feature {negative[0]} is negative")
    if twice := [f for f, n in Counter(features).items() if n > 1]:
        raise ValueError(f"feature {twice[0]} is listed twice")
    return list(features)


def float32(number: float) -> float:
    """A number that the clamp, which computes in float32, can hold.

    Raises:
        ValueError: it is beyond.
    """
    if abs(number) > _MOST_FLOAT32:
        raise ValueError(
            f"got {number!r}, which is beyond float32, in which the clamp computes; expected at "
            f"most {_MOST_FLOAT32:.7g}"
        )
    return number


_AFTER = re.compile(
    r"blocks\.([0-9]{1,4})\.hook_(?:resid_post|out)|"
    r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.([0-9]{1,4})(?:\.output(?:\.0)?)?"
)
"""A layer's output, as TransformerLens (2, 3) and as Hugging Face's modules name it."""
_BEFORE = re.compile(
    r"blocks\.([0-9]{1,4})\.hook_(?:resid_pre|in)|"
    r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.([0-9]{1,4})\.input(?:\.0)?"
)
"""A layer's input, which is the output of the one before."""


def layer_of(hook_point: str) -> int:
    """The decoder layer whose output a residual-stream hook point reads.

    `blocks.L.hook_resid_post`, `blocks.L.hook_out` and the module `model.layers.L` are the output
    of layer L; `blocks.L.hook_resid_pre`, `blocks.L.hook_in` and `model.layers.L.input` that of
    L - 1.

    Raises:
        ValueError: any other hook point, and the input of layer 0, which no layer writes.
    """
    after, before = _AFTER.fullmatch(hook_point), _BEFORE.fullmatch(hook_point)
    match = after or before
    if match is None:
        raise ValueError(
            f'hook point "{short(hook_point)}" is not supported; expected blocks.L.hook_resid_post '
            "or blocks.L.hook_resid_pre (the residual stream), or model.layers.L"
        )
    layer = int(match[1] or match[2]) - (before is not None)
    if layer < 0:
        raise ValueError(
            f'hook point "{hook_point}" is the embedding, which no decoder layer writes; '
            "expected blocks.L.hook_resid_post, or hook_resid_pre with L of at least 1"
        )
    return layer


# --------------------------------------------------------------------------- reading


def read_toml(what: str, path: Path) -> dict[str, Any]:
    """A TOML file's tables; `what` it is leads its errors.

    Raises:
        RecipeError: it is missing, or is no TOML; one line.
    """
    try:
        return parse_toml(read_bytes(path, CAPS["recipe.toml"]))
    except OSError as error:
        raise RecipeError(
            f"{what} {path}: cannot be read ({error.strerror}); expected a TOML file"
        ) from error
    except ValueError as error:
        raise RecipeError(f"{what} {path}: is no TOML: {error}; correct it there") from error


_EXPECTED = {"model_type": "a table", "dict_type": "a table", "list_type": "a list"}
"""What pydantic's errors expected, in the words of TOML."""


def one_line(error: ValidationError, root: type[BaseModel]) -> str:
    """The first trouble of a ValidationError as `key: got …, expected …`, and how many more."""
    errors = [e for e in error.errors() if e["type"] != "literal_error"] or error.errors()
    # A misspelt key leaves another one missing: the key that is there says more.
    first, *more = sorted(errors, key=lambda e: e["type"] != "extra_forbidden")
    key = ""
    for part in first["loc"]:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
    if first["type"] == "extra_forbidden":
        known = _all_keys(root) - {str(first["loc"][-1])}  # it may be one of another table
        close = difflib.get_close_matches(str(first["loc"][-1]), sorted(known), 1)
        hint = f"; did you mean `{close[0]}`?" if close else "; remove it"
        text = f"unknown key{hint}"
    elif first["type"] == "missing":
        text = "missing; it is required"
    elif first["type"] == "value_error":
        text = str(first["ctx"]["error"])
    else:
        message = _EXPECTED.get(first["type"], first["msg"].removeprefix("Input should be "))
        text = f"got {shown(first['input'])}, expected {message}"
    suffix = f" (and {len(more)} more)" if more else ""
    key = short(key)
    return f"{key}: {text}{suffix}" if key else f"{text}{suffix}"


def _all_keys(table: type[BaseModel]) -> set[str]:
    """Every key that a table or any table within it knows."""
    return {
        field.alias or name
        for each in {table, *_tables_within(table)}
        for name, field in each.model_fields.items()
    }


def _tables_within(kind: Any) -> Iterator[type[BaseModel]]:
    """The tables that stand in a table's fields, however deep."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
        for field in kind.model_fields.values():
            yield from _tables_within(field.annotation)
    for part in get_args(kind):
        yield from _tables_within(part)
