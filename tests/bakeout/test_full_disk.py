"""A disk that fills up, whatever verb is writing: one line, exit code 2, nothing half written."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bake.new_folder import is_disk_full
from bakeout.cli import run
from tests.folders import baked_world, recipe_variant

KILOBYTE = 1024


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baked world, and `select.toml`, whose features are to be selected."""
    folder = baked_world(tmp_path_factory.mktemp("disk"), [1, 5, 9], n_texts=12)

    def selecting(data: dict[str, object]) -> None:
        data["clamp"][0]["features"] = "select"  # type: ignore[index]
        text = {"path": "text.jsonl"}
        numbers = {"n_features": 4, "seq_len": 24, "n_seqs": 20, "retain_threshold": 0.9}
        data["select"] = {"forget": text, "retain": text, **numbers}

    recipe_variant(folder, "select", selecting)
    return folder


@contextmanager
def small_disk(limit: int) -> Iterator[None]:
    """Within the block no file can hold more bytes: to whoever writes, the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


VERBS: dict[str, tuple[int, list[str], str]] = {
    "json": (
        300,
        ["verify", "checkpoint", "--only", "integrity", "--json", "new/r.json"],
        "--json new/r.json: cannot be written",
    ),
    "html": (
        4 * KILOBYTE,
        ["verify", "checkpoint", "--only", "integrity", "--html", "new/r.html"],
        "--html new/r.html: cannot be written",
    ),
    "select": (
        300,
        ["select", "select.toml", "--write", "new/r.toml"],
        "the disk is full; what was found is kept",
    ),
    "sweep": (
        20,
        ["sweep", "select.toml", "--out", "new/sweep", "--grid", "value=-6"],
        "the disk is full; what was found is kept",
    ),
    "bake": (300, ["bake", "recipe.toml", "--out", "new/out"], "the disk is full; nothing was"),
    "features": (300, ["features", "select.toml", "--html", "new/f.html"], "the disk is full"),
    "onnx": (300, ["export", "onnx", "checkpoint"], "the disk is full; nothing was kept"),
    "adapter": (
        300,
        ["export", "adapter", "checkpoint", "--out", "new/out"],
        "the disk is full; nothing was kept",
    ),
}


@pytest.mark.parametrize(("limit", "command", "said"), VERBS.values(), ids=VERBS)
def test_a_full_disk_is_one_line(
    world: Path,
    tmp_path: Path,
    limit: int,
    command: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setenv("BAKEOUT_CACHE", str(tmp_path / "cache"))
    (new := world / "new").mkdir(exist_ok=True)
    for name in ("r.json", "r.html"):
        (new / name).write_text("old")
    before = sorted(world.glob("checkpoint/*"))
    capsys.readouterr()
    with small_disk(limit):
        code = run(command)
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if not line.startswith("Writing model")]
    assert (code, len(lines)) == (2, 1), err
    assert lines[0].startswith("error: ") and said in lines[0]
    assert sorted(world.glob("checkpoint/*")) == before
    assert (new / "r.json").read_text() == (new / "r.html").read_text() == "old"
    assert {path.name for path in new.iterdir()} <= {"r.json", "r.html", "sweep"}


CASES: list[tuple[Callable[[], Exception], bool]] = [
    (lambda: OSError(28, "No space left on device"), True),
    (lambda: OSError(27, "File too large"), True),
    (lambda: RuntimeError("I/O error: No space left on device (os error 28)"), True),
    (lambda: OSError(13, "Permission denied"), False),
    (lambda: ValueError("28"), False),
]


@pytest.mark.parametrize(("error", "expected"), CASES)
def test_what_says_that_the_disk_is_full(error: Callable[[], Exception], expected: bool) -> None:
    assert is_disk_full(error()) is expected
