"""From a recipe to a model that has the forgetting in its own weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bake.base import BaseModel
from bake.clamp import ClampWeights
from bake.distill.distill_texts import SIDES, Rows, batches_of, load_sides
from bake.distill.judging import HeldOut, Judge, held_out, judged
from bake.distill.objectives import Head, Side, Step, shifted
from bake.distill.students import Student, layers_of, student_of, topic_tokens
from bake.distill.teachers import (
    ROWS_AT_ONCE,
    Teacher,
    clamp_sha256,
    head_of,
    read,
    teach,
)
from bake.distill.trainer import Schedule, processes, train
from bake.distill.unlearners import Unlearner, unlearner_of
from bake.distill.weight_edits import Lesson, edit_features, fit_outputs
from bake.errors import ModelError
from bake.recipe import Recipe
from bake.search.cache import Unfinished, cache_folder, model_sha256
from bake.stock import load_base, load_tokenizer

Progress = Callable[[str, float], None]
"""Called with what is being done, and the share of it that is done, 0 to 1."""
FITTED_ROWS = 512
"""Pieces of texts of each side that least squares are taken over, at most."""
MATCHED_LAYERS = 3
"""Layers behind the hook whose residual streams are matched, at most."""


@dataclass(frozen=True)
class Distilled:
    """A model with the forgetting in its weights, and how it came to it."""

    model: Any
    """A stock Gemma in float32."""
    method: str
    settings: dict[str, Any]
    """By the fields' names in [distill], all that had an effect."""
    seed: int
    base_sha256: str
    """Of the base's config and weights."""
    texts: dict[str, str]
    """sha256 of each side's tokens."""
    held_out: HeldOut


def check_base(base: BaseModel) -> None:
    """Raise ModelError where a base cannot be trained."""
    if base.family.images:
        raise ModelError(
            f"base model {base.name}: takes images; only text models are distilled. Take its text "
            "model alone, or bake it"
        )
    if base.family.scaled:
        raise ModelError(
            f"base model {base.name}: is a Gemma 4; only Gemma, Gemma 2 and Gemma 3 are distilled. "
            "Bake it"
        )


def distill(
    recipe: Recipe,
    base: BaseModel,
    clamps: Sequence[ClampWeights],
    *,
    method: str = "merged",
    seed: int = 0,
    device: str = "cpu",
    cache: Path | None = None,
    progress: Progress = lambda _what, _share: None,
) -> Distilled:
    """Train, or edit, a recipe's base so that it forgets by itself.

    Args:
        recipe: with its features named.
        base: its base.
        clamps: its clamps.
        method: of `UNLEARNERS`.
        seed: of everything that is drawn.
        device: as torch names it.
        cache: where teachers' outputs and unfinished runs are kept; the user's cache folder by
            default.
        progress: told how far it is.

    Raises:
        BakeoutError: of the kind of trouble it meets.
    """
    work = Distilling(recipe, base, clamps, method, seed, device, cache, progress)
    return work.run()


class Distilling:
    """One run; for the arguments see `distill`."""

    def __init__(
        self,
        recipe: Recipe,
        base: BaseModel,
        clamps: Sequence[ClampWeights],
        method: str,
        seed: int,
        device: str,
        cache: Path | None,
        progress: Progress,
    ) -> None:
        check_base(base)
        self.recipe, self.base, self.name, self.seed = recipe, base, method, seed
        self.method: Unlearner = unlearner_of(method)
        self.layers = layers_of(recipe, self.method, base.n_layers)
        self.clamps = list(clamps)
        self.device, self.cache, self.progress = device, cache or cache_folder(), progress
        self.settings = self._settings()
        tokenizer = load_tokenizer(recipe)
        self.texts = load_sides(recipe, tokenizer, seed)
        self.base_sha256 = model_sha256(base)

    def _settings(self) -> dict[str, Any]:
        table, method = self.recipe.distill_table, self.method
        found: dict[str, Any] = {"layers": [self.layers[0], self.layers[-1]]}
        found["strength"] = table.strength or method.strength
        if method.loss is None:
            return found
        found["steps"] = method.steps if table.steps is None else table.steps
        found["learning_rate"] = table.learning_rate or method.learning_rate
        found |= {name: getattr(table, name) for name in ("batch_size", "seq_len", "n_texts")}
        if method.teaches:
            found |= {"student": table.student, "start": table.start}
            found |= {"rank": table.rank} if table.student == "lora" else {}
            found |= {"noise": table.noise} if table.student == "disturbed" else {}
            found |= {"token_noise": table.token_noise} if table.token_noise else {}
        return found

    @property
    def watched(self) -> list[int]:
        """Layers whose outputs the loss looks at."""
        if self.method.steers:
            return [self.layers[-1]]
        if not self.method.teaches:
            return []
        first = max(clamp.layer for clamp in self.clamps)
        behind = range(first, self.base.n_layers - 1) or range(first, first + 1)
        step = -(-len(behind) // MATCHED_LAYERS)
        return list(behind[::step])

    def run(self) -> Distilled:
        """Do it all."""
        torch.manual_seed(self.seed)
        model = load_base(self.recipe, self.device, dtype="float32")
        head = head_of(model)
        plans = {side: self._plan(side) for side in SIDES}
        teachers = {side: self._teacher(model, side, plans[side]) for side in SIDES}
        judges = {side: self._judge(model, side) for side in SIDES}
        self._edit(model)
        topic = topic_tokens(self.texts) if self.settings.get("token_noise") else ()
        student = student_of(model, self.recipe, self.method, self.layers, self.seed, topic)
        if self.settings.get("steps"):
            self._train(student, plans, teachers, head)
        student.finished()
        model.requires_grad_(False)
        return Distilled(
            model=model,
            method=self.name,
            settings=self.settings,
            seed=self.seed,
            base_sha256=self.base_sha256,
            texts={side: texts.trained.sha256 for side, texts in self.texts.items()},
            held_out=held_out(model, judges),
        )

    # ----------------------------------------------------------------------- teachers

    def _plan(self, side: str) -> list[list[int]]:
        rows, seed = self.texts[side].trained, f"{side} {self.seed}"
        return batches_of(
            rows, self.recipe.distill_table.batch_size, self.settings.get("steps", 0), seed
        )

    def _clamps(self, side: str) -> list[ClampWeights]:
        return self.clamps if self.method.teaches and side == "forget" else []

    def _teacher(self, model: Any, side: str, plan: list[list[int]]) -> Teacher:
        numbers = [number for batch in plan for number in batch]
        return self._taught(model, side, self.texts[side].trained, numbers, self.watched)

    def _judge(self, model: Any, side: str) -> Judge:
        rows = self.texts[side].held_out
        return Judge(rows, self._taught(model, side, rows, judged(rows), []), head_of(model))

    def _taught(
        self, model: Any, side: str, rows: Rows, numbers: Sequence[int], layers: Sequence[int]
    ) -> Teacher:
        with processes().main_process_first():  # the others find it in the cache
            return teach(
                model,
                self._clamps(side),
                rows,
                numbers,
                layers,
                cache=self.cache,
                about={"model": self.base_sha256},
                progress=lambda share: self.progress(f"teacher on {side} text", share),
            )

    # ----------------------------------------------------------------------- closed forms

    def _edit(self, model: Any) -> None:
        """Changes the model in closed form, where the method is one or begins with one."""
        if self.method.loss is None:
            rows, layer = (
                self.texts["forget"].trained.batch(range(ROWS_AT_ONCE)),
                self.clamps[0].layer,
            )
            with torch.no_grad():
                seen = read(model, *rows.padded(model.device), [layer]).hidden[layer]
            size = float(seen.norm(dim=-1).mean())
            edit_features(model, self.layers, self.clamps, self.settings["strength"], size)
        elif self.settings.get("start") == "least-squares":
            first = min(clamp.layer for clamp in self.clamps)
            layers = [layer for layer in self.layers if layer >= first]
            lessons = []
            for side in SIDES:
                rows = self.texts[side].trained
                numbers = range(min(FITTED_ROWS, len(rows.ids)))
                teacher = self._taught(model, side, rows, numbers, layers)
                lessons.append(Lesson(rows, numbers, teacher))
            fit_outputs(model, layers, lessons)

    # ----------------------------------------------------------------------- training

    def _train(
        self,
        student: Student,
        plans: dict[str, list[list[int]]],
        teachers: dict[str, Teacher],
        head: Head,
    ) -> None:
        unfinished = Unfinished(self.cache / "distill" / f"{self._key()}.unfinished.safetensors")
        n_steps, minimised = self.settings["steps"], self.method.loss
        assert minimised is not None
        direction = self._direction(student.model)

        def loss(step: int) -> Tensor:
            numbers = {side: plans[side][step] for side in SIDES}
            forget, retain = self._sides(student.model, numbers, teachers)
            return minimised(
                Step(
                    forget=forget,
                    retain=retain,
                    head=student.head(),
                    teacher_head=head,
                    strength=self.settings["strength"],
                    layer=self.layers[-1],
                    direction=direction(retain),
                )
            )

        train(
            student.parameters,
            loss,
            Schedule(n_steps, self.settings["learning_rate"]),
            unfinished,
            lambda share: self.progress("train", share),
        )
        unfinished.remove()

    def _direction(self, model: Any) -> Callable[[Side], Tensor]:
        """RMU: a random direction, its size in root mean squares of the layer's output."""
        d_in = model.config.get_text_config().hidden_size
        drawn = torch.rand(d_in, generator=torch.Generator().manual_seed(self.seed))
        unit: Tensor = (drawn / drawn.norm()).to(model.device)

        def of(side: Side) -> Tensor:
            if not self.method.steers:
                return unit
            size = side.teacher.hidden[self.layers[-1]].square().mean().sqrt()
            return unit * (size * float(self.settings["strength"]))

        return of

    def _sides(
        self,
        model: Any,
        numbers: dict[str, list[int]],
        teachers: dict[str, Teacher],
    ) -> list[Side]:
        """Both corpora's share of a step, in one forward."""
        world = processes()
        # Fewer rows than processes: all take the same ones.
        own = {
            side: of[world.process_index :: world.num_processes] or of
            for side, of in numbers.items()
        }
        parts = [self.texts[side].trained.batch(own[side]) for side in SIDES]
        ids, real = Rows(tuple(row for part in parts for row in part.ids)).padded(model.device)
        seen = read(model, ids, real, self.watched)
        found, start = [], 0
        for side, part in zip(SIDES, parts, strict=True):
            targets, rows = shifted(*part.padded(model.device))
            tokens = slice(start, start + len(targets))
            taught = teachers[side].seen(own[side], model.device)
            found.append(Side(seen.part(tokens), taught, targets, rows))
            start = tokens.stop
        return found

    def _key(self) -> str:
        about = {
            "method": self.name,
            "settings": self.settings,
            "seed": self.seed,
            "model": self.base_sha256,
            "clamps": [clamp_sha256(clamp) for clamp in self.clamps],
            "texts": {side: texts.trained.sha256 for side, texts in self.texts.items()},
        }
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
