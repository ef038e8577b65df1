"""The recipe: what to forget, in which model, how (TOML in and out)."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import (
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from bake.distill.distill_table import Distill
from bake.errors import RecipeError
from bake.methods import METHODS, own_fields
from bake.sources import (
    MOST_FEATURES,
    Corpus,
    PathName,
    QuestionSource,
    RowSource,
    SAESource,
    Source,
    Table,
    TextSource,
    feature_numbers,
    float32,
    layer_of,
    one_line,
    read_toml,
    rewrite_paths,
)

PromptForm = Literal["chat", "plain", "cloze"]
"""The keys of `bake.questions.forms.FORMS`."""


class Base(Table):
    """The model that is to forget."""

    model: PathName = Field(min_length=1)
    """Hub id, or a folder relative to the recipe file."""
    revision: str = "main"
    """Branch, tag or commit on the hub; a commit for anything that is published."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the checkpoint is loaded and verified in; `auto` is as stored."""
    license: str = "gemma"
    """Licence that the card and the notice follow, as a hub licence id."""


class Clamp(Table):
    """One SAE at one hook point, and what happens to which of its features."""

    sae: SAESource
    """The SAE whose features are read and set."""
    hook_point: str | None = None
    """Where it sits; taken from the SAE when absent, an error when the two disagree."""
    method: str
    """One of `bake.methods.METHODS`: clamp | scale | zero | refusal | random_decoder | dynamic."""
    features: list[int] | Literal["select"]
    """SAE features that trigger the clamp, or "select"."""
    value: float | None = None
    """What an active feature becomes, in the SAE's own activation units, sign as written."""
    multiplier: float | None = None
    """scale only: an active feature's activation a becomes (1 - multiplier) * a."""
    trigger: float = Field(default=0.0, ge=0)
    """A feature counts as active when its activation is greater than this."""
    refusal_feature: int | None = Field(default=None, ge=0)
    """refusal only: the feature that is set to `value` while any of `features` is active."""
    also_clamp: bool = False
    """refusal only: set the harmful features themselves too, to `clamp_value`."""
    clamp_value: float | None = None
    """refusal with also_clamp only: default is `value`."""
    tau: float | None = Field(default=None, ge=0, lt=1 - 2**-25)  # which float32 rounds to 1
    """dynamic only: it acts where more than this share of the tokens so far had active features."""
    exempt_bos: bool = True
    """Leave tokens whose id is BOS as they are."""

    @field_validator("features", mode="before")
    @classmethod
    def _readable_features(cls, features: Any) -> Any:
        return features if features == "select" else feature_numbers(features)

    @field_validator("value", "multiplier", "trigger", "clamp_value", "tau")
    @classmethod
    def _in_float32(cls, number: float | None) -> float | None:
        return number if number is None else float32(number) + 0.0  # -0.0 is 0.0

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        if method not in METHODS:
            expected = " or ".join(", ".join(map(repr, METHODS)).rsplit(", ", 1))
            raise ValueError(f"got {method!r}, expected {expected}")
        return method

    @field_validator("hook_point")
    @classmethod
    def _supported_hook_point(cls, hook_point: str | None) -> str | None:
        if hook_point is not None:
            layer_of(hook_point)
        return hook_point

    @model_validator(mode="after")
    def _fields_fit_method(self) -> Self:
        method = METHODS[self.method]
        for name in sorted(method.needs):
            if getattr(self, name) is None:
                raise ValueError(f'method "{self.method}" needs `{name}`')
        for name in sorted((self.model_fields_set & own_fields()) - set(method.fields)):
            raise ValueError(f'method "{self.method}" does not use `{name}`; remove it')
        if self.clamp_value is not None and not self.also_clamp:
            raise ValueError("`clamp_value` is used only with also_clamp = true")
        if self.multiplier == 0:
            raise ValueError("multiplier = 0 leaves every activation as it is")
        if self.features != "select" and self.refusal_feature in self.features:
            raise ValueError(f"refusal_feature {self.refusal_feature} is also among `features`")
        return self

    @property
    def parameters(self) -> dict[str, Any]:
        """What its method is given, by the fields' names: value, trigger, exempt_bos, …"""
        used = {*METHODS[self.method].fields, "trigger", "exempt_bos"}
        given = {name: getattr(self, name) for name in type(self).model_fields if name in used}
        return {name: value for name, value in given.items() if value is not None}

    def table_for(self, method: str) -> dict[str, Any]:
        """The table as written, for another method: fields that are others' own left out."""
        table = self.model_dump(exclude_unset=True, exclude_none=True) | {"method": method}
        others = own_fields() - set(METHODS[method].fields)
        return {name: entry for name, entry in table.items() if name not in others}

    def with_method(self, method: str, **more: Any) -> Clamp | None:
        """The same SAE, features and trigger with another method, which keeps the parameters that
        it shares with this one. None where it needs one that is not there: a strength is never made
        up.

        Args:
            method: of `METHODS`.
            more: fields to set.
        """
        table = self.table_for(method) | more
        if any(table.get(name) is None for name in METHODS[method].needs):
            return None
        return type(self).model_validate(table)


class Select(Table):
    """How features are chosen where `features = "select"`."""

    by: Literal["sparsity", "ratio", "attribution"] = "sparsity"
    """The procedure, as `bake.search.select` and `attribution` have it."""
    forget: Corpus
    """Texts that the model should forget."""
    retain: Corpus
    """Texts that it should keep; they must look like the prompts that must survive."""
    forget_questions: QuestionSource | None = None
    """Questions that attribution and sweeps may look at, none of them also in [verify]; without
    them a part of [verify]'s is split off."""
    retain_questions: QuestionSource | None = None
    """The same for what is to be kept."""
    retain_threshold: float = Field(default=0.01, ge=0, le=1)
    """sparsity only: a feature that fires on this share of the retained tokens, or on more, is
    not selected."""
    n_features: int = Field(default=20, ge=1, le=MOST_FEATURES)
    """How many features to take."""
    ratio_percentile: float = Field(default=95.0, ge=0, le=100)
    """ratio only: keep features above this percentile of mean square forget / retain."""
    seq_len: int = Field(default=1024, ge=2, le=1 << 20)
    """Window length in tokens, BOS included."""
    n_seqs: int = Field(default=1024, ge=1, le=1 << 30)
    """Windows per corpus."""
    seed: int | None = None
    """Take the texts in an order drawn from this seed; without one, in their own."""


class Completions(Table):
    """Prompts that base and unlearned model go on with, side by side."""

    prompts: RowSource
    """Prompts on the topic: `prompt`, and `answers`, any of which is right."""
    generic: RowSource | None = None
    """Prompts on anything else, whose continuations should stay; `answers` may be left out."""
    trivia: RowSource | None = None
    """Two-choice questions (`question`, `right`, `wrong`); else made of the forget questions."""
    topic_words: list[Annotated[str, Field(pattern=r"\S")]] = Field(default_factory=list)
    """Words that count as a reference to the topic, besides the expected answers."""
    instruction: str | None = Field(default=None, pattern=r"\S")
    """What the base is told in front of a prompt, the fourth variant; else made of the topic."""


class Verify(Table):
    """What the exported model is measured on."""

    forget_questions: QuestionSource
    """Questions about what is to be forgotten."""
    retain_questions: QuestionSource
    """Questions about what is to be kept."""
    text: TextSource
    """Texts for the loss that the clamp adds."""
    texts: dict[str, TextSource] = Field(default_factory=dict)
    """Other texts, by name, on which the loss added is reported apart: near the topic, on it."""
    prompt: PromptForm = "chat"
    """The prompt form that leads the report; chat and plain are always measured, cloze where it
    leads."""
    reworded: dict[str, QuestionSource] = Field(default_factory=dict)
    """Sets of questions, by name, that ask for what is to be forgotten in other words, another
    language or script."""
    completions: Completions | None = None
    """Prompts to go on with; without it no text is compared."""

    @property
    def sources(self) -> list[Source]:
        """Everything that is read."""
        named: list[Source] = [self.forget_questions, self.retain_questions]
        named += [self.text, *self.texts.values(), *self.reworded.values()]
        if (c := self.completions) is not None:
            named += [s for s in (c.prompts, c.generic, c.trivia) if s is not None]
        return named


class Recipe(Table):
    """A whole recipe. `Recipe.load(path)` reads one; `to_toml()` writes one."""

    schema_version: Literal[1] = Field(alias="schema")
    """Version of this format."""
    base: Base
    """The model that is to forget."""
    clamp: list[Clamp] = Field(min_length=1)
    """One table per hook point."""
    select: Select | None = None
    """Needed where features = "select"."""
    distill: Distill | None = None
    """How a model that forgets by itself is trained, and on what."""
    verify: Verify | None = None
    """What the exported model is measured on."""

    _folder: Path = PrivateAttr(default=Path())
    _file: Path | None = PrivateAttr(default=None)

    @field_validator("schema_version", mode="before")
    @classmethod
    def _no_truth(cls, schema: Any) -> Any:
        return repr(schema) if isinstance(schema, bool) else schema  # to Python, true is 1

    @model_validator(mode="after")
    def _tables_fit(self) -> Self:
        layers = [layer_of(c.hook_point) for c in self.clamp if c.hook_point is not None]
        if twice := [layer for layer, n in Counter(layers).items() if n > 1]:
            raise ValueError(f"two [[clamp]] tables at the output of layer {twice[0]}; merge them")
        if self.select is None and self.selects:
            raise ValueError('features = "select" needs a [select] table')
        return self

    @property
    def selects(self) -> bool:
        """Whether a table leaves its features to be selected."""
        return any(clamp.features == "select" for clamp in self.clamp)

    @property
    def distill_table(self) -> Distill:
        """[distill], or what it says where nothing is written."""
        return self.distill or Distill()

    @property
    def folder(self) -> Path:
        """The folder that relative paths start from."""
        return self._folder

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a recipe file.

        Raises:
            RecipeError: the file is missing, is no TOML, or a value is wrong; one line that
                names the key, what came and what was expected.
        """
        path = Path(path)
        data = read_toml("recipe", path)
        recipe = cls.parse(data, name=str(path), folder=path.resolve().parent)
        recipe._file = path.resolve()
        return recipe

    @classmethod
    def parse(cls, data: dict[str, Any], *, name: str, folder: Path) -> Self:
        """Check a parsed recipe; `name` leads its errors, `folder` is where paths start."""
        try:
            recipe = cls.model_validate(data)
        except ValidationError as error:
            raise RecipeError(f"recipe {name}: {one_line(error, cls)}") from error
        recipe._folder = folder
        return recipe

    def local(self, path: str) -> Path:
        """A path of the recipe, relative to the recipe's folder, as a usable path."""
        return self._folder / path

    @property
    def local_sources(self) -> list[Path]:
        """Every local file or folder that the recipe names, and its own file, where they exist."""
        sources: list[Source] = []
        if self.verify is not None:
            sources += self.verify.sources
        if self.select is not None:
            s = self.select
            sources += [s.forget, s.retain]
            sources += [q for q in (s.forget_questions, s.retain_questions) if q is not None]
        if (d := self.distill) is not None:
            sources += [s for s in (d.forget, d.retain) if s is not None]
        saes = [clamp.sae.path for clamp in self.clamp]
        names = [self.base.model, *saes, *(s.path or s.dataset for s in sources)]
        paths = [self._file, *map(self.local, filter(None, names))]
        return [path for path in paths if path is not None and path.exists()]

    def with_clamps(self, clamps: list[Clamp]) -> Self:
        """The same recipe with other [[clamp]] tables, checked anew."""
        tables = [of.model_dump(exclude_unset=True, exclude_none=True) for of in clamps]
        data = self.to_dict() | {"clamp": tables}
        changed = type(self).parse(data, name=str(self._file or "recipe"), folder=self._folder)
        changed._file = self._file
        return changed

    def at(self, folder: Path) -> Self:
        """The recipe as a file in another folder would have to say it: local paths from there."""
        data = self.to_dict()
        rewrite_paths(
            data, self._folder, lambda path: Path(os.path.relpath(path, folder)).as_posix()
        )
        return type(self).parse(data, name=str(self._file or "recipe"), folder=folder)

    def shareable(self) -> Recipe:
        """As it may leave the machine: every local path cut to its last component."""
        data = self.to_dict()
        rewrite_paths(data, self._folder, lambda path: path.resolve().name)
        return Recipe.parse(data, name="recipe.toml", folder=Path())

    def to_dict(self) -> dict[str, Any]:
        """The recipe as TOML data: what was written, no defaults added."""
        return self.model_dump(by_alias=True, exclude_unset=True, exclude_none=True)

    def to_toml(self) -> str:
        """The recipe as TOML text."""
        return tomli_w.dumps(self.to_dict())
