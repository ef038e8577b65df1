"""Cards: what they say before and after a measurement, and that names stay text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token

from bake.questions.forms import FORMS
from bake.recipe import Verify
from model_cards.facts import CardFacts, ClampFacts
from model_cards.render import as_text, render
from tests.reports import (
    FAILURE,
    HOSTILE,
    STRUCTURE,
    cloze_evidence,
    every_text,
    full_evidence,
    full_report,
    rich_report,
)
from tests.verify.audit.audited import an_audit
from verify.audit.audit_words import lines_of_audit, sentences
from verify.report.findings import EngineReport

SAE = "gemma-scope-2b-pt-res-canonical/layer_7/width_16k/canonical"
CLAMP = ClampFacts(
    7, "blocks.7.hook_resid_post", "clamp", {"value": -300.0, "exempt_bos": True}, [11766, 9], SAE
)
VERIFY = Verify.model_validate(
    {
        "forget_questions": {"dataset": "cais/wmdp", "config": "wmdp-bio"},
        "retain_questions": {"path": "retain.jsonl"},
        "text": {"dataset": "Salesforce/wikitext", "config": "w", "split": "test"},
    }
)


def facts(**changes: Any) -> CardFacts:
    found = CardFacts(
        base="google/gemma-2-2b",
        revision="abc",
        license="gemma",
        carrier="layer",
        exact=True,
        clamps=(CLAMP,),
        verify=VERIFY,
        unmeasured="not measured",
    )
    return replace(found, **changes)


def rendered(card: str) -> list[Token]:
    """The card's Markdown as a reader's renderer parses it."""
    body = card.split("\n---\n", 1)[1]
    return list(_flat(MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)))


def _flat(tokens: list[Token] | None) -> Iterator[Token]:
    for token in tokens or []:
        yield token
        yield from _flat(token.children)


def text_of(card: str) -> str:
    kinds = ("text", "code_inline", "fence", "softbreak")
    return " ".join("".join(t.content or " " for t in rendered(card) if t.type in kinds).split())


def test_front_matter_names_base_licence_and_tags() -> None:
    data = ModelCard(render(facts())).data.to_dict()
    assert data["base_model"] == "google/gemma-2-2b"
    assert data["base_model_relation"] == "finetune"
    assert (data["license"], data["library_name"]) == ("gemma", "transformers")
    assert data["pipeline_tag"] == "text-generation"
    assert {"unlearning", "sparse-autoencoder", "custom_code"} <= set(data["tags"])
    assert "model-index" not in data
    local = ModelCard(render(facts(base="model", revision=None, license="apache-2.0"))).data
    assert local.to_dict().keys().isdisjoint({"base_model", "base_model_relation"})


def test_figures_are_in_the_index_and_in_the_text() -> None:
    card = render(facts(), rich_report())
    (index,) = ModelCard(card).data.to_dict()["model-index"]
    forget, retain, text = index["results"]
    assert forget["dataset"] == {
        "name": "cais/wmdp (wmdp-bio)",
        "type": "cais/wmdp",
        "config": "wmdp-bio",
        "split": "test",
    }
    assert [metric["value"] for metric in forget["metrics"]] == [0.5, 0.25]  # chat, plain
    assert all(metric["type"] == "accuracy" for metric in forget["metrics"])
    assert retain["dataset"]["type"] == "retain.jsonl" and "split" not in retain["dataset"]
    assert text["metrics"][0]["value"] == 0.25
    assert all(result["source"]["url"].startswith("https://") for result in index["results"])
    said = text_of(card)
    assert "bakeout verify: pass, scope full, float32; 4 questions to be forgotten" in said
    assert "0.500 (0.15 to 0.85)" in said  # Wilson, 2 of 4
    assert "base has back" not in said and "+0.2500" in said


def test_a_failed_verification_says_so_and_what_failed() -> None:
    said = text_of(render(facts(), rich_report(failures=(FAILURE,)), unverified=True))
    assert "bakeout verify: fail" in said
    assert "Out of tolerance: parity: checkpoint: max_abs_logit is 0.0002" in said
    assert "Unverified." in said
    assert "Unverified." not in render(facts(), rich_report())


@pytest.mark.parametrize("unmeasured", ["not measured", "not measured yet", "not measured here"])
def test_what_was_not_measured_is_named(unmeasured: str) -> None:
    card = render(facts(unmeasured=unmeasured))
    for row in ("relearn: fine-tune on the topic", "accuracy on what is to be kept, chat form"):
        (line,) = (line for line in card.splitlines() if row in line)
        assert line.count(unmeasured) >= 1
        assert not any(digit in line for digit in "0123456789")
    assert f"Matches the hooked reference: {unmeasured}." in card


def test_a_part_of_the_evidence_leaves_the_rest_unmeasured() -> None:
    report = replace(full_report(), engines=(EngineReport("base", loss=1.0, loss_added=0.0),))
    card = render(facts(), replace(report, scope="loss"))
    (line,) = (line for line in card.splitlines() if line.startswith("| base |"))
    assert line.count("not measured") == 9 and "+0.0000" in line
    (line,) = (line for line in card.splitlines() if line.startswith("| loss on text"))
    assert line == "| loss on text, nats/token | 1.0000 | not measured |"


def test_stripping_gives_the_base_back_and_rounding_is_measured() -> None:
    base, engine = full_report().engines
    base = replace(base, forget=replace(base.forget, chat=1.0))
    report = replace(full_report(), engines=(base, engine, replace(engine, name="onnx-int4")))
    lines = render(facts(), report).splitlines()
    assert any(line.startswith("| strip") and "1.000 (0.51 to 1.00)" in line for line in lines)
    assert "| round the weights: onnx-int4 | 0.500 (0.15 to 0.85) |" in lines
    compiled = render(facts(carrier="compiled", exact=False), report).splitlines()
    assert "| strip | not measured |" in compiled


def test_what_was_found_of_the_forgetting_is_in_the_text() -> None:
    card = render(facts(), full_evidence())
    for line in (
        "| known questions to be forgotten | base 96 of 120 in all 24 orders; checkpoint 3 of "
        "those, 0.307 of their single orders |",
        "| alignment, 0 to 1 | 0.831 |",
        "| unlearning score, 0 to 1 | 0.719 |",
        "| wmdp\\_bio | 0.950 | 0.300 |",
        "| zero | the same features set to 0 | 0.925 (0.86 to 0.96) | 0.950 (0.90 to 0.97) | "
        "+0.0021 |",
        "| topic, unlearned | 2 of 18 | 4 of 18 | 0 of 18 |",
        "| generic, unlearned | – | 0 of 9 | 8 of 9 |",
        "| accuracy on known questions to be kept, chat form | 1.000 (0.97 to 1.00) | "
        "0.938 (0.88 to 0.97) |",
        "| loss added to text before any firing, nats/token | 0 | 0 |",
        "| loss added to text from the first firing on, nats/token | 0 | +0.1254 |",
        "| generic prompts continued as the base does | 9 | 8 |",
        "| relearn: fine-tune on the topic | not measured |",
        "| hints: Four solved ones first. | 0.525 (0.44 to 0.61); the base 0.975 (0.93 to 0.99) |",
        "| suffix | not measured: needs a budget, and none was given |",
        "| weights: onnx-int4: Weights of 4 bits. | 0.258 (0.19 to 0.34); the base "
        "0.950 (0.90 to 0.98) |",
    ):
        assert line in card.splitlines(), line
    said = text_of(card)
    assert "questions to be forgotten against the base, chat form (McNemar's test)" in said
    assert "79 lost, 1 gained, p = 4.1e-23" in said
    assert "onnx-int4 says A to at least 97 % of the questions" in said
    assert "round the weights:" not in card  # the attack says it already
    assert "Lumen" not in card and "spell" not in card  # no text of a completion, no token


def test_the_form_that_leads_is_in_the_card() -> None:
    card = render(facts(), cloze_evidence())
    lines = card.splitlines()
    (header,) = (line for line in lines if line.startswith("| engine |"))
    forms = [f"{side}, {form} form" for side in ("forget", "retained") for form in FORMS]
    assert [cell.strip() for cell in header.split("|")[2:8]] == forms
    (row,) = (line for line in lines if line.startswith("| checkpoint |"))
    assert row.count("|") == header.count("|") and "0.350 (0.27 to 0.44)" in row
    for line in (
        "| known questions to be forgotten | base 96 of 120 in cloze form; checkpoint 3 of those |",
        "| accuracy to be forgotten, cloze form, by the length that divides | 0.325 summed, "
        "0.350 per character, 0.308 per token |",
        "| attack | forget accuracy afterwards, cloze form |",
        "| accuracy on what is to be kept, cloze form | 0.988 (0.96 to 1.00) | "
        "0.975 (0.94 to 0.99) |",
    ):
        assert line in lines, line
    said = text_of(card)
    assert "answers right in cloze form." in said and "24 orders" not in said
    assert "whose own text is likeliest after the question, per character" in said
    (index,) = ModelCard(card).data.to_dict()["model-index"]
    names = {m["name"]: result for result in index["results"] for m in result["metrics"]}
    asked = names["accuracy, cloze form (to be forgotten, lower is better)"]
    assert asked["source"]["name"].endswith(
        "cloze form of lm-evaluation-harness's continuation tasks"
    )


def test_known_questions_and_the_harness_are_in_the_index() -> None:
    (index,) = ModelCard(render(facts(), full_evidence())).data.to_dict()["model-index"]
    by_name = {result["dataset"]["name"]: result for result in index["results"]}
    known = [m for m in by_name["cais/wmdp (wmdp-bio)"]["metrics"] if "known" in m["name"]]
    assert [m["value"] for m in known] == [28 / 96, 27 / 96]  # chat, plain
    task = by_name["wmdp_bio (lm-evaluation-harness)"]
    assert (task["dataset"]["type"], task["metrics"][0]["value"]) == ("wmdp_bio", 0.3)
    assert task["source"]["url"].endswith("lm-evaluation-harness")
    assert by_name["mmlu (lm-evaluation-harness)"]["metrics"][0]["type"] == "accuracy"


@pytest.mark.parametrize("keep", [STRUCTURE, frozenset[str]()], ids=["text", "structure"])
def test_hostile_evidence_is_text_in_yaml_and_markdown(keep: frozenset[str]) -> None:
    plain = rendered(render(facts(), every_text(full_evidence(), lambda text: text + "x", keep)))
    hostile = every_text(
        full_evidence(), lambda text: f"{text}\n---\n{HOSTILE} | **b** ![i](u)", keep
    )
    card = render(facts(), hostile)
    tokens = rendered(card)
    assert not [t for t in tokens if t.type in ("html_block", "html_inline", "image", "s_open")]
    for kind in ("link_open", "strong_open", "heading_open", "tr_open", "td_open", "fence"):
        assert sum(t.type == kind for t in tokens) == sum(t.type == kind for t in plain), kind
    assert "\x1b" not in card and "\u202e" not in card
    assert ModelCard(card).data.to_dict()["license"] == "gemma"


def test_what_an_attacker_gets_back_is_said() -> None:
    report = an_audit()
    for audit in report.folders:
        said = text_of(render(facts(), audited=(audit, report.level)))
        for sentence in sentences(audit):
            assert sentence in said
        for line in lines_of_audit(audit):
            assert f"{line.attack} ({line.needs}; {line.effort}){line.right}" in said
        assert "relearn: fine-tune on the topic" not in said
    assert "relearn: fine-tune on the topicnot measured" in text_of(render(facts()))


def test_gemmas_terms_go_with_gemma_only() -> None:
    said = text_of(render(facts()))
    for part in (
        "Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms",
        "Statement of modification:",
        "section 3.2",
        "Prohibited Use Policy",
        "passes them on",
    ):
        assert part in said, part
    other = text_of(render(facts(license="apache-2.0")))
    assert "Licence: apache-2.0." in other
    assert "Terms of Use" not in other and "Prohibited" not in other


def test_the_sae_is_attributed() -> None:
    assert "Gemma Scope, by Google DeepMind" in text_of(render(facts()))
    unknown = facts(clamps=(replace(CLAMP, sae="mine"),))
    assert "mine, by whoever published it" in text_of(render(unknown))


@pytest.mark.parametrize("carrier", ["layer", "adapter", "compiled", "merged"])
def test_each_carrier_says_how_it_carries_and_loads(carrier: str) -> None:
    exact = carrier in ("layer", "adapter")
    said = text_of(render(facts(carrier=carrier, exact=exact)))
    assert ("This is exact" in said) is exact
    assert ("trust_remote_code=True" in said) is (carrier == "layer")
    assert ("custom_code" in render(facts(carrier=carrier))) is (carrier == "layer")


@pytest.mark.parametrize(
    "text",
    [
        HOSTILE,
        "x\n---\nlicense: mit\n---\n",
        "a: [b, {c: d}] # e",
        "| cell | ``` | **bold** | ~~gone~~ | ![i](http://x/y.png) | <b onclick=x>",
        "- item\n\n# heading\n\n> quote",
        "'\"&amp;&lt;script&gt;",
    ],
)
def test_hostile_names_are_text_in_yaml_and_markdown(text: str) -> None:
    clean = "".join(c for c in " ".join(text.split()) if c.isprintable())
    sites = (replace(CLAMP, sae=text, hook_point=text, method=text, parameters={text: text}),)
    report = rich_report(folder=text, warnings=(text,), failures=(replace(FAILURE, where=text),))
    base, engine = report.engines
    report = replace(report, engines=(base, replace(engine, name=text)), scope=text)
    card = render(facts(base=text, license=text, clamps=sites), report)
    data = ModelCard(card).data.to_dict()
    assert (data["license"], data["base_model"]) == (clean, clean)
    assert data["model-index"][0]["name"] == clean
    tokens = rendered(card)
    plain = rendered(render(facts(license="x"), rich_report(failures=(FAILURE,))))
    assert not [t for t in tokens if t.type in ("html_block", "html_inline", "image", "s_open")]
    for kind in ("link_open", "strong_open", "heading_open", "tr_open", "td_open", "fence"):
        assert sum(t.type == kind for t in tokens) == sum(t.type == kind for t in plain), kind
    assert text_of(card).count(clean) >= 8
    assert "\x1b" not in card and "\u202e" not in card


def test_as_text_of_harmless_names_reads_as_it_is() -> None:
    assert as_text("google/gemma-2-2b") == "google/gemma-2-2b"
