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


class TextSource(Table):
    """Texts: a local file (`path`), or a hub data set (`dataset`, `split`)."""

    path: str | None = None
    """A JSONL, Parquet (.parquet) or plain text (.txt, one text a line) file, relative to the
    recipe file."""
    dataset: str | None = None
    """Hub id of a data set, or a local folder."""
    config: str | None = None
    """Configuration of the data set."""
    split: str = "train"
    """Split of the data set."""
    field: str = "text"
    """Key of each row that holds the text."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        _check_path_or_dataset(self)
        return self


class Corpus(TextSource):
    """Texts that feature statistics are taken over."""

    chat: bool = False
    """Put each text (or list of messages) through the tokenizer's chat template first."""


class RowSource(Table):
    """Rows of a local file (`path`), or of a hub data set (`dataset`, `split`)."""

    path: str | None = None
    """A JSONL or Parquet file, relative to the recipe file."""
    dataset: str | None = None
    """Hub id of a data set, or a local folder."""
    config: str | None = None
    """Configuration of the data set."""
    split: str = "test"
    """Split of the data set."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        _check_path_or_dataset(self)
        return self


class QuestionSource(RowSource):
    """Multiple-choice questions (`question`, `choices`, `answer`, optional `subject`)."""

    topic: str | None = None
    """Named in the prompt where a row has no `subject`."""


def _check_path_or_dataset(source: TextSource | RowSource) -> None:
    if (source.path is None) == (source.dataset is None):
        raise ValueError("expected either `path` or `dataset`")
    if source.path is not None and {"config", "split"} & source.model_fields_set:
        raise ValueError("`config` and `split` go with `dataset`, not with `path`")


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


_AFTER = re.compile(
    r"blocks\.(\d+)\.hook_(?:resid_post|out)|"
    r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)(?:\.output(?:\.0)?)?"
)
"""A layer's output, as TransformerLens (2, 3) and as Hugging Face's modules name it."""
_BEFORE = re.compile(
    r"blocks\.(\d+)\.hook_(?:resid_pre|in)|"
    r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.input(?:\.0)?"
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
            f'hook point "{hook_point}" is not supported; expected blocks.L.hook_resid_post '
            "or blocks.L.hook_resid_pre (the residual stream), or model.layers.L"
        )
    layer = int(match[1] or match[2]) - (before is not None)
    if layer < 0:
        raise ValueError(
            f'hook point "{hook_point}" is the embedding, which no decoder layer writes; '
            "expected blocks.L.hook_resid_post, or hook_resid_pre with L of at least 1"
        )
    return layer
