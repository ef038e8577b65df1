"""A verification that other machines help with, to the same report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

# Else Ray kills workers where something else takes this machine's memory.
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")

from ray.cluster_utils import Cluster

import bake.files.halving as halving
import verify.helping
from bake.errors import RanOutError, ScaleError
from bake.recipe import Recipe
from bake.scale.crew import Crew
from bakeout.cli import run
from tests.engines import InProcess
from tests.folders import baked_world
from tests.worlds import room_for
from verify.helping import Board, Helper, _Told, helped_by, inputs_sha256
from verify.journal import Journal, Others
from verify.options import Options
from verify.run import Asked, verify_folder

pytestmark = pytest.mark.long
KINDS = ("parity", "loss", "known", "controls", "completions", "robustness")
KILL_AT, KILLED = 4, "killed"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return baked_world(tmp_path_factory.mktemp("work"), [1, 5, 9], n_texts=4)


@pytest.fixture(autouse=True)
def also_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """What helpers forbid in this process ends with the test."""
    monkeypatch.setattr(halving, "_whole_only", False)


def asked_of(work: Path) -> Asked:
    recipe = Recipe.load(work / "recipe.toml")
    folder = work / "checkpoint"
    found = verify_folder(folder, None, frozenset({"integrity"}))
    return Asked(folder, recipe, frozenset(KINDS), Options(budget=2), 1, found)


class Here:
    """A board in this process, called as an actor is."""

    def __init__(self) -> None:
        self.board = Board()

    def __getattr__(self, name: str) -> Any:
        return type("Method", (), {"remote": staticmethod(getattr(self.board, name))})


def test_what_a_helper_did_is_not_done_again_and_the_report_is_the_same(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verify.engines.engines.TorchRunner", InProcess)
    monkeypatch.setattr(_Told, "_got", staticmethod(lambda answer: answer))
    asked = asked_of(work)
    verified = partial(verify_folder, asked.folder, asked.recipe, asked.kinds, None, asked.options)
    alone = verified()
    here = Here()
    Helper(asked, inputs_sha256(asked), here).help(1, 3)
    done = sum(map(len, here.board._found.values()))
    computed: list[str] = []
    ahead = Journal.ahead

    def counted(self: Journal, pieces: Mapping[str, Callable[[], Any]]) -> None:
        computed.extend(name for name in pieces if not self.has(name))
        ahead(self, pieces)

    monkeypatch.setattr(Journal, "ahead", counted)

    @contextmanager
    def helped(_: Asked) -> Iterator[Callable[[str], Others]]:
        yield lambda kind: _Told(here, 0, kind, 3)

    assert verified(None, helped) == alone
    assert done > 30 and computed == []


def test_a_lost_helper_leaves_its_pieces_and_nobody_elses(work: Path) -> None:
    board = Board()
    assert board.take(1, "verify", 0, ["a", "b"]) == ({}, "a")
    assert board.take(2, "verify", 0, ["a", "b"]) == ({}, "b")
    assert board.take(3, "references", 0, ["a"]) == ({}, "a")  # of another journal
    assert board.take(3, "verify", 0, ["a", "b"]) == ({}, None)
    board.put("verify", {"a": [1]})
    for who in (1, 2):
        board.release(who)
    assert board.take(3, "verify", 0, ["a", "b"]) == ({"a": [1]}, "b")
    assert board.take(3, "verify", 1, ["a", "b"]) == ({}, None)
    board.put("verify", {"c": [2], "a": [3]})
    assert board.take(1, "verify", 1, []) == ({"c": [2]}, None)


@pytest.mark.parametrize(
    "change",
    [
        "checkpoint/config.json",
        "checkpoint/evil.py",
        "base/config.json",
        "sae/cfg.json",
        "forget.jsonl",
    ],
)
def test_a_helper_with_other_files_is_refused_before_it_loads_anything(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = baked_world(tmp_path, [1, 5, 9], n_texts=4)
    asked = asked_of(work)
    inputs = inputs_sha256(asked)
    with (work / change).open("a") as file:
        file.write("\n")

    def never(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(verify.helping, "open_engines", never)
    with pytest.raises(ScaleError, match=r"others on .*expected the same files on all machines"):
        Helper(asked, inputs, Here()).help(1, 3)


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    """Two machines of one core each, as far as Ray can tell; this process is on the first."""
    node = {"num_cpus": 1, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=node)
    nodes.add_node(num_cpus=1)
    yield nodes
    nodes.shutdown()


class Second:
    """What this process sees of the others, whom it lets begin, and then kills.

    Args:
        others: as they are.
        taken: gets the names of the pieces that others did, and `KILLED` for each of them.
    """

    def __init__(self, others: Others, taken: list[str]) -> None:
        self._others, self._taken, self._own = others, taken, set[str]()
        self.n_parts = others.n_parts

    def take(self, names: Sequence[str]) -> tuple[dict[str, Any], str | None]:
        found: dict[str, Any] = {}
        while len(self._taken) < KILL_AT:  # helpers are given work
            found |= self._others.take([])[0]
            self._taken[:] = [*found.keys() - self._own]
            time.sleep(0.05)
        more, mine = self._others.take(names)
        if KILLED not in self._taken:
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if "ray::Helper" in " ".join(process.cmdline()):
                        process.kill()
                        self._taken.append(KILLED)
        return found | more, mine

    def put(self, found: Mapping[str, Any]) -> None:
        self._own |= found.keys()
        self._others.put(found)


def test_with_a_helper_that_is_killed_the_report_is_the_same_to_the_byte_wherever_it_is_begun(
    work: Path,
    tmp_path: Path,
    two_nodes: Cluster,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(work)  # whose modules nobody may take for installed ones
    for module in ("numpy", "verify"):
        (work / f"{module}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise OSError")
    command = ["verify", "checkpoint", "--recipe", "recipe.toml"]
    command += ["--only", "parity", "known", "--json"]
    taken: list[str] = []

    @contextmanager
    def second(crew: Crew, asked: Asked) -> Iterator[Callable[[str], Others]]:
        with helped_by(crew, asked) as others:
            assert crew.size == 1
            found = {kind: others(kind) for kind in ("references", "verify")}
            yield {**found, "verify": Second(found["verify"], taken)}.__getitem__

    monkeypatch.setattr("bakeout.verbs.verifying.helped_by", second)
    with monkeypatch.context() as patch:
        patch.setattr("verify.helping._COPIES", 10**9)
        assert run([*command, "-", "--ray", two_nodes.address]) == 2
        said = capsys.readouterr().err
        assert "has no room for a worker, which takes a core and " in said
    for name, options in (("alone", []), ("helped", ["--ray", two_nodes.address])):
        monkeypatch.setenv("BAKEOUT_CACHE", str(tmp_path / f"cache {name}"))
        assert run([*command, str(tmp_path / name), *options]) == 0
    assert taken.count(KILLED) == 1 and len(taken) > KILL_AT
    assert (tmp_path / "helped").read_bytes() == (tmp_path / "alone").read_bytes()
    assert not (tmp_path / "ran").exists()


def test_a_helper_without_memory_gives_its_piece_back(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verify.engines.engines.TorchRunner", InProcess)
    monkeypatch.setattr(_Told, "_got", staticmethod(lambda answer: answer))
    asked = asked_of(work)
    said = "memory ran out at .* at once, and fewer may not be taken"
    with room_for(100, layer=1), pytest.raises(RanOutError, match=said):
        Helper(asked, inputs_sha256(asked), Here()).help(1, 3)


def test_an_address_that_leads_nowhere(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(work / "checkpoint"), "--ray", "127.0.0.1:1"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: --ray 127.0.0.1:1: does not answer") and line.count("\n") == 1
