"""One audit from beginning to end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bake.base import find_base
from bake.errors import DataError, FolderError, RecipeError
from bake.new_folder import MANIFEST
from bake.recipe import PromptForm, Recipe
from export.manifest import CARD, Manifest
from verify.attacks.audits import AUDITS
from verify.attacks.relearn import relearning, trained
from verify.audit.attempts import OPEN, Attempt, Lead, Scores, Settings
from verify.audit.audit_report import AuditReport
from verify.audit.levels import LEVELS, Level
from verify.audit.outcome import FolderAudit, sweeps_of, told_by
from verify.audit.subject import Subject, check_subject, open_subject
from verify.audit.target import Target
from verify.audit.work_order import Work
from verify.audit.workers import Workers, fitting_processes
from verify.journal import Journal, Progress, files_below, journal_path

SHARE = 1.5
"""Time of everything over that of relearning."""
SEEDS = (0, 1, 2)
"""Each holds out another part of the facts."""
AS_IS, STRIPPED, BASE = "as it is", "stripped", "base"
"""What is measured before any attack."""


@dataclass(frozen=True)
class AuditOptions:
    """How an audit is run."""

    quick: bool = False
    """Take the last of `LEVELS`."""
    minutes: float | None = None
    """About how long it may take: the first level that fits is taken. None: the first."""
    device: str = "cpu"
    """As torch names it."""
    cache: Path | None = None
    """Folder in which every attempt is kept: the same call goes on from there, to the same report.
    None keeps nothing."""
    processes: int | None = None
    """How many make attempts side by side; None: as many as there are cores, and memory for."""


def audit_folders(
    folders: Sequence[Path],
    recipe: Recipe,
    options: AuditOptions = AuditOptions(),
    progress: Progress = lambda _what, _share: None,
) -> AuditReport:
    """Attack folders that were made from one base, and say what came back.

    Args:
        folders: clamped checkpoints and what was exported from them, or plain models' folders.
        recipe: names the base, the questions and the texts.
        options: how it is run.
        progress: called with what is done, and the share of everything that is.

    Returns:
        The report. Where a folder is not what its manifest says, nothing of any is loaded, and
        `failures` say what is broken.

    Raises:
        BakeoutError: a folder, the recipe or what it names cannot be used.
    """
    if recipe.verify is None:
        raise RecipeError(
            "the recipe has no [verify] table; expected one, on whose questions an audit asks what "
            "came back"
        )
    names = [folder.resolve().name for folder in folders]
    if twice := [name for name in names if names.count(name) > 1]:
        raise FolderError(f"{twice[0]}: is there twice; expected folders of different names")
    failures = []
    for folder, name in zip(folders, names, strict=True):
        progress(f"check {name}", 0.0)
        failures += [(name, failure.what) for failure in check_subject(folder)]
    if failures:
        return AuditReport(level="none", seeds=SEEDS, failures=tuple(failures))
    subjects = [open_subject(folder, recipe, options.device) for folder in folders]
    exam = Target(subjects[0], len(SEEDS))
    for seed in SEEDS:
        exam.held(seed)  # too little to split is known before anything is trained
    processes = options.processes or fitting_processes(_model_bytes(recipe), options.device)
    level = LEVELS[-1] if options.quick else LEVELS[0]
    found = []
    with Workers(subjects, len(SEEDS), processes) as workers:
        for number, subject in enumerate(subjects):
            place = None
            if options.cache is not None:
                place = journal_path(options.cache, _work(subject, processes), "audit")
            with Journal(place, keep=True) as journal:

                def tell(what: str, share: float, number: int = number) -> None:
                    done = (number + share) / len(subjects)
                    progress(f"{subjects[number].name}: {what}", done)

                form = _form(recipe)
                work = Work(subject, number, workers, journal, tell, SEEDS, level, form)
                if number == 0 and options.minutes is not None and not options.quick:
                    level = _fitting(work, options.minutes * processes / len(subjects))
                found.append(_audit(replace(work, level=level)))
    return AuditReport(level.name, SEEDS, tuple(found))


def _fitting(work: Work, minutes: float) -> Level:
    """The first level that fits into some minutes of one process, by how long a few steps take."""
    (attempt,) = work.each(pace, [{}])[0]
    step, score = attempt.settings["step"], attempt.settings["score"]
    for level in LEVELS[:-1]:
        steps, scores = relearning(level, len(SEEDS))
        if SHARE * (steps * step + scores * score) <= 60 * minutes:
            return level
    return LEVELS[-1]


def pace(target: Target, settings: Settings) -> list[Attempt]:
    """How many seconds a step of training and a brief score take."""
    model = target.subject.model()
    asked = {"rate": 0.0, "steps": 4, "seed": 0, "lora": True}
    times = []
    for _ in trained(model, target.held(0).other, target.tokenizer, asked):
        times.append(time.perf_counter())
    target.score(model, target.held(0), brief=True)
    score = time.perf_counter() - times[-1]
    step = (times[-1] - times[0]) / (len(times) - 1)
    return [Attempt("pace", "", Scores(), settings={"step": step, "score": score})]


def _audit(work: Work) -> FolderAudit:
    """Everything that is tried on one folder."""
    subject, stages = work.subject, ["before", *AUDITS]

    def at(stage: str) -> Progress:
        return lambda what, share: work.tell(stage, (stages.index(stage) + share) / len(stages))

    whole = [AS_IS, BASE, *([STRIPPED] if subject.strips else [])]
    asked = replace(work, tell=at("before")).each(measure, [{"model": name} for name in whole])
    found = {name: of[0].scores for name, of in zip(whole, asked, strict=True)}
    attempts: list[Attempt] = []
    lead = _lead(subject, found[BASE], found[AS_IS])
    for name, audit in AUDITS.items():
        attempts += audit.run(replace(work, tell=at(name), before=found[AS_IS], lead=lead))
    manifest = Manifest.read(subject.folder) if (subject.folder / MANIFEST).exists() else None
    return FolderAudit(
        folder=subject.name,
        carrier=subject.carrier,
        exact=None if manifest is None else manifest.exact,
        manifest_sha256=None if manifest is None else manifest.sha256,
        card_sha256=None if manifest is None else manifest.files.get(CARD),
        form=lead,
        base=found[BASE],
        before=found[AS_IS],
        stripped=found.get(STRIPPED),
        sweeps=sweeps_of(attempts, found[AS_IS], lead),
        attempts=tuple(attempts),
    )


def _lead(subject: Subject, base: Scores, before: Scores) -> Lead:
    """By what an audit is told: prompts only where there are enough to split."""
    form = _form(subject.recipe)
    lead = told_by(base, before, form).lead
    if lead == OPEN:
        try:
            target = Target(subject, len(SEEDS), lead)
            for seed in SEEDS:
                target.held(seed)
        except DataError:
            return form
    return lead


def measure(target: Target, settings: Settings) -> list[Attempt]:
    """A model that nobody attacked."""
    name, subject = settings["model"], target.subject
    make = {AS_IS: subject.model, STRIPPED: subject.stripped, BASE: subject.base}[name]
    return [Attempt(name, "", target.score(make()))]


def _form(recipe: Recipe) -> PromptForm:
    assert recipe.verify is not None
    return recipe.verify.prompt


def _work(subject: Subject, processes: int) -> Any:
    """Everything that decides what is found of a folder, as JSON data."""
    import torch

    recipe = subject.recipe
    files = files_below([subject.folder, find_base(recipe).folder, *recipe.local_sources])
    return {
        "recipe": recipe.to_dict(),
        "device": [subject.device, torch.get_num_threads() if processes == 1 else 1],
        "parts": len(SEEDS),
        "carrier": [subject.carrier, subject.compiled],
        "files": [file for file in files if Path(file[0]).name not in (CARD, MANIFEST)],
    }


def _model_bytes(recipe: Recipe) -> int:
    """Of the base's weights in float32, twice the bytes of the file at most."""
    base = find_base(recipe)
    return sum(2 * (base.folder / shard).stat().st_size for shard in base.shards)
