"""What writes into a folder that is there: killed at every step, beside another, out of disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import export.carriers.onnx.onnx_folder as onnx_folder
from bake.errors import FolderError, OutputError
from bake.files.locks import folder_lock
from bakeout.cli import run
from export.in_place import changing, put_files
from export.manifest import Manifest, RoundedEntry
from tests.folders import baked_world, rehash
from tests.reports import error_line
from verify.engines.onnx_files import find_graphs, graph_failures
from verify.evidence.integrity import check_integrity

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
GRAPHS = {"shared": "model.onnx", "int8": "onnx/model_int8.onnx"}
FOUND = RoundedEntry(error=0.0, effect=1.0, shown=1.0)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return baked_world(tmp_path_factory.mktemp("original"), [1, 5, 9]) / "checkpoint"


@pytest.fixture(scope="module")
def exported(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a shared graph and a rounded one; not to be changed."""
    folder = shutil.copytree(original, tmp_path_factory.mktemp("exported") / "checkpoint")
    for precision in GRAPHS:
        assert run(["export", "onnx", str(folder), "--precision", precision]) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def is_whole(folder: Path) -> bool:
    manifest = Manifest.read(folder)
    broken = check_integrity(folder, manifest)
    return not broken and not graph_failures(find_graphs(folder), [1], manifest.files)


def ready_graphs(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are taken from a folder that has them, and are not run: that takes the time."""
    ready = contents(exported)

    def write(clamped: Any, architecture: Any, name: str, graph: Path) -> None:
        graph.write_bytes(ready[GRAPHS[name]])
        if name != "shared":
            graph.with_name(f"{graph.name}_data").write_bytes(ready[f"{GRAPHS[name]}_data"])

    from export.witness_file import Witnesses
    from export.witness_prompts import find_witnesses

    kept: list[Witnesses | None] = []

    def witnesses(clamped: Any, prompts: Any, _: str) -> Witnesses | None:
        return kept[0] if kept else kept.append(find_witnesses(clamped, prompts)) or kept[0]

    monkeypatch.setattr(onnx_folder, "write_graph", write)
    monkeypatch.setattr(onnx_folder, "check_graph", lambda *_, **__: FOUND)
    monkeypatch.setattr(onnx_folder, "find_witnesses", witnesses)


def dies(command: list[str], step: int) -> bool:
    """Run a command in a child that is killed before its step-th change on the disk; False where
    it ended before.
    """
    child = os.fork()
    if child == 0:
        left = step

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            written = event == "open" and isinstance(arguments[2], int) and arguments[2] & 3
            if (event in CHANGES or written) and str(arguments[0]) != os.devnull:
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        try:
            sys.addaudithook(count)
            os._exit(run(command))
        finally:
            os._exit(9)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, command
    return os.WIFSIGNALED(status)


COMMANDS: dict[str, tuple[list[str], bool]] = {
    "shared": (["export", "onnx", "checkpoint"], False),
    "int8": (["export", "onnx", "checkpoint", "--precision", "int8"], False),
    "shared again": (["export", "onnx", "checkpoint", "--force"], True),
    "int8 again": (["export", "onnx", "checkpoint", "--precision", "int8", "--force"], True),
    "a folder": (
        ["export", "onnx", "checkpoint", "--precision", "int8", "--out", "out", "--force"],
        True,
    ),
    "card": (["card", "checkpoint"], True),
    "bake": (["bake", "recipe.toml", "--out", "checkpoint", "--force", "--no-witnesses"], True),
}


@pytest.mark.parametrize(("command", "again"), COMMANDS.values(), ids=COMMANDS)
def test_killed_at_every_step_the_folder_is_whole_and_the_command_can_be_run_again(
    original: Path,
    exported: Path,
    tmp_path: Path,
    command: list[str],
    again: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ready_graphs(exported, monkeypatch)
    for name in ("base", "sae", "recipe.toml", "forget.jsonl", "retain.jsonl", "text.jsonl"):
        (tmp_path / name).symlink_to(original.parent / name)
    monkeypatch.chdir(tmp_path)
    before = shutil.copytree(exported if again else original, tmp_path / "before")
    if again:  # what is there is another's: nothing that is written is the same as before
        for name in (*GRAPHS.values(), f"{GRAPHS['int8']}_data"):
            with (before / name).open("ab") as file:
                file.write(b"\x7a\x04old!" if name.endswith(".onnx") else b"old!")
        (before / "README.md").write_text("# Old\n")
        rehash(before)
    assert is_whole(before)
    steps, stride = 0, 1 if "--out" not in command else 5
    while True:
        shutil.copytree(before, "checkpoint", dirs_exist_ok=True)
        if "out" in command:
            shutil.copytree(before, "out")
        if not dies(command, steps):
            break
        steps += stride
        assert is_whole(Path("checkpoint")), steps
        assert fits(Path("checkpoint")), steps
        if "out" in command:
            assert is_whole(Path("out")), steps
        assert run(command if "--force" in command else [*command, *force(command)]) == 0
        assert is_whole(Path("checkpoint")), steps
        left = {path.name for path in tmp_path.iterdir()}
        assert left <= {*names(original.parent), "before", "checkpoint", "out"}, steps
        assert not [name for name in contents(Path("checkpoint")) if "partial" in name]
        for folder in ("checkpoint", "out"):
            shutil.rmtree(folder, ignore_errors=True)
    assert steps >= 8


def fits(folder: Path) -> bool:
    """Whether a rounded graph, where there is one, and its data are of one writing."""
    graph = folder / GRAPHS["int8"]
    data = graph.with_name(f"{graph.name}_data")
    old = [path.read_bytes().endswith(b"old!") for path in (graph, data) if path.exists()]
    return not graph.exists() or old in ([True, True], [False, False])


def force(command: list[str]) -> list[str]:
    """What was killed may be done already."""
    return ["--force"] if command[0] == "export" else []


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_writer_says_that_another_one_writes(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(original, tmp_path / "checkpoint")
    before = contents(folder)
    held = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import sys; from pathlib import Path; from bake.files.locks import folder_lock\n"
            "with folder_lock(Path(sys.argv[1])):\n"
            "    print('ready', flush=True); sys.stdin.read()",
            str(folder),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert held.stdout is not None and held.stdout.readline() == b"ready\n"
    recipe = str(original.parent / "recipe.toml")
    try:
        for command in (
            ["export", "onnx", str(folder)],
            ["card", str(folder)],
            ["push", str(folder), "user/name", "--unverified"],
            ["bake", recipe, "--out", str(folder), "--force"],
        ):
            capsys.readouterr()
            assert run(command) == 2
            assert "is being written by another process" in error_line(capsys)
            assert contents(folder) == before
    finally:
        held.kill()
        held.communicate()
    assert run(["card", str(folder)]) == 0 and is_whole(folder)
    assert names(tmp_path) == {"checkpoint"}


def test_two_bakes_into_one_folder_one_wins_and_the_other_says_so(
    original: Path, tmp_path: Path
) -> None:
    script = (
        "import sys; from bakeout.cli import run; sys.stdin.readline(); sys.exit(run(sys.argv[1:]))"
    )
    recipe, out = str(original.parent / "recipe.toml"), tmp_path / "out"
    command = [sys.executable, "-c", script, "bake", recipe, "--out", str(out)]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    both = [subprocess.Popen(command, **pipes, text=True) for _ in range(2)]
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    lost = next(text for text, process in zip(said, both, strict=True) if process.returncode)
    lines = [line for line in lost.splitlines() if not line.startswith("Writing")]
    assert len(lines) == 1
    assert "is being written by another process" in lines[0] or "exists; choose" in lines[0]
    assert is_whole(out) and names(tmp_path) == {"out"}


def test_the_lock_of_a_place_beside_which_nobody_may_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "folder").mkdir()
    real = os.open

    def refuse(path: Any, *arguments: Any, **named: Any) -> int:
        if Path(path).parent == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "open", refuse)
    with folder_lock(folder):
        assert names(folder) == {".bakeout-partial.lock"}
        with pytest.raises(OutputError, match="another process"), folder_lock(folder):
            raise AssertionError
    assert not names(folder)
    with (
        pytest.raises(OutputError, match=r"cannot be written \(Permission denied\)"),
        folder_lock(tmp_path / "new"),
    ):
        raise AssertionError


def test_only_what_is_written_in_place_may_be_half_there(original: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(original, tmp_path / "checkpoint")
    manifest = json.loads((folder / "manifest.json").read_text())

    def say(in_place: dict[str, str]) -> Manifest:
        (folder / "manifest.json").write_text(json.dumps(manifest | {"in_place": in_place}))
        return Manifest.read(folder)

    for name in ("config.json", "model-sae-clamp.safetensors", "modeling_clamped_gemma.py"):
        with pytest.raises(FolderError, match="is about to write"):
            say({name: "0" * 64})
    with pytest.raises(FolderError, match="expected files inside the folder"):
        say({"../x": "0" * 64})
    # A file that has neither hash is a changed one, and one that was not announced is not listed.
    (folder / "README.md").write_text("# Other\n")
    found = check_integrity(folder, say({"README.md": "0" * 64}))
    assert [failure.what for failure in found] == ["README.md: changed"]
    (folder / "model.onnx").write_bytes(b"graph")
    found = check_integrity(folder, say({"model.onnx": "0" * 64}))
    assert "model.onnx: not in the manifest" in [failure.what for failure in found]


def test_a_killed_write_that_is_settled_leaves_the_manifest_as_it_was(
    original: Path, tmp_path: Path
) -> None:
    """A report of the folder stays one of it."""
    folder = shutil.copytree(original, tmp_path / "checkpoint")
    before = contents(folder)
    Manifest.read(folder).changed(in_place={"README.md": "1" * 64, "model.onnx": "2" * 64}).replace(
        folder
    )
    (folder / ".bakeout-partial" / "model.onnx").write_bytes(b"half")
    assert contents(folder)["manifest.json"] != before["manifest.json"]
    assert Manifest.read(folder).files == Manifest.read(original).files
    assert is_whole(folder)
    with changing(folder):
        pass
    assert contents(folder) == before


SPOIL: dict[str, Callable[[Path, Path], None]] = {
    "a folder": lambda folder, out: (folder / ".bakeout-partial").symlink_to(out),
    "a graph": lambda folder, out: (folder / ".bakeout-partial.onnx").symlink_to(out / "canary"),
    "its data": lambda folder, out: (folder / ".bakeout-partial.onnx_data").symlink_to(
        out / "canary"
    ),
    "a lock": lambda folder, out: (folder.parent / ".checkpoint.bakeout-lock").symlink_to(
        out / "new"
    ),
}


@pytest.mark.parametrize("spoil", SPOIL.values(), ids=SPOIL)
def test_links_under_the_names_of_what_is_unfinished_are_not_followed(
    original: Path, tmp_path: Path, spoil: Callable[[Path, Path], None]
) -> None:
    (out := tmp_path / "out").mkdir()
    (out / "canary").write_text("canary")
    folder = shutil.copytree(original, tmp_path / "checkpoint")
    spoil(folder, out)
    with changing(folder) as partial:
        (partial / "README.md").write_text("# New\n")
        put_files(folder, Manifest.read(folder), {"README.md": partial / "README.md"})
    assert contents(out) == {"canary": b"canary"} and is_whole(folder)
    assert (folder / "README.md").read_text() == "# New\n"


def test_a_full_disk_leaves_the_old_card(
    original: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(original, tmp_path / "checkpoint")
    before = contents(folder)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("export.in_place.hash_new", full)
    capsys.readouterr()
    assert run(["card", str(folder)]) == 2
    assert "the disk is full; nothing was kept" in error_line(capsys)
    assert contents(folder) == before and names(tmp_path) == {"checkpoint"}
