"""Questions through lm-evaluation-harness: its tasks, its prompts, its arithmetic, our engines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from bake.errors import OutputError
from bake.files.scratch import Scratch
from bake.questions.multiple_choice import Question
from verify.engines.runners import Runner
from verify.evidence.tasks.harness_tasks import TASKS, HarnessError, write_tasks
from verify.guessing import guess_of, together
from verify.journal import Journal, Progress
from verify.material import Material
from verify.report.measures import Guess, HarnessScore

LOCAL = "local"
"""The name that stands for the questions at hand."""


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
    guesses: tuple[Guess, ...] = ()
    """Of the tasks and groups whose choices are known."""

    @property
    def scores(self) -> tuple[HarnessScore, ...]:
        """Every task and group that is scored by accuracy, per character where by that alone."""
        sizes = self.results.get("n-samples", {})
        guesses = {guess.source: guess for guess in self.guesses}
        return tuple(
            HarnessScore(
                task=task,
                accuracy=float(found[f"{metric},none"]),
                stderr=_number(found.get(f"{metric}_stderr,none")),
                n=sizes[task]["effective"] if task in sizes else None,
                guess=guesses.get(task),
            )
            for task, found in self.results["results"].items()
            if (metric := _metric(found)) is not None
        )

    def accuracy(self, task: str) -> float:
        """The harness's own figure for a task or a group, 0 to 1."""
        found = self.results["results"].get(task) or self.results["groups"][task]
        return float(found[f"{_metric(found)},none"])


def _metric(found: Mapping[str, Any]) -> str | None:
    """Which accuracy a task is scored by."""
    return next((name for name in ("acc", "acc_norm") if f"{name},none" in found), None)


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
                kept = journal.once(f"harness{suffix} {runner.name} {' '.join(named)}", run)
                results, guesses = kept["results"], [Guess(**of) for of in kept["guesses"]]
                text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
                (evals / f"{runner.name}{suffix}.json").write_text(text, encoding="utf-8")
                found = HarnessResult(results, (), tuple(guesses)).scores
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
    _task_manager()
    named = [task for task in tasks if task != LOCAL]
    known = _own_tasks().all_tasks if named else []
    for task in named:
        if task not in known and not Path(task).is_file():
            raise HarnessError(
                f"lm-eval task {task}: there is none of that name; expected one of those that "
                "`lm_eval ls tasks` lists, or a YAML file"
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
        import lm_eval  # noqa: F401
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise HarnessError(
            "lm-evaluation-harness is not installed; pip install 'bakeout[eval]'"
        ) from error
    return TaskManager


@cache
def _own_tasks() -> Any:
    """All that the harness brings along, and those of `TASKS`; to find them takes seconds."""
    return _task_manager()(include_path=str(TASKS))


def _results(
    runner: Runner, tokenizer: Any, tasks: Sequence[str] | Mapping[str, Sequence[Question]]
) -> dict[str, Any]:
    found = run_harness(runner, tokenizer, tasks)
    return {"results": found.results, "guesses": [asdict(guess) for guess in found.guesses]}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


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

    from verify.evidence.tasks.harness_lm import RunnerLM

    with Scratch("lm-eval") as folder, _silent(), _away():
        if isinstance(tasks, Mapping):
            write_tasks(folder, tasks)
            manager = task_manager(include_path=str(folder), include_defaults=False)
        else:
            manager = _own_tasks()
        found = simple_evaluate(
            model=RunnerLM(runner, tokenizer, batch_size=batch_size, max_length=max_length),
            tasks=_loaded(manager, list(tasks)),
            task_manager=manager,
            batch_size=batch_size,
            limit=limit,
        )
    return _result(found)


@contextmanager
def _silent() -> Iterator[None]:
    """What the harness, its data sets and the git that it asks say on stderr is no part of ours."""
    saved = os.dup(2)
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


@contextmanager
def _away() -> Iterator[None]:
    """The harness asks git and pip about the current folder, which may be a stranger's: `.git` says
    there what git runs, and `python -m pip` imports from there. Both are kept from looking.
    """
    import lm_eval.evaluator

    lm_eval.evaluator.get_git_commit_hash = lambda: None
    wanted = {"GIT_DIR": os.devnull, "PYTHONSAFEPATH": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


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

    samples = found.pop("samples")
    answers = [
        ItemAnswer(
            task=task,
            item=sample["doc_id"],
            log_likelihoods=tuple(float(pair[0]) for pair in sample["filtered_resps"]),
            greedy=tuple(bool(pair[1]) for pair in sample["filtered_resps"]),
            answer=int(sample["target"]),
        )
        for task, each in samples.items()
        for sample in each
        if len(sample["filtered_resps"]) > 1
    ]
    results = json.loads(json.dumps(found, default=handle_non_serializable))
    return HarnessResult(results, tuple(answers), tuple(_guesses(results, samples)))


def _guesses(results: dict[str, Any], samples: Mapping[str, Sequence[Any]]) -> Iterator[Guess]:
    """What guessing gives in every task whose rows have `choices`, and in groups of such."""
    known: dict[str, Guess] = {}
    for task, each in samples.items():
        choices = [sample["doc"].get("choices") for sample in each]
        if each and all(
            isinstance(of, list) and len(of) == len(sample["filtered_resps"])
            for of, sample in zip(choices, each, strict=True)
        ):
            texts = [[str(choice) for choice in of] for of in choices]
            known[task] = guess_of(task, texts, [int(sample["target"]) for sample in each])
    yield from known.values()
    below: dict[str, list[str]] = results.get("group_subtasks", {})

    def leaves(name: str) -> list[str]:
        return [leaf for one in below[name] for leaf in leaves(one)] if below.get(name) else [name]

    for group in (name for name, tasks in below.items() if tasks):
        if all(task in known for task in leaves(group)):
            yield together(group, [known[task] for task in leaves(group)])
