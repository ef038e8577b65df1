"""Where a recipe's SAEs, texts, questions and prompts come from: tables that name them; and which
layer a hook point means.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from bake.tables import Table


class SAESource(Table):
    """Where an SAE comes from: `release` and `id`, or `path`."""

    release: str | None = None
    """sae_lens release, or a hub repository in sae_lens's format."""
    id: str | None = None
    """The SAE's id within the release."""
    path: str | None = None
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

    path: str | None = None
    """A JSONL or Parquet (.parquet) file, relative to the recipe file."""
    dataset: str | None = None
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
        return self


class TextSource(Source):
    """Texts; a file may also be plain (.txt), one text a line."""

    split: str = "train"
    """Split of the data set."""
    field: str = "text"
    """Key of each row that holds the text."""


class Corpus(TextSource):
    """Texts that feature statistics are taken over."""

    chat: bool = False
    """Put each text (or list of messages) through the tokenizer's chat template first."""


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
        if key == "path" or (hub_key and (entry[0] in "./~" or (folder / entry).exists())):
            table[key] = rewrite(folder / entry)


def layer_of(hook_point: str) -> int:
    """The decoder layer whose output a residual-stream hook point reads.

    `blocks.L.hook_resid_post` is the output of layer L; `blocks.L.hook_resid_pre` that of L - 1.

    Raises:
        ValueError: any other hook point, and `blocks.0.hook_resid_pre`, which no layer writes.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(post|pre)", hook_point)
    if match is None:
        raise ValueError(
            f'hook point "{hook_point}" is not supported; expected blocks.L.hook_resid_post '
            "or blocks.L.hook_resid_pre (the residual stream)"
        )
    layer = int(match[1]) - (match[2] == "pre")
    if layer < 0:
        raise ValueError(
            f'hook point "{hook_point}" is the embedding, which no decoder layer writes; '
            "expected blocks.L.hook_resid_post, or hook_resid_pre with L of at least 1"
        )
    return layer
