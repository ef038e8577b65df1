"""The page: what it says, in what order, that text stays text, and what a browser makes of it."""

from __future__ import annotations

import html as html_
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.folders import manifest_data
from tests.reports import (
    FAILURE,
    FLIP,
    HOSTILE,
    PARITY,
    STRUCTURE,
    cloze_evidence,
    every_text,
    full_evidence,
    full_report,
    rich_report,
)
from verify.page.html import provenance, render_html, shown, write_html
from verify.report.findings import EngineReport, VerifyReport, WorstItem
from verify.report.measures import FiredText, Items

ANCHORS = (
    *("engines", "knows", "orders", "subjects", "benchmarks", "loss", "controls"),
    *("completions", "robustness", "fires", "flips", "provenance", "limits"),
)
"""Sections, in the order of the page."""
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
needs_browser = pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")


def hostile_report() -> VerifyReport:
    parity = replace(
        PARITY,
        worst=WorstItem("retain", "plain", 7, 12, HOSTILE, 2e-4),
        flips=(replace(FLIP, question=HOSTILE), replace(FLIP, question="a" * 400)),
    )
    base, engine = full_report(parity=parity).engines
    return rich_report(
        folder=HOSTILE,
        failures=(replace(FAILURE, where=HOSTILE),),
        warnings=(HOSTILE, "b" * 300),
        engines=(base, replace(engine, name=HOSTILE), replace(engine, name="checkpoint")),
        examples=(FiredText("forget", "chat", 3, ("<bos>", HOSTILE, "c" * 300), (1,)),),
    )


def words(page: str) -> str:
    """The page's text, without markup."""
    body = page[page.index("<body>") :]
    return " ".join(html_.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def test_the_verdict_comes_first_and_says_why() -> None:
    passed = words(render_html(rich_report()))
    assert passed.index("pass") < passed.index("Scope: full") < passed.index("Engines")
    failed = words(render_html(rich_report(failures=(FAILURE,))))
    assert "fail 1 measurement is out of tolerance. parity: checkpoint: max_abs_logit" in failed
    assert failed.index("max_abs_logit is") < failed.index("Scope: full")


def test_every_section_that_has_data_is_there() -> None:
    text = words(render_html(rich_report(), (("base", "google/gemma-2-2b"),)))
    for part in (
        "forget accuracy 0.500 → 0.500",
        "retained accuracy 1.000 → 1.000",
        "something",
        "To be forgotten",
        "0.500 [0.15, 0.85]",
        "checkpoint",
        "+0.2500",
        "Worst token, in roundings",
        'retain row 7 (plain), token 12 "▁the"',
        "layer 0",
        "100.0 %",
        "forget, row 3, chat form: fired on 1 of 3 tokens",
        "Which?",
        "google/gemma-2-2b",
        "packaging, not erasure",
    ):
        assert part in text, part
    assert "<mark" in render_html(rich_report())


def test_sections_without_data_are_left_out() -> None:
    report = VerifyReport("folder", "layer", True, "integrity", ())
    text = words(render_html(report))
    assert "Nothing was run" in text and "not gathered" in text
    for part in ("Engines", "Witnesses", "Warnings", "fires", "Provenance", "differ"):
        assert part not in text, part


def test_what_has_no_tolerance_is_not_said_to_be_within_one() -> None:
    found = full_evidence()
    engines = (EngineReport("reference"), EngineReport("checkpoint"))
    asked = replace(found, scope="known", failures=(), engines=engines, items=Items(0, 0, 0))
    page = words(render_html(asked))
    assert "that engines match was not checked" in page
    assert "within tolerance" not in page and "0 questions to be forgotten" not in page


def test_every_kind_of_evidence_is_on_the_page() -> None:
    page = render_html(full_evidence(), (("base", "google/gemma-2-2b"),))
    text = words(page)
    assert re.findall(r'<section id="(\w+)">', page) == list(ANCHORS)
    assert re.findall(r'<a href="#(\w+)">', page) == list(ANCHORS)
    for part in (
        "forget accuracy 0.950 → 0.300",
        "known questions 0.292 to be forgotten, of 96",
        "alignment 0.831",
        "most under attack 0.525 forget accuracy, hints",
        "onnx-int4 says A to at least 97 % of the questions",
        "79 lost, 1 gained, p = 4.1e-23",
        "0.810 / 0.810",  # the bare letters' mass
        "A 97 %, B 2 %, C 1 %, D 1 %",
        "checkpoint, every order 0.031 [0.01, 0.09], 3 of 96",
        "rivers of the north 1.000 (0.89 to 1.00) → 1.000 (0.89 to 1.00), n = 32",
        "wmdp_bio 1,273 questions 0.950 ± 0.014 0.300 ± 0.014",
        "[+0.0010, +0.0340] 5,370 0 0 2,822 +0.1254 8.4",
        "2,822 of 8,192 tokens changed; 5,370 did not, to the last bit",
        "random_decoder the same firing, written along other features' directions +0.9876",
        "topic, unlearned 2 of 18 4 of 18 0 of 18",
        "generic, unlearned – 0 of 9 8 of 9",
        "unlearned 0.510 (0.41 to 0.61) 100 98 2",
        "unlearned is the the same as a lamp ✗ not right ○ off topic",
        "… and 10 more prompts",
        "␣spell0 0.310 → 1e-05",
        "hints 0.975 (0.93 to 0.99) → 0.525 (0.44 to 0.61), n = 120 Four solved ones first.",
        "suffix , not measured: needs a budget, and none was given",
        "What fine-tuning or a searched suffix brings back is not measured here",
    ):
        assert part in text, part


def test_the_page_where_the_cloze_form_leads() -> None:
    text = words(render_html(cloze_evidence()))
    for part in (
        "forget accuracy 1.000 → 0.350 before → after, cloze form",
        "forget chat / plain / cloze",
        "checkpoint 0.300 / 0.283 / 0.350 0.938 / 0.925 / 0.975",
        "checkpoint forget, cloze 0.325 summed, 0.350 per character, 0.308 per token",
        "96 questions that the base answers right in cloze form, those answered",
        "knows 96: those it answers right in cloze form. checkpoint was asked those.",
        "checkpoint 0.031 [0.01, 0.09], 3 of 96",
    ):
        assert part in text, part
    for part in ("24 orders", "every order", "Letters said"):
        assert part not in text, part


def test_each_kind_of_evidence_comes_alone() -> None:
    full = full_evidence()
    bare = VerifyReport("folder", "layer", True, "known", (), prompt="chat")
    one = EngineReport("checkpoint", harness=full.engines[2].harness)
    for changes, anchors in (
        ({"known": full.known}, ["orders"]),
        ({"controls": full.controls}, ["controls"]),
        ({"completions": full.completions}, ["completions"]),
        ({"robustness": full.robustness}, ["robustness"]),
        ({"engines": (one,)}, ["benchmarks"]),
        ({"engines": (replace(one, harness=(), answers=full.engines[2].answers),)}, ["knows"]),
        (
            {"engines": (replace(one, harness=(), loss_detail=full.engines[2].loss_detail),)},
            ["loss"],
        ),
    ):
        page = render_html(replace(bare, **changes))
        assert re.findall(r'<section id="(\w+)">', page) == [*anchors, "limits"]


def test_an_attack_that_was_not_tried_is_said_at_the_end() -> None:
    said = "What fine-tuning, rewording or other languages, a hint in context or a searched suffix"
    assert f"{said} brings back is not measured here" in words(render_html(rich_report()))


def hostile_evidence(keep: frozenset[str] = STRUCTURE) -> VerifyReport:
    """Every text of a full report hostile, but for the fields named."""
    found: VerifyReport = every_text(full_evidence(), lambda text: text + HOSTILE, keep)
    return found


@pytest.mark.parametrize(
    "report",
    [hostile_report(), hostile_evidence(), hostile_evidence(frozenset())],
    ids=["before", "evidence", "structure"],
)
def test_nothing_is_loaded_and_nothing_runs(report: VerifyReport) -> None:
    page = render_html(report, ((HOSTILE, HOSTILE),))
    assert "default-src 'none'" in page
    assert not re.search(r"<(script|img|link|iframe|object)\b", page)
    assert not re.search(r"\b(src|onerror|onload)=[\"']", page)
    assert set(re.findall(r"<a\b[^>]*>|href=[^\s>]*", page)) <= {
        part for id_ in ANCHORS for part in (f'<a href="#{id_}">', f'href="#{id_}"')
    }
    assert "49" not in words(page)  # a template in the text is not run
    assert "\x1b" not in page and "\x07" not in page and "\u202e" not in page


def test_control_and_direction_characters_show_as_such() -> None:
    assert shown("a\x1b[0m\u202eb\nc\td") == "a�[0m�b c d"


def test_flips_beyond_the_shown_are_counted() -> None:
    parity = replace(PARITY, flips=(FLIP,) * 45)
    assert "… and 5 more" in words(render_html(full_report(parity=parity)))


def test_provenance_comes_from_the_manifest(tmp_path: Path) -> None:
    clamp = {
        "layer": 7,
        "hook_point": "blocks.7.hook_resid_post",
        "method": "clamp",
        "parameters": {"value": -300.0},
        "features": [3],
        "k": 1,
        "sae": {"name": "s", "architecture": "jumprelu", "sha256": "0" * 64},
    }
    manifest = manifest_data(
        {"a": "0" * 64},
        base={"model": "google/gemma-2-2b", "revision": "abc"},
        clamps=[clamp],
        tools={"torch": "2"},
    )
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    found = dict(provenance(tmp_path))
    assert found["base"] == "google/gemma-2-2b at abc"
    assert "features 3; SAE s" in found["clamp, layer 7"]
    write_html(rich_report(), tmp_path, tmp_path / "report.html")
    assert "google/gemma-2-2b at abc" in (tmp_path / "report.html").read_text(encoding="utf-8")


# --------------------------------------------------------------------------- in a browser

PROBE = """
<!doctype html><title>probe</title>
<iframe id="page" style="border:0;width:%dpx;height:844px" srcdoc="%s"></iframe>
<pre id="result"></pre>
<script>addEventListener("load", () => {
  const page = document.getElementById("page"), seen = page.contentDocument
  const box = seen.getElementById("verdict")?.getBoundingClientRect()
  document.getElementById("result").textContent = JSON.stringify({
    title: seen.title, width: seen.documentElement.scrollWidth,
    top: box?.top, bottom: box?.bottom, verdict: seen.getElementById("verdict")?.innerText,
    active: seen.querySelectorAll("script,img,iframe,a:not(nav a),object").length,
    text: seen.body.innerText, background: getComputedStyle(seen.body).backgroundColor,
    bars: seen.querySelectorAll("svg.histogram rect").length,
    circles: seen.querySelectorAll("svg circle").length })
})</script>
"""


def browse(page: str, tmp_path: Path, width: int = 390, *flags: str) -> tuple[dict[str, Any], str]:
    """What a headless browser shows of a page: measurements, and what it logs on its console."""
    (tmp_path / "probe.html").write_text(PROBE % (width, html_.escape(page)), encoding="utf-8")
    done = subprocess.run(
        [
            BROWSER,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1200,900",
            "--enable-logging=stderr",
            *flags,
            "--dump-dom",
            (tmp_path / "probe.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    result = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert result is not None, done.stderr
    logged = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(html_.unescape(result[1])), logged


@needs_browser
@pytest.mark.parametrize("width", [390, 700, 1100])
def test_a_browser_shows_the_verdict_first_and_hostile_text_as_text(
    width: int, tmp_path: Path
) -> None:
    seen, logged = browse(render_html(hostile_report(), ((HOSTILE, HOSTILE),)), tmp_path, width)
    assert logged == ""
    assert seen["width"] <= width
    assert "FAIL" in seen["verdict"] and 0 <= seen["top"] < 844
    assert seen["active"] == 0 and seen["title"].startswith("fail: </p>")
    assert shown(HOSTILE) in seen["text"]
    assert seen["circles"] >= 8


@needs_browser
def test_a_browser_shows_a_pass_in_the_first_screen_light_and_dark(tmp_path: Path) -> None:
    page = render_html(rich_report())
    light, logged = browse(page, tmp_path)
    assert logged == "" and light["width"] <= 390
    assert "PASS" in light["verdict"] and light["bottom"] < 844
    dark, _ = browse(page, tmp_path, 390, "--blink-settings=preferredColorScheme=0")
    assert (light["background"], dark["background"]) == ("rgb(255, 255, 255)", "rgb(18, 22, 27)")


@needs_browser
@pytest.mark.parametrize("width", [375, 1280])
def test_a_browser_shows_all_evidence_and_hostile_text_as_text(width: int, tmp_path: Path) -> None:
    page = render_html(hostile_evidence(), ((HOSTILE, HOSTILE),))
    for scheme in ("1", "0"):  # light, dark
        flag = f"--blink-settings=preferredColorScheme={scheme}"
        seen, logged = browse(page, tmp_path, width, flag)
        assert logged == "" and seen["active"] == 0
        assert seen["width"] <= width
        for text in ("Say nothing about spells.", "The spell that lights a lamp, number 1,"):
            assert shown(text + HOSTILE) in seen["text"]
    assert seen["bars"] >= 4 * 15  # a histogram for each engine


@needs_browser
def test_the_browser_would_have_told(tmp_path: Path) -> None:
    broken = render_html(rich_report()).replace(
        "</main>", "</main><div style='width:900px'>x</div><script>alert(1)</script>"
    )
    seen, logged = browse(broken, tmp_path)
    assert seen["width"] >= 900 and seen["active"] == 1
    assert "Content Security Policy" in logged


def test_what_guessing_gives_stands_beside_accuracies() -> None:
    page = render_html(full_evidence())
    for said in (
        "Guessing, forget questions: at random 0.250, the longest choice 0.312, the base without "
        "the question 0.275.",
        '<td class="words" data-label="guessing">at random 0.250, the longest choice 0.461</td>',
        '<td class="words" data-label="guessing">–</td>',
    ):
        assert said in page
