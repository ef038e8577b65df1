"""Any file is taken or refused in a line: a few mutated ones, and those that once were not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.readers import READERS, good_files
from tests.fuzz.trying import CORPUS, attempt, fuzz

N = 60
"""Mutated files of each reader; `make fuzz` tries others, for as long as it is let."""
CASES = sorted(path for path in CORPUS.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good_files(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", READERS)
def test_good_files_are_read(name: str, root: Path) -> None:
    READERS[name].read((root / READERS[name].file).parent)


@pytest.mark.parametrize("name", READERS)
def test_mutated_files_are_taken_or_refused_in_a_line(name: str, root: Path) -> None:
    most = N // 4 if READERS[name].slow else N
    assert [found for found in fuzz(name, root, seed=0, most=most) if found is not None] == []


@pytest.mark.parametrize("case", CASES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_was_found_once_is_refused_in_a_line(case: Path, root: Path) -> None:
    reader = READERS[case.parent.name]
    file = root / reader.file
    good = file.read_bytes()
    reader.read(file.parent)  # what it imports is not counted
    try:
        assert attempt(case.parent.name, reader, file, case.read_bytes()) is None
    finally:
        file.write_bytes(good)
