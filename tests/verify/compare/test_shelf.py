"""What references read is there for every engine that needs it, and gone after the last one."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from bake.errors import OutputError
from verify.compare.shelf import Seen, Shelf


def seen(*references: str) -> Seen:
    return Seen(torch.ones(1, 3).bool(), {}, {name: torch.zeros(2).double() for name in references})


def test_what_was_put_is_taken_to_the_bit_by_each_reader_and_then_gone(tmp_path: Path) -> None:
    logits = {"reference": torch.randn(3, 50), "reference-float32": torch.randn(3, 50)}
    with Shelf({"batch 0": 2}, tmp_path / "new") as shelf:
        shelf.put("batch 0", seen(*logits), logits)
        kept = list((tmp_path / "new").rglob("*.npy"))
        assert len(kept) == 2
        for name, expected in logits.items():
            assert len(list(tmp_path.rglob("*.npy"))) == 2
            found, reading = shelf.take("batch 0", name)
            assert torch.equal(reading.logits, expected) and found.wanted.all()
        assert not list(tmp_path.rglob("*.npy"))
    assert not list((tmp_path / "new").iterdir())


def test_a_reader_waits_until_it_is_there() -> None:
    found = []
    with Shelf({"batch 0": 1}) as shelf:
        reader = threading.Thread(target=lambda: found.append(shelf.take("batch 0", "reference")))
        reader.start()
        assert not found
        shelf.put("batch 0", seen("reference"), {"reference": torch.ones(1, 2)})
        reader.join(60)
    assert len(found) == 1


def test_nobody_waits_for_references_that_failed() -> None:
    errors = []

    def read(shelf: Shelf) -> None:
        try:
            shelf.take("batch 1", "reference")
        except RuntimeError as error:
            errors.append(str(error))

    with Shelf({"batch 1": 1}) as shelf:
        reader = threading.Thread(target=read, args=(shelf,))
        reader.start()
        with pytest.raises(KeyboardInterrupt), shelf.failing():
            raise KeyboardInterrupt
        reader.join(60)
    assert errors == ["batch 1: the references did not get so far"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file: .* cannot be kept there .*set BAKEOUT_CACHE"):
        Shelf({}, tmp_path / "file")
    with Shelf({"batch 0": 1}, tmp_path) as shelf:
        shelf._scratch.cleanup()  # as a full disk would, it refuses the file
        with pytest.raises(OutputError, match=r"cannot be kept there"):
            shelf.put("batch 0", seen("reference"), {"reference": torch.ones(1, 2)})
