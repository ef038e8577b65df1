"""TOML tables as typed models, and what is wrong with one in a single line."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from bake.errors import RecipeError


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


def read_toml(what: str, path: Path) -> dict[str, Any]:
    """A TOML file's tables; `what` it is leads its errors.

    Raises:
        RecipeError: it is missing, or is no TOML; one line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"{what} {path}: cannot be read ({error.strerror}); expected a TOML file"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{what} {path}: is no TOML: {error}") from error


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
        text = f"got {first['input']!r}, expected {message}"
    suffix = f" (and {len(more)} more)" if more else ""
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
