"""Questions through lm-evaluation-harness: its tasks, its prompts, its arithmetic, our engines."""

from __future__ import annotations

import io
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bake.errors import BakeoutError, OutputError
from verify.journal import Journal, Progress
from verify.material import Material
from verify.measures import HarnessScore
from verify.questions import LETTERS, Question
from verify.runners import Runner

LOCAL = "local"
"""The name that stands for the questions at hand."""
TASK_NAME = re.compile(r"[a-z0-9_]+")
TEMPLATE = (
    "The following are multiple choice questions (with answers)"
    "{% if topic %} about {{topic}}{% endif %}.\n\n"
    "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n"
    "D. {{choices[3]}}\nAnswer:"
)
"""What a local question looks like. Source: the harness's own tasks `wmdp_bio` and `mmlu`."""


class HarnessError(BakeoutError):
    """lm-evaluation-harness is not installed, or a task cannot be loaded or scored."""


@dataclass(frozen=True)
class ItemAnswer:
    """One question, as the harness scored it."""

    task: str
    item: int
    """Its place in the task's data, from 0."""
    log_likelihoods: tuple[float, ...]
    """Per choice, nats."""
    greedy: tuple[bool, ...]
    """Per choice, whether it is what the model would say."""
    answer: int
    """Index of the right choice."""

    @property
    def chosen(self) -> int:
        """Index of the choice with the largest log-likelihood; the first of several."""
        return max(range(len(self.log_likelihoods)), key=self.log_likelihoods.__getitem__)


@dataclass(frozen=True)
class HarnessResult:
    """What the harness found."""

    results: dict[str, Any]
    """The harness's own result JSON, unchanged. It names paths of this machine."""
    answers: tuple[ItemAnswer, ...]
    """Every multiple-choice question, task by task in the harness's order."""

    @property
    def scores(self) -> tuple[HarnessScore, ...]:
        """Every task and group that is scored by accuracy."""
        sizes = self.results.get("n-samples", {})
        return tuple(
            HarnessScore(
                task=task,
                accuracy=float(found["acc,none"]),
                stderr=_number(found.get("acc_stderr,none")),
                n=sizes[task]["effective"] if task in sizes else None,
            )
            for task, found in self.results["results"].items()
            if "acc,none" in found
        )

    def accuracy(self, task: str) -> float:
        """The harness's own figure for a task or a group, 0 to 1."""
        found = self.results["results"].get(task) or self.results["groups"][task]
        return float(found["acc,none"])


def measure_harness(
    runners: Sequence[Runner],
    tasks: Sequence[str],
    material: Material,
    evals: Path,
    journal: Journal,
    progress: Progress,
) -> dict[str, tuple[HarnessScore, ...]]:
    """Score several engines, and keep the harness's own results.

    Args:
        runners: the engines.
        tasks: names of the harness's own tasks or groups; `local` stands for the forget and retain
            questions at hand, as tasks of these names.
        material: questions and tokenizer.
        evals: a folder, which need not exist. `ENGINE.json` and `ENGINE-local.json` hold the
            harness's results as they are, `tasks/` the local tasks' files.
        journal: of a run that was interrupted, or empty.
        progress: told how far it is.

    Returns:
        By engine, its scores.

    Raises:
        HarnessError: see `run_harness`.
        OutputError: the folder cannot be written.
    """
    named = [task for task in tasks if task != LOCAL]
    sets: dict[str, Sequence[str] | Mapping[str, Sequence[Question]]] = {}
    if named:
        sets[""] = named
    if LOCAL in tasks:
        sets["-local"] = material.questions
    scores: dict[str, tuple[HarnessScore, ...]] = {}
    try:
        evals.mkdir(parents=True, exist_ok=True)
        if LOCAL in tasks:
            (evals / "tasks").mkdir(exist_ok=True)
            write_tasks(evals / "tasks", material.questions)
        for number, runner in enumerate(runners, 1):
            for suffix, asked in sets.items():
                run = partial(_results, runner, material.tokenizer, asked)
                results = journal.once(f"harness{suffix} {runner.name} {' '.join(named)}", run)
                text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
                (evals / f"{runner.name}{suffix}.json").write_text(text, encoding="utf-8")
                found = HarnessResult(results, ()).scores
                scores[runner.name] = (*scores.get(runner.name, ()), *found)
            progress("lm-evaluation-harness", number / len(runners))
    except OSError as error:
        raise _unwritable(evals, error) from error
    return scores


def check_harness(tasks: Sequence[str], evals: Path) -> None:
    """What can be known before hours of work: the harness is there and has these tasks, and its
    results can be written.

    Raises:
        HarnessError: it is not installed, or has no task of a name.
        OutputError: the folder cannot be written.
    """
    manager = _task_manager()
    named = [task for task in tasks if task != LOCAL]
    known = manager().all_tasks if named else []
    for task in named:
        if task not in known and not Path(task).is_file():
            raise HarnessError(
                f"lm-eval task {task}: there is none of that name; `lm_eval ls tasks` lists them"
            )
    try:
        evals.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(evals, error) from error


def _unwritable(evals: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{evals}: lm-eval's results cannot be written there ({error.strerror}); name a folder "
        "that can be written with --evals"
    )


def _task_manager() -> Any:
    """The harness's own class."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise HarnessError(
            "lm-evaluation-harness is not installed; pip install 'bakeout[eval]'"
        ) from error
    return TaskManager


def _results(
    runner: Runner, tokenizer: Any, tasks: Sequence[str] | Mapping[str, Sequence[Question]]
) -> dict[str, Any]:
    return run_harness(runner, tokenizer, tasks).results


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def write_tasks(folder: Path, tasks: Mapping[str, Sequence[Question]]) -> None:
    """Task files for local questions, which `lm_eval --include_path FOLDER` takes too.

    Args:
        folder: an existing folder; one `.yaml` and one `.jsonl` per task are written into it, and
            the harness keeps what it makes of them there.
        tasks: per name, its questions.

    Raises:
        HarnessError: a name is not made of a to z, 0 to 9 and _.
    """
    for name, questions in tasks.items():
        if not TASK_NAME.fullmatch(name):
            raise HarnessError(f"task {name!r}: expected a name of a to z, 0 to 9 and _")
        data = folder.resolve() / f"{name}.jsonl"
        rows = [
            {
                "question": question.question,
                "choices": question.choices,
                "answer": question.answer,
                "topic": question.topic or "",
                "row": question.row,
            }
            for question in questions
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(data)},
                "cache_dir": str(data.with_suffix("")),
            },
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": TEMPLATE,
            "doc_to_choice": list(LETTERS),
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }
        # JSON is YAML, and quotes whatever a path may hold.
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        data.with_suffix(".yaml").write_text(text, encoding="utf-8")


def run_harness(
    runner: Runner,
    tokenizer: Any,
    tasks: Sequence[str] | Mapping[str, Sequence[Question]],
    *,
    batch_size: int | None = None,
    max_length: int | None = None,
    limit: int | None = None,
) -> HarnessResult:
    """Score an engine with lm-evaluation-harness.

    Args:
        runner: the engine.
        tokenizer: the base model's.
        tasks: names of the harness's own tasks or groups (`wmdp_bio`, `mmlu`, `mmlu_anatomy`),
            which come from the hub; or local questions by a name for each set.
        batch_size: prompts at once; by number of tokens when None.
        max_length: longest prompt, in tokens; no limit when None.
        limit: so many questions of each task; all when None.

    Raises:
        HarnessError: the harness is not installed, or a task is unknown, cannot be loaded, or is
            not scored by likelihood.
    """
    task_manager = _task_manager()
    from lm_eval import simple_evaluate

    from verify.harness_lm import RunnerLM

    # What the harness and datasets draw and say on stderr is no part of ours.
    quiet = redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory(prefix="bakeout-lm-eval-") as folder, quiet:
        if isinstance(tasks, Mapping):
            write_tasks(Path(folder), tasks)
            manager = task_manager(include_path=folder, include_defaults=False)
        else:
            manager = task_manager()
        found = simple_evaluate(
            model=RunnerLM(runner, tokenizer, batch_size=batch_size, max_length=max_length),
            tasks=_loaded(manager, list(tasks)),
            task_manager=manager,
            batch_size=batch_size,
            limit=limit,
        )
    return _result(found)


def _loaded(manager: Any, names: Sequence[str]) -> list[Any]:
    """The tasks and groups of these names, their data at hand."""
    built: list[Any] = []
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # datasets raises many kinds, network errors among them
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise HarnessError(
                f"lm-eval task {name}: cannot be loaded ({reason}); check the name and the "
                "network, or use local questions"
            ) from error
        group = loaded["groups"].get(name)
        built += [group] if group is not None else loaded["tasks"].values()
    return built


def _result(found: dict[str, Any]) -> HarnessResult:
    """The harness's dictionary as JSON has it, and its samples as answers."""
    from lm_eval.utils import handle_non_serializable

    answers = [
        ItemAnswer(
            task=task,
            item=sample["doc_id"],
            log_likelihoods=tuple(float(pair[0]) for pair in sample["filtered_resps"]),
            greedy=tuple(bool(pair[1]) for pair in sample["filtered_resps"]),
            answer=int(sample["target"]),
        )
        for task, samples in found.pop("samples").items()
        for sample in samples
        if len(sample["filtered_resps"]) > 1
    ]
    results = json.loads(json.dumps(found, default=handle_non_serializable))
    return HarnessResult(results, tuple(answers))
