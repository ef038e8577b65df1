"""Engines in this process, and what a comparison of them with the reference finds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import torch

from bake.questions.answers import letter_tokens
from bake.questions.multiple_choice import load_questions, load_texts
from bake.questions.prompts import text_prompts
from bake.recipe import Recipe
from bake.rounding import epsilon_of
from bake.sources import QuestionSource, TextSource
from bake.stock import load_tokenizer
from tests.worlds import write_questions, write_texts
from verify.compare.comparing import compare
from verify.compare.comparison import Comparison
from verify.compare.firing import FeatureWatch, FiredExamples
from verify.compare.sensitivity import Sensitivity
from verify.engines import forward
from verify.engines.heap import by_halves
from verify.engines.runners import DecodingRunner, HookedRunner, Reading, Runner
from verify.evidence.kinds import KINDS
from verify.hooked import Hooked
from verify.journal import Journal
from verify.material import Material
from verify.options import Options
from verify.reference.oracle import Oracle
from verify.report.findings import EngineReport, VerifyReport
from verify.work import Work

COMPARED_KINDS = frozenset({"parity", "choices", "loss"})
SHOWN = frozenset({"questions", "texts"})
"""What those kinds show every engine."""


def material_of(recipe: Recipe, n: int = 3) -> Material:
    """A few questions and texts for a recipe's model."""
    forget = write_questions(recipe.local("forget.jsonl"), n, seed=1)
    retain = write_questions(recipe.local("retain.jsonl"), n, seed=2)
    text = write_texts(recipe.local("text.jsonl"), n)
    tokenizer = load_tokenizer(recipe)
    windows = text_prompts(load_texts(TextSource(path=text.name), recipe), tokenizer)
    questions = {
        name: load_questions(QuestionSource(path=path.name), recipe)
        for name, path in (("forget", forget), ("retain", retain))
    }
    return Material(questions, windows, letter_tokens(tokenizer), tokenizer)


def reports_beside(
    oracle: Oracle, checkpoint: HookedRunner, recipe: Recipe
) -> dict[str, EngineReport]:
    """What is found of base, reference and a checkpoint, by name."""
    here = [
        HookedRunner("base", oracle.model),
        HookedRunner("reference", oracle.model, oracle),
        checkpoint,
    ]
    found = compared_with(oracle, here, recipe)
    hooked = Hooked(oracle.model, oracle.sites, {"reference": oracle}, found.material)
    work = Work(
        *(recipe, COMPARED_KINDS, hooked, found, None, [checkpoint]),
        *(Options(), Journal(), lambda *_: None, lambda *_: nullcontext(checkpoint)),
    )
    engines = tuple(EngineReport(name) for name in found.names)
    report = VerifyReport("checkpoint", "layer", True, "full", (), engines=engines)
    for name, kind in KINDS.items():
        if name in COMPARED_KINDS and kind.gather is not None:
            report = kind.gather(work, report)
    return {engine.name: engine for engine in report.engines}


def compared_with(
    oracle: Oracle,
    here: list[HookedRunner],
    recipe: Recipe,
    parity: bool = True,
    elsewhere: Sequence[DecodingRunner] = (),
) -> Comparison:
    """A comparison of engines on a few made-up questions and texts."""
    material = material_of(recipe)
    prompts = material.prompts(SHOWN, compared=True)
    names = tuple(runner.name for runner in (*here, *elsewhere))
    epsilon = epsilon_of(oracle.model.dtype)
    sensitivity = Sensitivity("reference", oracle, epsilon, material, Journal(), prompts)
    found = Comparison(
        material,
        prompts,
        names,
        parity,
        {},
        FiredExamples("chat"),
        FeatureWatch({site.layer: site.features for site in oracle.sites}),
        dict.fromkeys(names, sensitivity),
    )
    compare(here, elsewhere, {"reference": oracle}, found, Journal(), lambda *_: None)
    return found


def load_clamped(folder: Path) -> Any:
    """The model of a checkpoint, by its own code."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype="auto", attn_implementation="eager"
    ).eval()


class InProcess(HookedRunner):
    """The checkpoint in this process, for what does not depend on where it runs."""

    def __init__(self, folder: Path, name: str, needs: str | None = None) -> None:
        super().__init__(name, None)
        self.folder = folder

    def load(self, dtype: str, **_: Any) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(
            self.folder,
            trust_remote_code=True,
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
        )

    def drop(self) -> None:
        self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()

    @by_halves
    def decoded(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, n_last: int
    ) -> torch.Tensor:
        tensors = {"input_ids": input_ids, "attention_mask": attention_mask}
        found: torch.Tensor = forward.decoded(self._model, tensors, n_last)
        return found


class PlainOnly(Runner):
    """An engine that reads batches only."""

    def __init__(self, runner: Runner, name: str = "onnx") -> None:
        self.name, self._runner = name, runner

    def read(self, *asked: torch.Tensor) -> Reading:
        return self._runner.read(*asked)

    def go_on(
        self, ids: torch.Tensor, mask: torch.Tensor, stops: Sequence[int], most: int
    ) -> torch.Tensor:
        return self._runner.go_on(ids, mask, stops, most)


class Speaker(Runner):
    """An engine that is asked for nothing but what comes next."""

    def next(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[batch, vocab] at the ends of prompts."""
        raise NotImplementedError

    def read(
        self, ids: torch.Tensor, mask: torch.Tensor, wanted: torch.Tensor, scored: torch.Tensor
    ) -> Reading:
        ends = torch.zeros_like(wanted)
        ends[:, -1] = True
        assert torch.equal(wanted, ends) and not scored.any()
        return Reading(self.next(ids, mask), torch.zeros(0).double())

    def go_on(
        self, ids: torch.Tensor, mask: torch.Tensor, stops: Sequence[int], most: int
    ) -> torch.Tensor:
        said = torch.full((len(ids), most), -1)
        for row in range(len(ids)):
            one, real = ids[row : row + 1], mask[row : row + 1]
            for step in range(most):
                said[row, step] = self.next(one, real)[0].argmax()
                if int(said[row, step]) in stops:
                    break
                one = torch.cat([one, said[row : row + 1, step : step + 1]], dim=1)
                real = torch.cat([real, torch.ones_like(real[:, :1])], dim=1)
        return said
