"""The kind `loads`: what became of the clamp, what refused, and what nobody could try."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bake.errors import BakeoutError, FolderError, RanOutError
from bake.rounding import LOADS
from bakeout.cli import run
from tests.engines import InProcess
from tests.folders import baked_world
from tests.reports import full_report
from verify.evidence.loads import STORED, failures, lines
from verify.page.html import render_html
from verify.report.findings import VerifyReport


class Short(InProcess):
    """There is no memory for float16, and in 4 bits the folder refuses."""

    def load(self, dtype: str, *, bits: int | None = None, **_: Any) -> None:
        if dtype == "float16":
            raise RanOutError("folder: the process that loaded it ended with exit code -9")
        if bits == 4:
            raise FolderError("folder: transformers alone cannot run it")
        super().load(dtype)


def test_what_could_not_be_tried_is_neither_sound_nor_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("verify.engines.engines.TorchRunner", Short)
    work = baked_world(tmp_path, [1, 5, 9, 20, 33])
    asked = ["--recipe", str(work / "recipe.toml"), "--only", "loads"]
    files = ["--json", str(work / "report.json"), "--html", str(work / "report.html")]
    assert run(["verify", str(work / "checkpoint"), *asked, *files]) == 1
    found = json.loads((work / "report.json").read_text())
    words = {row["load"]: row["word"] for row in found["loads"]}
    assert [*words] == [STORED, *LOADS]
    assert [*words.values()] == ["same", "same", "rounds", "not measured", "same", "refuses"]
    (failure,) = found["failures"]
    assert (failure["kind"], failure["what"]) == ("loads", "float16")
    assert failure["measured"] == "not measured: memory or time ran out"
    said = " ".join(capsys.readouterr().out.split())
    assert "loads checkpoint float16: not measured; memory or time ran out" in said
    page = (work / "report.html").read_text()
    assert "not measured: memory or time ran out" in page and "refuses: nothing was said" in page


ROW = {"engine": "checkpoint", "load": "bfloat16", "word": "rounds"}
NUMBERS = {"kl_to_hook": 0.0125, "kl_to_base": 1.5, "effect": 0.75}
NOTHING = dict.fromkeys(NUMBERS)


def report_of(**row: Any) -> VerifyReport:
    return replace(full_report(), more={"loads": [{**ROW, **row}]})


def test_the_page_has_a_table_in_place_of_the_lines() -> None:
    page = render_html(report_of(engine="<b>", **NUMBERS))
    (section,) = re.findall(r"<section id=\"loads\".*?</section>", page, re.DOTALL)
    assert "As loaders take it" in section
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", section.partition("<tbody>")[2])
    assert cells == ["&lt;b&gt;", "bfloat16", "rounds", "0.0125", "1.5", "75.0 %"]
    assert "mean KL 0.0125 to the hook" not in page
    page = render_html(report_of(word="refuses", **NOTHING))
    assert "refuses: nothing was said" in page
    assert 'id="loads"' not in render_html(full_report())


def test_what_is_said_and_what_fails() -> None:
    (line,) = lines(report_of(**NUMBERS))
    assert line == (
        "loads      checkpoint bfloat16: rounds; mean KL 0.0125 to the hook, 1.5 to the base"
    )
    assert not [*failures(report_of(**NUMBERS))]
    assert not [*failures(report_of(word="refuses", **NOTHING))]
    (failure,) = failures(report_of(word="silently base-like", **{**NUMBERS, "effect": 0.1}))
    assert (failure.measured, failure.bar) == (0.1, 0.5)
    (failure,) = failures(report_of(word="not measured", **NOTHING))
    assert str(failure) == (
        "loads: checkpoint: bfloat16 is not measured: memory or time ran out, expected a load"
    )
    with pytest.raises(BakeoutError, match=r"report: loads\.0\.effect"):
        [*lines(report_of(**{**NUMBERS, "effect": "all"}))]
