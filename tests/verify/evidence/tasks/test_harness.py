from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch

import bakeout
from bake.questions.answers import Answers, best_letters, letter_log_likelihoods, letter_tokens
from bake.questions.multiple_choice import Question, load_questions
from bake.questions.prompts import batches, question_prompts
from bake.recipe import Recipe
from bake.sources import QuestionSource
from bake.stock import load_base, load_tokenizer
from export.carriers.checkpoint import plan_checkpoint, write_checkpoint
from tests.worlds import (
    save_sae_lens,
    tiny_base,
    tiny_sae,
    tiny_tokenizer,
    write_jsonl,
    write_questions,
)
from verify.engines.runners import HookedRunner, Runner, TorchRunner
from verify.engines.scoring import last_logits, token_ids
from verify.evidence.choices import accuracy
from verify.evidence.tasks import harness, harness_tasks
from verify.evidence.tasks.harness import HarnessResult, run_harness
from verify.evidence.tasks.harness_tasks import HarnessError, write_tasks
from verify.reference.oracle import Oracle
from verify.reference.whole_sae import load_sites

MINIATURE = Path(bakeout.__file__).parent / "miniature"
HOSTILE = {
    "question": "{{ 7 * 7 }} {% raw %} <b>&amp;</b> ](x) \x1b[31m: # 'q'\n- y?",
    "choices": ["{{choices}}", "{% endif %}", "<script>", '"\\'],
    "answer": 3,
    "subject": "{{topic}}_#_<i>",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an SAE, a recipe, the baked `checkpoint/`, and questions in both schemas."""
    folder = tmp_path_factory.mktemp("work")
    tiny_tokenizer(tiny_base(folder / "base"))
    save_sae_lens(folder / "sae", tiny_sae())
    clamp = {"sae": {"path": "sae"}, "method": "clamp", "features": [1, 5, 9], "value": -6.0}
    base = {"model": "base", "license": "apache-2.0"}
    text = tomli_w.dumps({"schema": 1, "base": base, "clamp": [clamp]})
    (folder / "recipe.toml").write_text(text)
    recipe = Recipe.load(folder / "recipe.toml")
    write_checkpoint(plan_checkpoint(recipe), folder / "checkpoint", card="# card\n")
    write_questions(folder / "wmdp.jsonl", 7, seed=1)
    write_questions(folder / "mmlu.jsonl", 4, seed=2, subject="bell_ringing")
    rows = [json.loads(line) for line in (folder / "mmlu.jsonl").read_text().splitlines()]
    write_jsonl(folder / "mmlu.jsonl", [*rows, HOSTILE])
    return folder


@pytest.fixture(scope="module")
def recipe(work: Path) -> Recipe:
    return Recipe.load(work / "recipe.toml")


@pytest.fixture(scope="module")
def tokenizer(recipe: Recipe) -> Any:
    return load_tokenizer(recipe)


@pytest.fixture(scope="module")
def questions(recipe: Recipe) -> dict[str, list[Question]]:
    return {
        name: load_questions(QuestionSource(path=f"{name}.jsonl"), recipe)
        for name in ("wmdp", "mmlu")
    }


def plain_scores(
    runner: Runner, questions: Sequence[Question], tokenizer: Any
) -> tuple[list[int], list[list[float]]]:
    """(letters chosen, log-likelihoods of " A" to " D") as the suite asks in plain form."""
    letters = letter_tokens(tokenizer)
    prompts = question_prompts("forget", questions, tokenizer, compared=False)
    prompts = [prompt for prompt in prompts if prompt.form == "plain"]
    chosen = [-1] * len(questions)
    scores = [[0.0]] * len(questions)
    for batch in batches(prompts, pad_id=0, vocab_size=len(tokenizer)):
        logits = runner.logits(batch.input_ids, batch.attention_mask)
        likelihoods = letter_log_likelihoods(logits, letters)[..., 1]
        best = best_letters(logits, letters.plain)
        for prompt, letter, row in zip(batch.prompts, best, likelihoods.tolist(), strict=True):
            chosen[prompt.item], scores[prompt.item] = letter, row
    return chosen, scores


def same_as_ours(
    result: HarnessResult, runner: Runner, questions: Mapping[str, Sequence[Question]], tok: Any
) -> None:
    for task, asked in questions.items():
        chosen, scores = plain_scores(runner, asked, tok)
        found = [answer for answer in result.answers if answer.task == task]
        assert [answer.item for answer in found] == list(range(len(asked)))
        assert [answer.answer for answer in found] == [question.answer for question in asked]
        assert [answer.chosen for answer in found] == chosen
        for answer, expected in zip(found, scores, strict=True):
            assert answer.log_likelihoods == pytest.approx(expected, abs=1e-4)
        right = [letter == question.answer for letter, question in zip(chosen, asked, strict=True)]
        assert result.accuracy(task) == pytest.approx(sum(right) / len(right))


def test_every_engine_answers_the_harness_as_it_answers_us(
    work: Path, recipe: Recipe, tokenizer: Any, questions: dict[str, list[Question]]
) -> None:
    from export.carriers.onnx.onnx_folder import export_onnx
    from verify.engines.onnx_runner import open_runner

    oracle = Oracle(load_base(recipe), load_sites(recipe))
    export_onnx(work / "checkpoint")
    found: dict[str, HarnessResult] = {}
    with (
        TorchRunner(work / "checkpoint") as checkpoint,
        open_runner(work / "checkpoint", threads=1) as onnx,
    ):
        checkpoint.load("float32")
        base = HookedRunner("base", oracle.model)
        reference = HookedRunner("reference", oracle.model, oracle)
        for runner in (base, reference, checkpoint, onnx):
            found[runner.name] = run_harness(runner, tokenizer, questions, batch_size=3)
            same_as_ours(found[runner.name], runner, questions, tokenizer)
    assert oracle.tokens_fired > 0
    likelihoods = {
        name: torch.tensor([answer.log_likelihoods for answer in result.answers])
        for name, result in found.items()
    }
    assert (likelihoods["base"] - likelihoods["reference"]).abs().max() > 1e-2
    for name in ("checkpoint", "onnx"):
        torch.testing.assert_close(likelihoods[name], likelihoods["reference"], rtol=0, atol=1e-4)


GIT_CONFIG = """
[core]
    repositoryformatversion = 1
[extensions]
    partialClone = origin
[remote "origin"]
    url = {here}
    promisor = true
    uploadpack = "touch {marker}; false"
"""


def test_nothing_of_the_current_folder_is_run(
    recipe: Recipe,
    tokenizer: Any,
    questions: dict[str, list[Question]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The harness asks git, whose `.git/config` says what it runs, and `python -m pip`."""
    here, marker = tmp_path / "here", tmp_path / "marker"
    for name in ("objects", "refs/heads"):
        (here / ".git" / name).mkdir(parents=True)
    (here / ".git/config").write_text(GIT_CONFIG.format(here=here, marker=marker))
    (here / ".git/HEAD").write_text("ref: refs/heads/main\n")
    (here / ".git/refs/heads/main").write_text(f"{'1' * 40}\n")
    (here / "pip.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.chdir(here)
    before = {name: os.environ.get(name) for name in ("GIT_DIR", "PYTHONSAFEPATH")}
    found = run_harness(HookedRunner("base", load_base(recipe)), tokenizer, questions, limit=1)
    assert found.results["git_hash"] is None and not marker.exists()
    assert {name: os.environ.get(name) for name in before} == before


def test_the_stock_command_gives_the_same(
    work: Path, tokenizer: Any, questions: dict[str, list[Question]], tmp_path: Path
) -> None:
    write_tasks(tmp_path, questions)
    folder, out = work / "checkpoint", tmp_path / "out"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf"]
    command += ["--model_args", f"pretrained={folder},trust_remote_code=True"]
    command += ["--tasks", ",".join(questions), "--include_path", str(tmp_path)]
    command += ["--device", "cpu", "--batch_size", "4", "--output_path", str(out), "--log_samples"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    with TorchRunner(folder) as runner:
        runner.load("float32")
        ours = run_harness(runner, tokenizer, questions)
        same_as_ours(ours, runner, questions, tokenizer)
    (results,) = out.rglob("results_*.json")
    stock = json.loads(results.read_text())
    for task in questions:
        assert stock["results"][task]["acc,none"] == ours.accuracy(task)
        assert stock["configs"][task]["doc_to_text"] == ours.results["configs"][task]["doc_to_text"]
        (samples,) = out.rglob(f"samples_{task}_*.jsonl")
        mine = [answer for answer in ours.answers if answer.task == task]
        rows = sorted(
            (json.loads(line) for line in samples.read_text().splitlines()),
            key=lambda row: row["doc_id"],
        )
        for row, answer in zip(rows, mine, strict=True):
            pairs = row["filtered_resps"]
            theirs = [float(pair[0]) for pair in pairs]
            assert answer.log_likelihoods == pytest.approx(theirs, abs=1e-4)
            assert [str(pair[1]) == "True" for pair in pairs] == list(answer.greedy)
            assert row["acc"] == float(answer.chosen == answer.answer)


def test_the_result_is_the_harness_own_json(
    recipe: Recipe, tokenizer: Any, questions: dict[str, list[Question]]
) -> None:
    runner = HookedRunner("base", load_base(recipe))
    result = run_harness(runner, tokenizer, questions, limit=2)
    assert json.loads(json.dumps(result.results)) == result.results
    assert {"results", "configs", "versions", "n-shot", "config", "date"} <= set(result.results)
    assert "samples" not in result.results
    assert result.results["n-samples"]["wmdp"] == {"original": 7, "effective": 2}
    assert [(answer.task, answer.item) for answer in result.answers] == [
        ("wmdp", 0), ("wmdp", 1), ("mmlu", 0), ("mmlu", 1),
    ]  # fmt: skip


def test_what_cannot_be_scored_is_one_line(
    recipe: Recipe,
    tokenizer: Any,
    questions: dict[str, list[Question]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = HookedRunner("base", None)
    for name in ("Upper", "a b", "../x", ""):
        with pytest.raises(HarnessError, match="expected a name of a to z"):
            write_tasks(tmp_path, {name: questions["wmdp"]})
    assert not list(tmp_path.iterdir())
    with pytest.raises(HarnessError, match="lm-eval task nosuch_task: cannot be loaded") as caught:
        run_harness(runner, tokenizer, ["nosuch_task"])
    assert "\n" not in str(caught.value)

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(HarnessError, match=r"wmdp_bio: cannot be loaded \(no route\)"):
        run_harness(runner, tokenizer, ["wmdp_bio"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(HarnessError, match=r"pip install 'bakeout\[eval\]'"):
        run_harness(runner, tokenizer, questions)


def test_the_harness_own_tasks_come_from_the_hub_by_name(
    recipe: Recipe, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its `wmdp` group, with rows of ours in place of the hub's."""
    import datasets

    asked: list[tuple[Any, Any]] = []
    row = {"question": "which?", "choices": ["w", "x", "y", "z"], "answer": 2}

    def load_dataset(path: str, name: str | None = None, **_: Any) -> Any:
        asked.append((path, name))
        return datasets.DatasetDict({"test": datasets.Dataset.from_list([row, row])})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    runner = HookedRunner("base", load_base(recipe))
    result = run_harness(runner, tokenizer, ["wmdp"])
    assert {name for path, name in asked if path == "cais/wmdp"} == {
        "wmdp-bio",
        "wmdp-chem",
        "wmdp-cyber",
    }
    assert len(result.answers) == 6
    topic = {"wmdp_bio": "biology", "wmdp_chem": "chemistry", "wmdp_cyber": "cybersecurity"}
    same = {
        task: [Question("which?", ("w", "x", "y", "z"), 2, about, row=n) for n in (1, 2)]
        for task, about in topic.items()
    }
    same_as_ours(result, runner, same, tokenizer)
    assert result.accuracy("wmdp") in (0.0, 1 / 3, 2 / 3, 1.0)


def test_cloze_form_scores_as_the_harness_own_continuation_tasks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The miniature under the harness's own Hugging Face model and its own task, prompts and
    arithmetic included, with rows of ours in place of the hub's.
    """
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    recipe = Recipe.load(MINIATURE / "recipe.toml")
    tokenizer, model = load_tokenizer(recipe), load_base(recipe)
    path = "questions/retain_test.jsonl"
    asked = load_questions(QuestionSource(path=path, topic="anatomy"), recipe)[::18]
    texts = ("in the old town by the river", "Vo", "two words", "a bell that nobody rings")
    asked = [replace(question, topic="anatomy") for question in asked]
    asked += [replace(question, choices=texts) for question in asked[:6]]  # of several tokens
    rows = [{"question": q.question, "choices": q.choices, "answer": q.answer} for q in asked]
    data = datasets.Dataset.from_list(rows)
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *_, **__: datasets.DatasetDict(test=data, dev=data)
    )
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=5),
        tasks=["mmlu_anatomy_continuation"],
        task_manager=TaskManager(),
        num_fewshot=0,
    )
    samples = sorted(found["samples"]["mmlu_anatomy_continuation"], key=lambda s: s["doc_id"])
    scores = found["results"]["mmlu_anatomy_continuation"]

    def ours(runner: Runner, questions: Sequence[Question]) -> tuple[Answers, list[list[float]]]:
        prompts = question_prompts("q", questions, tokenizer, compared=False, forms=["cloze"])
        answers = Answers(letter_tokens(tokenizer))
        each: dict[int, list[float]] = {}
        for batch in batches(prompts, pad_id=0, vocab_size=len(tokenizer)):
            seen = runner.read(batch.input_ids, batch.attention_mask, batch.ends, batch.scored)
            assert len(seen.logits) == 0  # losses are enough
            for row, _, likelihoods in (said := answers.found(batch, seen.logits, seen.losses)):
                each[batch.prompts[row].item] = likelihoods
            answers.take(batch, said)
        return answers, [each[item] for item in range(len(questions))]

    runner = HookedRunner("base", model)
    answers, likelihoods = ours(runner, asked)
    assert len(samples) == len(asked) == 18
    for item, (sample, mine) in enumerate(zip(samples, likelihoods, strict=True)):
        theirs = [float(pair[0]) for pair in sample["filtered_resps"]]
        assert mine == pytest.approx(theirs, abs=1e-4)
        _, alone = ours(runner, [asked[item]])  # whatever else is in a batch
        assert alone[0] == pytest.approx(mine, abs=1e-4)
        made, right = answers.by_text["q", "cloze", item], asked[item].answer
        assert (sample["acc"], sample["acc_norm"]) == (
            float(made["summed"] == right),
            float(made["per_character"] == right),
        )
    share = accuracy(asked, answers.chosen("q", "cloze", len(asked))).accuracy
    assert scores["acc_norm,none"] == pytest.approx(share) != scores["acc,none"]


SUBSETS = 6


@pytest.fixture
def local_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The shipped task files over rows of the data sets' columns here; gives the rows."""
    import yaml

    rows = [
        {
            "question": f" Where is {i}? ",
            "choices": ["in", "the tower", "on the hill", "at"],
            "answer": (3 * i) % 4,
            "prompt": "not read",
            "reasoning": "not read",
        }
        for i in range(5)
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    for file in harness_tasks.TASKS.glob("*.yaml"):
        task = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert task["dataset_path"].startswith("EleutherAI/wmdp_bio_")
        task["dataset_path"] = "json"
        task["dataset_kwargs"] = {
            "data_files": {task["test_split"]: str(data)},
            "cache_dir": str(tmp_path / "cache"),
        }
        (tmp_path / file.name).write_text(json.dumps(task))
    monkeypatch.setattr("verify.evidence.tasks.harness.TASKS", tmp_path)
    harness._own_tasks.cache_clear()
    return rows


def test_tasks_of_2025_run_by_their_names(
    local_tasks: list[dict[str, Any]], recipe: Recipe, tokenizer: Any
) -> None:
    try:
        names = ["wmdp_bio_robust", "wmdp_bio_cloze_verified"]
        runner = HookedRunner("base", load_base(recipe))
        found = run_harness(runner, tokenizer, names)
    finally:
        harness._own_tasks.cache_clear()
    scores = {score.task: score for score in found.scores}
    assert len(scores) == SUBSETS + 2
    topics = [scores[name] for name in scores if name.startswith("wmdp_bio_robust::")]
    assert [topic.n for topic in topics] == [5] * SUBSETS
    group = scores["wmdp_bio_robust"]
    assert group.accuracy == pytest.approx(sum(t.accuracy for t in topics) / SUBSETS)
    answers = [row["answer"] for row in local_tasks]
    for name in names:
        guess = scores[name].guess
        assert guess is not None and guess.at_random == 0.25
        assert guess.longest == pytest.approx(answers.count(2) / 5)
    assert (group.guess or guess).n == 5 * SUBSETS
    # The prompts, to the letter, and the likelihood of whole texts per character.
    texts = [
        f"The following are multiple choice questions (with answers) about biology.\n\n"
        f"{row['question'].strip()}\nA. in\nB. the tower\nC. on the hill\nD. at\nAnswer:"
        for row in local_tasks
    ]
    last = last_logits(runner, token_ids(texts, tokenizer), tokenizer)
    plain = best_letters(last, letter_tokens(tokenizer).plain)
    right = sum(a == b for a, b in zip(plain, answers, strict=True))
    assert topics[0].accuracy == pytest.approx(right / 5)
    cloze = [answer for answer in found.answers if answer.task == "wmdp_bio_cloze_verified"]
    lengths = np.array([len(choice) for choice in local_tasks[0]["choices"]])
    chosen = [int((np.array(a.log_likelihoods) / lengths).argmax()) for a in cloze]
    right = sum(a == b for a, b in zip(chosen, answers, strict=True))
    assert scores["wmdp_bio_cloze_verified"].accuracy == pytest.approx(right / 5)


def test_shipped_tasks_are_known_by_name(tmp_path: Path) -> None:
    harness.check_harness(["wmdp_bio_robust", "wmdp_bio_cloze_verified", "wmdp_bio"], tmp_path)
