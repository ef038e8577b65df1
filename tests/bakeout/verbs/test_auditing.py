"""`bakeout audit`: exit codes, one line for whatever is wrong, and what it writes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bakeout.cli import run
from tests.folders import recipe_variant
from tests.reports import error_line
from tests.verify.audit.audited import an_audit, audited_world
from tests.worlds import tiny_base, tiny_tokenizer, write_jsonl
from verify.audit import run_audit
from verify.audit.audit_report import AuditReport, read_audit
from verify.audit.audit_words import sentences


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auditing")
    audited_world(folder)
    tiny_tokenizer(tiny_base(folder / "wider", "gemma"))
    (folder / "graphs").mkdir()
    return folder


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BAKEOUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(run_audit, "AUDITS", {})
    monkeypatch.setattr(run_audit, "fitting_processes", lambda *_: 1)


def test_it_ran_and_judges_nothing(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = (tmp_path / "audit.json", tmp_path / "audit.html")
    asked = ["audit", str(world / "checkpoint"), str(world / "base"), "--quick"]
    asked += ["--recipe", str(world / "recipe.toml")]
    assert run([*asked, "--json", str(files[0]), "--html", str(files[1])]) == 0
    out = capsys.readouterr().out
    assert "checkpoint, carried as layer" in out
    assert "clamp taken out" in out
    report = read_audit(files[0])
    assert [audit.folder for audit in report.folders] == ["checkpoint", "base"]
    assert "checkpoint" in files[1].read_text()
    kept = files[0].read_bytes()
    assert run([*asked, "--json", "-"]) == 0  # from what was kept
    assert capsys.readouterr().out.encode() == kept


def test_what_came_back_is_a_table_and_sentences(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], world: Path
) -> None:
    found = an_audit()
    monkeypatch.setattr("bakeout.verbs.auditing.audit_folders", lambda *_: found)
    assert run(["audit", "x", "--recipe", str(world / "recipe.toml")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "relearn: other facts, all weights other facts 50 steps, 100 texts 0.900" in out
    assert "has the topic back: 108 of 120 answers right" in out


def test_broken_is_exit_code_1(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world / "checkpoint", tmp_path / "changed")
    (tmp_path / "changed" / "README.md").write_text("another\n")
    file = tmp_path / "audit.html"
    asked = ["audit", str(tmp_path / "changed"), "--recipe", str(world / "recipe.toml")]
    assert run([*asked, "--html", str(file)]) == 1
    assert "broken changed: README.md: changed" in " ".join(capsys.readouterr().out.split())
    assert "README.md: changed" in file.read_text()


@pytest.mark.parametrize(
    ("folders", "options", "said"),
    [
        (["checkpoint"], [], "Missing option '--recipe'"),
        ([], ["--recipe", "recipe.toml"], "Missing argument 'FOLDER…'"),
        (["nowhere"], ["--recipe", "recipe.toml"], "is no folder; expected"),
        (["checkpoint"], ["--recipe", "nothing.toml"], "nothing.toml"),
        (["wider"], ["--recipe", "recipe.toml"], "expected folders that were all"),
        (["checkpoint"], ["--recipe", "plain.toml"], "has base base, the recipe's base plain"),
        (["checkpoint"], ["--recipe", "few.toml"], "to split in 3"),
        (["graphs"], ["--recipe", "recipe.toml"], "config.json is missing; expected"),
        (["base"], ["--recipe", "recipe.toml", "--json", "no/such.json"], "cannot be written"),
        (["base"], ["--recipe", "recipe.toml", "--budget-minutes", "0"], "--budget-minutes"),
        (
            ["base"],
            ["--recipe", "recipe.toml", "--device", "moon"],
            "--device moon: expected cpu, or cuda",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folders: list[str],
    options: list[str],
    said: str,
) -> None:
    shutil.copytree(world / "base", world / "plain", dirs_exist_ok=True)
    recipe_variant(world, "plain", lambda data: data["base"].update(model="plain"))
    write_jsonl(world / "some.jsonl", [{"question": "Q?", "choices": [*"abcd"], "answer": 0}] * 4)
    recipe_variant(
        world, "few", lambda data: data["verify"].update(forget_questions={"path": "some.jsonl"})
    )
    monkeypatch.chdir(world)
    assert run(["audit", *folders, *options]) == 2
    assert said in error_line(capsys)


def test_a_card_says_what_came_back(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = tmp_path / "checkpoint", tmp_path / "audit.json"
    shutil.copytree(world / "checkpoint", folder)
    recipe = ["--recipe", str(world / "recipe.toml")]
    assert run(["audit", str(folder), *recipe, "--quick", "--json", str(file)]) == 0
    for _ in range(2):  # the card that is written changes the manifest, not what was audited
        assert run(["card", str(folder), "--audit", str(file)]) == 0
        assert "fine-tune on the topic" not in card(folder)
        assert "Tried: a few settings, up to 50 steps." in card(folder)
    (said,) = sentences(read_audit(file).folders[0])
    assert said.replace("(", r"\(").replace(")", r"\)") in card(folder)
    shutil.copytree(world / "checkpoint", tmp_path / "other")
    manifest = tmp_path / "other" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"bakeout": "', '"bakeout": "9'))
    capsys.readouterr()
    assert run(["card", str(tmp_path / "other"), "--audit", str(file)]) == 2
    assert "is of checkpoint, and of none with the manifest of" in error_line(capsys)


def card(folder: Path) -> str:
    """Of a folder, every run of white space as one space."""
    return " ".join((folder / "README.md").read_text().split())


def test_a_report_without_folders_is_read(tmp_path: Path) -> None:
    assert AuditReport("none", (0,), failures=(("a", "b"),)).exit_code == 1
    assert AuditReport("quick", (0,)).exit_code == 0
