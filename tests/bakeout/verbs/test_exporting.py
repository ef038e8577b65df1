"""`bakeout export compiled` and `bakeout export adapter` from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from bakeout.cli import run
from bakeout.verbs.baking import bake_recipe
from tests.worlds import save_sae_lens, tiny_base, tiny_sae


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    tiny_base(folder / "base")
    save_sae_lens(folder / "sae", tiny_sae())
    (folder / "recipe.toml").write_text(
        'schema = 1\n[base]\nmodel = "base"\nlicense = "gemma"\n[[clamp]]\n'
        'sae = { path = "sae" }\nmethod = "clamp"\nfeatures = [9, 2]\nvalue = -6.0\n'
    )
    bake_recipe(folder / "recipe.toml", folder / "checkpoint", force=False)
    return folder / "checkpoint"


@pytest.mark.parametrize("carrier", ["compiled", "adapter"])
def test_export_show_and_refuse_to_overwrite(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], carrier: str
) -> None:
    out = tmp_path / carrier
    command = ["export", carrier, str(checkpoint), "--out", str(out)]
    assert run(command) == 0
    assert f"written to {out}" in capsys.readouterr().out
    assert run(["show", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"{carrier}, exact" in shown and "features 9, 2" in shown
    if carrier == "compiled":
        assert "exact to rounding" in shown and "layers 2 and 3" in shown
    card = (out / "README.md").read_text()
    assert "from_pretrained" in card and "Gemma Terms of Use" in card and str(tmp_path) not in card
    assert ("trust_remote_code" in card) is False
    assert run(["verify", str(out), "--only", "integrity"]) == 0
    capsys.readouterr()
    assert run(command) == 2
    line = capsys.readouterr().err
    assert "exists; choose another folder, or pass --force" in line
    assert run([*command, "--force"]) == 0
    other = ["export", carrier, str(out), "--out", str(tmp_path / "again")]
    assert run(other) == 2
    assert f"is an export already (carrier {carrier})" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_options_and_their_errors(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["export", "compiled", str(checkpoint), "--out", str(out)]
    for more, match in (
        (["--pad", "2"], "--pad 2: holds 2 channels"),
        (["--dtype", "float16"], "float16 ends at 65504"),
        (["--dtype", "int4"], "expected float32 or bfloat16"),
    ):
        assert run([*command, *more]) == 2
        err = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(err) == 1 and match in err[0]
        assert not out.exists() and not list(tmp_path.glob(".out*"))
    assert run([*command, "--pad", "16", "--dtype", "bfloat16"]) == 0
    assert "hidden size 32 to 48, bfloat16" in capsys.readouterr().out
