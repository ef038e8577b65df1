from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bake.strangers import confined
from bake.strangers.start_confined import FILE_BYTES, OPEN_FILES, landlock_version

SECRETS = {
    "HF_TOKEN": "secret",
    "HUGGING_FACE_HUB_TOKEN": "secret",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "NVIDIA_API_KEY": "secret",
    "CUDA_TOKEN": "secret",
    "OPENAI_API_KEY": "secret",
    "LD_PRELOAD": "",
    "PYTHONSTARTUP": "secret.py",
    "HF_ENDPOINT": "http://secret",
    "HTTPS_PROXY": "http://me:secret@proxy",
    "SSH_AUTH_SOCK": "/tmp/secret",
}
KEPT = {"OMP_NUM_THREADS": "3", "ATEN_CPU_CAPABILITY": "default", "CUDA_VISIBLE_DEVICES": "1"}
SAYS = """
import json, os, resource, sys
sys.stdout.write(json.dumps({
    "environment": dict(os.environ),
    "limits": [resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
               for name in ("CORE", "FSIZE", "NOFILE")],
    "path": sys.path, "cwd": os.getcwd(), "argv": sys.argv[1:], "main": __name__,
    "session": os.getsid(0) == os.getpid(), "uid": os.stat(".").st_uid == os.geteuid(),
}))
"""


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], Path]:
    def write(code: str) -> Path:
        path = tmp_path / "program.py"
        path.write_text(code)
        return path

    return write


def scratch_in(folder: Path) -> Path:
    scratch = folder / "scratch"
    scratch.mkdir()
    return scratch


def test_a_program_finds_no_token_and_no_home(
    program: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (SECRETS | KEPT).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path / "home of somebody"))
    monkeypatch.chdir(tmp_path)
    scratch = scratch_in(tmp_path)
    process = confined.start(
        *(str(program(SAYS)), "one", "two"), scratch=scratch, stdout=subprocess.PIPE
    )
    said = json.loads(process.communicate(timeout=60)[0])
    environment = said["environment"]
    assert not SECRETS.keys() & environment.keys()
    assert "secret" not in str(environment) and "somebody" not in str(environment)
    assert KEPT.items() <= environment.items()
    assert {environment[name] for name in ("HOME", "TMPDIR", "HF_HOME")} == {str(scratch)}
    assert environment["HF_HUB_OFFLINE"] == "1"
    core, size, files = said["limits"]
    assert core == [0, 0] and size[1] <= FILE_BYTES and files[1] <= OPEN_FILES
    assert (said["argv"], said["main"], said["cwd"]) == (["one", "two"], "__main__", str(scratch))
    assert str(tmp_path) not in said["path"] and "" not in said["path"]
    assert said["uid"]


def test_what_is_too_large_is_not_written(program: Callable[[str], Path], tmp_path: Path) -> None:
    path = program(
        "import os\nfile = open('large', 'wb')\n"
        f"os.truncate('large', {FILE_BYTES})\nos.truncate('large', {FILE_BYTES + 1})"
    )
    said = confined.run(str(path), scratch=scratch_in(tmp_path))
    assert said is not None and "File too large" in said and "\n" not in said


def test_nothing_is_written_outside_where_the_system_can_prevent_it(
    program: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in ("there", "link"):
        (tmp_path / name).write_text("before")
    path = program(f"""
import os, pathlib, sys
outside = pathlib.Path({str(tmp_path)!r})
def tried(act):
    try:
        act()
        return "done"
    except OSError:
        return "refused"
acts = [
    lambda: (outside / "new").write_text("x"),
    lambda: (outside / "there").write_text("x"),
    lambda: os.truncate(outside / "there", 0),
    lambda: (outside / "link").unlink(),
    lambda: (outside / "folder").mkdir(),
    lambda: (outside / "other").symlink_to("there"),
    lambda: os.rename(outside / "there", "mine"),
]
pathlib.Path("inside").write_text("x")
pathlib.Path("folder").mkdir()
pathlib.Path("/dev/null").write_text("x")
pathlib.Path(outside / "there").read_text()
sys.exit(" ".join(tried(act) for act in acts))
""")
    said = confined.run(str(path), scratch=scratch_in(tmp_path))
    assert said is not None and (tmp_path / "scratch/inside").exists(), said
    if landlock_version() >= 3 or str(confined._wall()).endswith("bwrap"):
        assert said == f"ended with exit code 1 ({' '.join(['refused'] * 7)})"
        assert (tmp_path / "there").read_text() == "before" and not (tmp_path / "new").exists()


def test_a_program_that_takes_too_long_is_killed(
    program: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confined, "SECONDS", 0.2)
    begin = time.monotonic()
    said = confined.run(str(program("import time; time.sleep(600)")), scratch=scratch_in(tmp_path))
    assert said == "it took over 0 seconds" and time.monotonic() - begin < 60
    monkeypatch.undo()
    assert confined.run(str(program("print('fine')")), scratch=tmp_path / "scratch") is None


def test_there_is_no_network_where_the_system_can_do_without(
    program: Callable[[str], Path], tmp_path: Path
) -> None:
    """The probe never fails; what works is used."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = server.getsockname()
        code = f"import socket; socket.create_connection({where}, 20)"
        said = confined.run(str(program(code)), scratch=scratch_in(tmp_path))
    if landlock_version() >= 4 or confined._wall() is not None:
        assert said is not None and "Error" in said
    path = program("import socket, sys; sys.exit(','.join(n for _, n in socket.if_nameindex()))")
    said = confined.run(str(path), scratch=tmp_path / "scratch")
    assert said is not None
    if confined._wall() is not None:
        assert said == "ended with exit code 1 (lo)"


@pytest.mark.parametrize("script", ["exit 1", "exec sleep 600", None])
def test_a_tool_that_does_not_work_is_left_out(
    tmp_path: Path, script: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bwrap", "unshare"):
        if script is not None:
            (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / name).chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: f"{tmp_path}/{name}" if script else None)
    monkeypatch.setattr(confined, "_PROBE_SECONDS", 0.5)
    assert confined._wall.__wrapped__() is None
    monkeypatch.setattr(confined, "_wall", lambda: None)
    assert confined.command("program.py", "a", scratch=tmp_path)[0] == sys.executable


def test_bubblewrap_is_given_a_view_that_cannot_be_written(tmp_path: Path) -> None:
    line = " ".join(confined._walls("/usr/bin/bwrap", tmp_path))
    assert "--ro-bind / / --dev-bind /dev /dev" in line and "--unshare-net" in line
    assert f"--bind {tmp_path.resolve()} {tmp_path.resolve()}" in line


@pytest.mark.parametrize("where", [torch.empty, np.empty, bytearray])
def test_memory_that_there_is_not_is_told_from_other_errors(where: Callable[[int], Any]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        where(1 << 58)
    said = f"{type(caught.value).__name__}: {caught.value}"
    assert confined.ran_out_of_memory(f"ended with exit code 1 ({said.splitlines()[0]})", 1)
    assert confined.ran_out_of_memory("it said nothing", -9)
    for other in ("it said nothing", "OSError: no memory_map in config.json", "ValueError: k is 3"):
        assert not confined.ran_out_of_memory(other, 1)
