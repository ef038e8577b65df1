"""Work that was done once is not done again, whatever ended the run."""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from bake.errors import OutputError
from verify.journal import Journal, journal_path


def never() -> Any:
    raise AssertionError("this was done before")


def test_what_was_found_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "work.jsonl"
    found = {"x": (0.1 + 0.2, 1e-320, -0.0), "y": math.inf, "z": "ü\n"}
    with pytest.raises(KeyboardInterrupt), Journal(path) as journal:
        first = journal.once("a", lambda: found)
        raise KeyboardInterrupt
    assert first == {**found, "x": list(found["x"])}
    with Journal(path) as journal:
        assert journal.has("a") and not journal.has("b")
        again = journal.once("a", never)
        assert again == first
        assert math.copysign(1, again["x"][2]) == -1
    assert list(tmp_path.rglob("*.jsonl")) == []  # complete: nothing is left to go on with


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_line_that_was_cut_off_is_done_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "work.jsonl"
    journal = Journal(path)
    journal.once("a", lambda: [1])
    journal.once("b", lambda: [2, 3])
    journal.close()
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(KeyboardInterrupt), Journal(path) as journal:
        assert journal.once("a", never) == [1]
        assert not journal.has("b")
        journal.once("b", lambda: [4])
        raise KeyboardInterrupt
    assert [json.loads(line)["found"] for line in path.read_text().splitlines()] == [[1], [4]]


def test_two_at_once_do_not_write_into_one_file(tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    with Journal(path) as first:
        first.once("a", lambda: 1)
        with Journal(path) as second:
            assert second.once("a", lambda: 2) == 2
        assert path.exists()
        assert first.once("a", never) == 1


def test_another_version_of_what_computes_is_other_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = journal_path(tmp_path, {"a": 1})
    assert here == journal_path(tmp_path, {"a": 1}) != journal_path(tmp_path, {"a": 2})
    monkeypatch.setattr(
        "verify.journal.version", lambda name: "0.0" if name == "onnxruntime" else version(name)
    )
    assert journal_path(tmp_path, {"a": 1}) != here


def test_other_arithmetic_is_other_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = journal_path(tmp_path, {"a": 1})
    monkeypatch.setenv("MKL_CBWR", "another one")
    there = journal_path(tmp_path, {"a": 1})
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "another")
    assert len({here, there, journal_path(tmp_path, {"a": 1})}) == 3


def test_without_a_file_nothing_is_kept() -> None:
    with Journal() as journal:
        assert journal.once("a", lambda: (1,)) == [1]
        assert journal.once("a", never) == [1]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="BAKEOUT_CACHE"):
        Journal(tmp_path / "file" / "work.jsonl")
