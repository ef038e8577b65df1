"""What `make demo` left, held to what the README says of it. It is run by `make demo`: to bake,
train and measure all of it once more would take too long for a test.

Trained weights differ by seed and machine (34 to 40 of 120 questions over four seeds), so there is
room above what is aimed at (0.05, 0.97 and 0.02 for merged weights, 0.35 and 0.95 for RMU).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import bakeout
from bake.rounding import BAR
from bakeout.verbs.demo import MINIATURE
from verify.audit.audit_report import read_audit
from verify.audit.audit_words import worst_kept

RUN = Path(__file__).parents[2] / "runs" / "demo"


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RUN / "report.json").read_text())
    return found


@pytest.fixture(scope="module")
def engines(report: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = report["engines"]
    return found


def kept(engines: dict[str, Any], name: str) -> float:
    """The share of what the base knows of everything else."""
    return float(engines[name]["retain"]["chat"] / engines["base"]["retain"]["chat"])


def test_it_forgets_keeps_the_rest_and_is_the_hook(
    report: dict[str, Any], engines: dict[str, Any]
) -> None:
    assert report["verdict"] == "pass" and report["scope"] == "full"
    base, reference, checkpoint = (engines[of] for of in ("base", "reference", "checkpoint"))
    assert base["forget"]["chat"] >= 0.97 and base["retain"]["chat"] >= 0.97
    assert checkpoint["forget"] == reference["forget"]
    assert checkpoint["forget"]["chat"] <= 0.30 and checkpoint["forget"]["plain"] <= 0.35
    assert checkpoint["retain"]["chat"] >= 0.985 * base["retain"]["chat"]
    assert 0 <= checkpoint["loss_added"] <= 0.05
    assert checkpoint["parity"]["answer_flips"] == 0
    assert checkpoint["parity"]["tokens_fired"] > 0
    compiled, adapter = (engines[name] for name in ("compiled", "adapter"))
    assert compiled["parity"]["mean_kl"] <= 1e-5 and compiled["parity"]["answer_flips"] == 0
    assert compiled["forget"] == adapter["forget"] == reference["forget"]
    for name in ("checkpoint", "onnx", "compiled", "adapter"):
        assert engines[name]["parity"]["rounding"]["worst"] <= BAR
    sizes = [path.stat().st_size for path in (RUN / "adapter").iterdir()]
    assert sum(sizes) <= 1_000_000


def test_what_it_forgot_is_counted(report: dict[str, Any], engines: dict[str, Any]) -> None:
    forget, retain = report["known"]
    assert forget["known"] >= 100 and forget["still_known"]["right"] <= 0.2 * forget["known"]
    assert retain["still_known"] == {"right": retain["known"], "n": retain["known"]}
    loss = engines["checkpoint"]["loss_detail"]
    assert loss["split"]["before"]["max_abs"] <= loss["rounding"] < 1e-2
    assert loss["split"]["before"]["n_tokens"] > 10_000
    assert [control["name"] for control in report["controls"]] == [
        "reconstruction",
        "zero",
        "random_decoder",
        "random_features",
    ]
    tallies = report["completions"]["tallies"]
    said = {(tally["source"], tally["variant"]): tally for tally in tallies}
    assert said["topic", "base"]["right"]["right"] >= 38
    assert said["topic", "unlearned"]["right"]["right"] <= 10
    assert said["generic", "unlearned"]["as_base"] == {"right": 42, "n": 42}
    attacks = {attack["name"]: attack for attack in report["robustness"]["attacks"]}
    assert {"as asked", "reworded: training", "hints", "padding", "suffix"} <= set(attacks)
    assert all(attack["unlearned"] is not None for attack in attacks.values())
    plain = {score["task"]: score["accuracy"] for score in engines["checkpoint"]["harness"]}
    assert plain["forget"] == engines["checkpoint"]["forget"]["plain"]
    kept = json.loads((RUN / "lm-eval" / "checkpoint-local.json").read_text())
    assert kept["results"]["forget"]["acc,none"] == plain["forget"]


def test_genai_answers_in_words_what_torch_does() -> None:
    """From text to text, each with its own tokenizer, and not the base's words."""
    genai = pytest.importorskip("onnxruntime_genai")
    assert bakeout  # registers the clamped classes
    folder = RUN / "checkpoint"
    words, clamped, base = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(MINIATURE / "model"),
    )
    model = genai.Model(str(folder))
    tokenizer = genai.Tokenizer(model)
    asked = genai.GeneratorParams(model)
    asked.set_search_options(max_length=48, do_sample=False)
    others = 0
    for line in (MINIATURE / "completions.jsonl").read_text().splitlines()[:8]:
        prompt = "<bos>" + json.loads(line)["prompt"]
        generator = genai.Generator(model, asked)
        generator.append_tokens(tokenizer.encode(prompt))
        while not generator.is_done():
            generator.generate_next_token()
        ids = words(prompt, add_special_tokens=False, return_tensors="pt")
        ours, theirs = (
            words.decode(
                of.generate(**ids, max_length=48, do_sample=False)[0], skip_special_tokens=True
            )
            for of in (clamped, base)
        )
        assert tokenizer.decode(generator.get_sequence(0)) == ours
        others += ours != theirs
    assert others >= 4


def test_merged_weights_do_what_the_clamp_does(engines: dict[str, Any]) -> None:
    teacher = engines["reference"]["forget"]["chat"]
    assert engines["merged"]["forget"]["chat"] <= teacher + 0.12
    assert kept(engines, "merged") >= 0.95
    distilled = json.loads((RUN / "merged" / "manifest.json").read_text())["distilled"]
    assert distilled["held_out"]["retain_kl"] <= 0.04


def test_rmu_is_a_fair_baseline(engines: dict[str, Any]) -> None:
    assert engines["rmu"]["forget"]["chat"] <= 0.45
    assert kept(engines, "rmu") >= 0.9


def test_what_an_audit_brings_back() -> None:
    found = read_audit(RUN / "audit.json")
    checkpoint, merged = found.folders
    assert checkpoint.stripped is not None and checkpoint.stripped.forget["chat"].right >= 116
    assert checkpoint.worst is not None and checkpoint.worst.attack == "strip: delete"
    for kept in (worst_kept(checkpoint), merged.worst):
        assert kept is not None and kept.accuracy <= 0.5
    with_base = [sweep.accuracy for sweep in merged.sweeps if "base" in sweep.needs]
    assert max(with_base) >= 0.8  # else nobody looked
