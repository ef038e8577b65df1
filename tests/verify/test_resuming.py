"""A verification that is interrupted goes on where it was, to the same report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bake.recipe import Recipe
from bakeout.cli import run
from tests.engines import InProcess
from tests.folders import baked_world
from verify.journal import Journal
from verify.options import Options
from verify.report.findings import VerifyReport
from verify.run import verify_folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return baked_world(tmp_path_factory.mktemp("work"), [1, 5, 9], n_texts=4)


def verified(work: Path, cache: Path | None) -> VerifyReport:
    recipe = Recipe.load(work / "recipe.toml")
    return verify_folder(work / "checkpoint", recipe, options=Options(cache=cache))


def as_bytes(report: VerifyReport) -> bytes:
    return json.dumps(report.to_dict(), indent=2).encode()


def test_interrupted_at_every_point_it_ends_with_the_same_report(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verify.engines.engines.TorchRunner", InProcess)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole = as_bytes(verified(work, None))
    done: list[str] = []
    left = 0
    once = Journal.once

    def counted(self: Journal, name: str, compute: Callable[[], Any]) -> Any:
        nonlocal left
        if not self.has(name):
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            done.append(name)
        return once(self, name, compute)

    monkeypatch.setattr(Journal, "once", counted)
    found, starts = None, 0
    while found is None:
        starts += 1
        left = 7  # so many pieces, then it is interrupted
        try:
            found = verified(work, tmp_path / "cache")
        except KeyboardInterrupt:
            assert len(list((tmp_path / "cache" / "verify").glob("*.jsonl"))) == 1
    assert starts >= 3
    assert as_bytes(found) == whole
    assert len(done) == len(set(done))  # nothing was done twice
    assert list((tmp_path / "cache" / "verify").iterdir()) == []


@pytest.mark.parametrize("change", ["folder", "questions", "recipe", "kinds"])
def test_something_else_does_not_go_on_with_it(
    change: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verify.engines.engines.TorchRunner", InProcess)
    once, names = Journal.once, list[str]()

    def stopping(self: Journal, name: str, compute: Callable[[], Any]) -> Any:
        names.append(name)
        if len(names) == 2:
            raise KeyboardInterrupt
        return once(self, name, compute)

    recipe = Recipe.load(work / "recipe.toml")

    def start(recipe: Recipe, kinds: frozenset[str] = frozenset({"parity"})) -> list[Path]:
        names.clear()
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Journal, "once", stopping)
            verify_folder(work / "checkpoint", recipe, only=kinds, options=Options(cache=tmp_path))
        return list((tmp_path / "verify").glob("*.jsonl"))

    assert len(start(recipe)) == 1
    assert len(start(recipe)) == 1  # the same, so the same journal
    now = time.time_ns() + 10**9
    if change == "folder":
        os.utime(work / "checkpoint" / "config.json", ns=(now, now))
    if change == "questions":
        os.utime(work / "forget.jsonl", ns=(now, now))
    if change == "recipe":
        (clamp,) = recipe.clamp
        recipe = recipe.with_clamps([clamp.model_copy(update={"trigger": 0.25})])
    kinds = frozenset({"parity", "loss"} if change == "kinds" else {"parity"})
    assert len(start(recipe, kinds)) == 2


def test_killed_on_the_command_line_it_goes_on(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAKEOUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["verify", str(work / "checkpoint"), "--recipe", str(work / "recipe.toml")]
    command += ["--only", "parity,choices", "--json"]
    started = subprocess.Popen(
        [sys.executable, "-m", "bakeout", *command, str(tmp_path / "never.json")],
        stderr=subprocess.DEVNULL,
    )
    journals = tmp_path / "cache" / "verify"
    deadline = time.monotonic() + 120
    while not any(b'"batch 0"' in path.read_bytes() for path in journals.glob("*.jsonl")):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    started.send_signal(signal.SIGKILL)
    started.wait()
    (kept,) = journals.glob("*.jsonl")
    assert b'"batch 0"' in kept.read_bytes()
    computed, once = list[str](), Journal.once

    def counted(self: Journal, name: str, compute: Callable[[], Any]) -> Any:
        if not self.has(name):
            computed.append(name)
        return once(self, name, compute)

    monkeypatch.setattr(Journal, "once", counted)
    for name, again in (("resumed", False), ("whole", True)):
        computed.clear()
        assert run([*command, str(tmp_path / name)]) == 0
        assert ("batch 0" in computed) == again
        assert list(journals.glob("*.jsonl")) == []
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not (tmp_path / "never.json").exists()


def test_what_the_base_does_is_not_measured_again_and_a_kept_run_not_at_all(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verify.engines.engines.TorchRunner", InProcess)
    recipe, computed = Recipe.load(work / "recipe.toml"), list[str]()
    once = Journal.once

    def counted(self: Journal, name: str, compute: Callable[[], Any]) -> Any:
        if not self.has(name):
            computed.append(name)
        return once(self, name, compute)

    monkeypatch.setattr(Journal, "once", counted)

    def found(*, keep: bool) -> tuple[bytes, list[str]]:
        computed.clear()
        kinds = frozenset({"integrity", "parity", "controls"})
        options = Options(cache=tmp_path, keep=keep)
        report = verify_folder(work / "checkpoint", recipe, kinds, options=options)
        return as_bytes(report), list(computed)

    whole, first = found(keep=False)
    again, second = found(keep=True)
    assert any(name.startswith("control ") for name in first)
    assert second and not [n for n in second if n.startswith(("control", "sensitivity"))]
    assert found(keep=True) == (again, [])
    assert again == whole
