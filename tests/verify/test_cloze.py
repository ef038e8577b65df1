"""A whole verification where the cloze form leads: every engine, every kind that asks questions."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bake.questions.multiple_choice import load_questions
from bake.recipe import Recipe
from bake.stock import load_base, load_tokenizer
from export.carriers.onnx.onnx_folder import export_onnx
from tests.engines import InProcess
from tests.folders import N_FORGET, N_RETAIN, baked_world, recipe_variant
from tests.logits import every_logit
from verify.engines.runners import HookedRunner, Runner
from verify.options import Options
from verify.reference.oracle import Oracle
from verify.reference.whole_sae import load_sites
from verify.report.findings import VerifyReport
from verify.report.measures import Share
from verify.run import verify_folder

ASKING = frozenset({"parity", "choices", "loss", "known", "controls", "robustness"})


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    work = baked_world(tmp_path_factory.mktemp("work"), [1, 5, 9])
    export_onnx(work / "checkpoint")
    return recipe_variant(work, "cloze", lambda data: data["verify"].update(prompt="cloze"))


@pytest.fixture(scope="module")
def report(recipe: Recipe) -> VerifyReport:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("verify.engines.engines.TorchRunner", InProcess)
        folder = recipe.folder / "checkpoint"
        return verify_folder(folder, recipe, ASKING, options=Options(budget=3))


def right_by_text(runner: Runner, recipe: Recipe, source: str) -> dict[str, int]:
    """By each length, how many are right: every choice read alone, every logit formed."""
    assert recipe.verify is not None
    tokenizer: Any = load_tokenizer(recipe)
    found = dict.fromkeys(("summed", "per_character", "per_token"), 0)
    for question in load_questions(getattr(recipe.verify, f"{source}_questions"), recipe):
        about = f" about {question.topic}" if question.topic else ""
        text = f"The following are questions (with answers){about}.\n\n"
        text += f"Question: {question.question}\nAnswer:"
        each: dict[str, list[float]] = {by: [] for by in found}
        for choice in question.choices:
            before = tokenizer(text, return_tensors="pt")["input_ids"]
            ids = tokenizer(f"{text} {choice}", return_tensors="pt")["input_ids"]
            assert ids[0, 0] == before[0, 0] == 2  # BOS
            logits = every_logit(runner, ids, ids.new_ones(ids.shape))[0].double()
            own = range(before.shape[1], ids.shape[1])
            total = sum(float(logits[at - 1].log_softmax(-1)[ids[0, at]]) for at in own)
            each["summed"].append(total)
            each["per_character"].append(total / len(choice))
            each["per_token"].append(total / len(own))
        for by, likelihoods in each.items():
            found[by] += likelihoods.index(max(likelihoods)) == question.answer
    return found


def test_every_engine_is_asked_and_passes(report: VerifyReport) -> None:
    assert report.failures == () and report.prompt == "cloze"
    names = [engine.name for engine in report.engines]
    assert names == ["base", "reference", "checkpoint", "onnx"]
    for engine in report.engines:
        forms = [(a.source, a.form) for a in engine.answers]
        assert forms == [(s, f) for s in ("forget", "retain") for f in ("chat", "plain", "cloze")]
        assert engine.forget is not None and set(engine.forget.measured) == {
            *("chat", "plain", "cloze")
        }
        assert engine.alignment is None or 0 <= engine.alignment <= 1
        parity = engine.parity
        assert parity is not None and (engine.name == "base" or parity.flips == ())
    written = report.to_dict()
    json.dumps(written, allow_nan=False)
    assert set(written["engines"]["onnx"]["forget"]) == {"chat", "plain", "cloze"}


def test_base_and_reference_are_right_where_each_choice_alone_says_so(
    report: VerifyReport, recipe: Recipe
) -> None:
    model = load_base(recipe)
    oracle = Oracle(model, load_sites(recipe))
    differ = False
    for name, runner in (
        ("base", HookedRunner("base", model)),
        ("reference", HookedRunner("reference", model, oracle)),
    ):
        engine = report.engine(name)
        assert engine is not None
        for source, n in (("forget", N_FORGET), ("retain", N_RETAIN)):
            (found,) = (a for a in engine.answers if (a.source, a.form) == (source, "cloze"))
            right = right_by_text(runner, recipe, source)
            assert found.by_text is not None
            assert {by: share.right for by, share in vars(found.by_text).items()} == right
            assert found.share == found.by_text.per_character
            assert found.share.n == n
            differ |= len(set(right.values())) > 1
            if name == "base":
                (known,) = (k for k in report.known if k.source == source)
                assert (known.form, known.known) == ("cloze", right["per_character"])
                assert found.known == Share(known.known, known.known)
    assert differ


def test_text_loss_is_that_of_text_alone(report: VerifyReport, recipe: Recipe) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("verify.engines.engines.TorchRunner", InProcess)
        plain = Recipe.load(recipe.folder / "recipe.toml")
        alone = verify_folder(recipe.folder / "checkpoint", plain, frozenset({"loss"}))
    for engine in alone.engines:
        same = report.engine(engine.name)
        assert same is not None and engine.loss == pytest.approx(same.loss, rel=1e-6)
        if engine.loss_detail is not None and same.loss_detail is not None:
            split, before = same.loss_detail.split, engine.loss_detail.split
            assert split.before.n_tokens == before.before.n_tokens
            assert split.after.n_tokens == before.after.n_tokens


def test_examples_are_of_different_questions(report: VerifyReport) -> None:
    for source in ("forget", "retain"):
        rows = [of.row for of in report.examples if of.source == source]
        assert len(rows) == len(set(rows)) == 3
    assert {of.form for of in report.examples} == {"cloze", "text"}


def test_controls_and_attacks_are_asked_in_it_and_a_search_for_a_letter_is_not(
    report: VerifyReport,
) -> None:
    assert all(of.forget is not None and of.forget.n == N_FORGET for of in report.controls)
    assert report.robustness is not None and report.robustness.form == "cloze"
    found = {attack.name: attack for attack in report.robustness.attacks}
    checkpoint = report.engine("checkpoint")
    assert checkpoint is not None and checkpoint.forget is not None
    asked = found["as asked"].unlearned
    assert asked is not None and asked.accuracy == checkpoint.forget.cloze
    for name in ("hints", "padding"):
        assert found[name].unlearned is not None, name
    assert found["suffix"].unlearned is None
    assert found["suffix"].how == "the search is for a letter; cloze form asks for none"
