"""The command line: verbs, exit codes, one line of error, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bakeout.cli import _own_ray, _spread_kinds, run
from tests.reports import error_line
from tests.worlds import RecipeWriter, save_sae_lens, tiny_base, tiny_sae

TABLE = {"sae": {"path": "sae"}, "method": "clamp", "features": [9, 2], "value": -6.0}


@pytest.fixture
def recipe(tmp_path: Path, write_recipe: RecipeWriter) -> Path:
    tiny_base(tmp_path / "base")
    save_sae_lens(tmp_path / "sae", tiny_sae())
    return write_recipe(TABLE)


def test_bake_show_and_refuse_to_overwrite(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(["bake", str(recipe), "--out", str(out), "--dry-run"]) == 0
    assert "nothing written" in capsys.readouterr().out and not out.exists()
    assert run(["bake", str(recipe), "--out", str(out)]) == 0
    assert "blocks.1.hook_resid_post: clamp on 2 features of sae" in capsys.readouterr().out
    assert run(["show", str(out)]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("layer", "features 9, 2", "value -6.0", "exact"))
    assert run(["bake", str(recipe), "--out", str(out)]) == 2
    assert "exists; choose another folder, or pass --force" in error_line(capsys)
    assert run(["bake", str(recipe), "--out", str(out), "--force"]) == 0
    capsys.readouterr()
    assert run(["verify", str(out), "--only", "integrity"]) == 0
    assert "pass" in capsys.readouterr().out


def test_integrity_failure_is_exit_code_1_and_json(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(["bake", str(recipe), "--out", str(out)])
    shard = out / "model-sae-clamp.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    capsys.readouterr()
    assert run(["verify", str(out), "--json", "-"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == 1 and report["verdict"] == "fail"
    assert report["failures"][0]["kind"] == "integrity"
    assert "model-sae-clamp.safetensors" in str(report["failures"][0])
    assert run(["verify", str(out), "--json", str(tmp_path / "no" / "r.json")]) == 2


def test_the_report_as_a_page(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "out", tmp_path / "report.html"
    run(["bake", str(recipe), "--out", str(out)])
    assert run(["verify", str(out), "--only", "integrity", "--html", str(page)]) == 0
    assert "Nothing was run" in page.read_text(encoding="utf-8")
    (out / "config.json").write_text("{}")
    assert run(["verify", str(out), "--html", str(page)]) == 1
    assert "config.json: changed" in page.read_text(encoding="utf-8")
    capsys.readouterr()
    assert run(["verify", str(out), "--json", "-", "--html", str(tmp_path / "no" / "r.html")]) == 2
    said = capsys.readouterr()
    assert "r.html: cannot be written; name a file in a folder that exists" in said.err
    assert said.out == ""  # known before anything was measured


@pytest.mark.parametrize("verb", [["show"], ["verify"], ["card"], ["export", "onnx"]])
def test_a_folder_of_a_newer_schema_is_refused(
    verb: list[str], recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(["bake", str(recipe), "--out", str(out)])
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"schema": 2}))
    capsys.readouterr()
    assert run([*verb, str(out)]) == 2
    assert '"schema" is 2, and this bakeout knows up to 1; update' in error_line(capsys)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"features": [9, 64]}, "feature 64 is out of range; expected 0 to 63"),
        ({"features": [9, 9]}, "feature 9 is listed twice"),
        ({"method": "wipe"}, "got 'wipe', expected 'clamp'"),
        ({"trigger": -1.0}, "trigger: got -1.0"),
        ({"sae": {"path": "absent"}}, "no SAE there"),
        ({"hook_point": "blocks.2.hook_resid_post"}, "the recipe says blocks.2"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(
    recipe: Path,
    tmp_path: Path,
    write_recipe: RecipeWriter,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, object],
    match: str,
) -> None:
    write_recipe({**TABLE, **change})
    before = sorted(path.name for path in tmp_path.iterdir())
    capsys.readouterr()
    assert run(["bake", str(recipe), "--out", str(tmp_path / "out")]) == 2
    assert match in error_line(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        (["bake", "absent.toml", "--out", "x"], 2, "absent.toml: cannot be read"),
        (["bake"], 2, "RECIPE"),
        (["bakee"], 2, "bakee"),
        ([], 2, "no verb; expected one of those in bakeout --help"),
        (["export"], 2, "no verb; expected one of those in bakeout export --help"),
        (["bake", "x", "--bogus"], 2, "bogus"),
        (["show", "absent"], 2, "is no folder"),
        (["verify", "absent"], 2, "absent"),
        (["verify", "absent", "--only", "nonsense"], 2, "nonsense"),
        (["verify", "absent", "--only", "loss,witneses"], 2, "did you mean witnesses?"),
    ],
)
def test_usage_errors(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    match: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == code
    assert match in error_line(capsys)


def test_output_that_is_the_input(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    for out in ("base", "base/inner", "sae"):
        assert run(["bake", str(recipe), "--out", str(tmp_path / out), "--force"]) == 2
        assert "overlaps the input" in error_line(capsys)


def test_unexpected_failure_is_exit_code_3_and_debug_shows_where(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a \x1b[31m defect")

    monkeypatch.setattr("export.carriers.checkpoint.find_base", broken)
    arguments = ["bake", str(recipe), "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert run(arguments) == 3
    assert r"unexpected RuntimeError: a \x1b[31m defect" in error_line(capsys)
    assert run([*arguments, "--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_terminated_bake_leaves_the_old_folder_and_no_trace(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(["bake", str(recipe), "--out", str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    script = (
        "import sys, time, export.copying as c; from bakeout.cli import run\n"
        "real = c.os.fsync\n"
        "def slow(fd):\n"
        "    c.os.write(1, b'copying\\n'); time.sleep(60); real(fd)\n"  # whole, from any thread
        "c.os.fsync = slow\n"
        f"sys.exit(run(['bake', {str(recipe)!r}, '--out', {str(out)!r}, '--force']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"copying\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run(["bake", str(recipe), "--out", str(out), "--force"]) == 0
    assert not list(tmp_path.glob(".out*"))


def test_only_takes_several_kinds_in_any_spelling() -> None:
    expected = ["verify", "--only", "parity", "--only", "loss", "x"]
    assert _spread_kinds(["verify", "--only", "parity", "loss", "x"]) == expected
    assert _spread_kinds(["verify", "--only", "parity,loss", "x"]) == expected
    assert _spread_kinds(["verify", "--only=parity,loss", "x"]) == expected
    assert _spread_kinds(expected) == expected
    assert _spread_kinds(["verify", "x", "--only", "paritty, loss"])[3] == "paritty"


def test_help_answers_at_once_and_without_anything_heavy() -> None:
    code = (
        "import sys; from bakeout.cli import run; run(['--help']); "
        "import bake.search.fit, bakeout.verbs.baking, bakeout.verbs.showing; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(verb in done.stdout for verb in ("demo", "bake", "verify", "show"))


@pytest.mark.parametrize(
    ("verb", "place", "left"),
    [
        ("show", "bakeout.verbs.showing.show_folder", "nothing was kept"),
        (
            "verify",
            "bakeout.verbs.verifying.verify_folder",
            "the same command goes on where it was",
        ),
    ],
)
def test_an_interruption_says_what_it_leaves(
    verb: str,
    place: str,
    left: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupted)
    assert run([verb, "folder"]) == 130
    assert capsys.readouterr().err == f"error: interrupted; {left}\n"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--ray"], ["--ray=local"]),
        (["--ray", "recipe.toml"], ["--ray=local", "recipe.toml"]),
        (["--ray", "--json", "-"], ["--ray=local", "--json", "-"]),
        (["--ray", "host:6379", "r.toml"], ["--ray", "host:6379", "r.toml"]),
        (["--ray", "host:", "r.toml"], ["--ray", "host:", "r.toml"]),
        (["--ray", "ray://host/x"], ["--ray", "ray://host/x"]),
        (["--ray=host:6379"], ["--ray=host:6379"]),
    ],
)
def test_ray_goes_with_an_address_or_without(given: list[str], meant: list[str]) -> None:
    assert _own_ray(given) == meant
