"""Half as many where memory runs out, and only there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bake.errors import BakeoutError, FolderError, RanOutError, TooLargeError
from bake.files.halving import in_halves, joined, out_of_memory
from bakeout.cli import run as command_line

ERRORS: list[Callable[[], BaseException]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 B"),
    lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    MemoryError,
    lambda: TooLargeError("folder: OutOfMemoryError: CUDA out of memory"),
]


class Owner:
    """Whose memory runs out."""


def test_the_allocators_own_errors_are_known() -> None:
    with pytest.raises(RuntimeError) as told:
        torch.empty(1 << 45)
    assert out_of_memory(told.value)
    for error in ERRORS:
        assert out_of_memory(error())
    others = [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("out of memory"),
        FolderError("out of memory"),
        RanOutError("took over 3600 seconds"),
        KeyboardInterrupt(),
    ]
    assert not any(map(out_of_memory, others))


@pytest.mark.parametrize("error", ERRORS)
def test_what_runs_out_goes_on_with_half(
    capsys: pytest.CaptureFixture[str], error: Callable[[], BaseException]
) -> None:
    asked: list[int] = []
    owner = Owner()

    def run(rows: slice) -> list[int]:
        asked.append(rows.stop - rows.start)
        if asked[-1] > 3:
            raise error()
        return list(range(rows.start, rows.stop))

    parts = in_halves(owner, "reading", run, 13, 10)
    assert [i for part in parts for i in part] == list(range(13))
    assert asked == [13, 6, 3, 3, 3, 3, 1]
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "note: reading: memory ran out at 13 at once; going on with 6",
        "note: reading: memory ran out at 6 at once; going on with 3",
    ]
    asked.clear()  # 30 tokens held: of longer rows fewer, of shorter ones more
    in_halves(owner, "reading", run, 4, 20)
    in_halves(owner, "reading", run, 2, 15)
    assert asked == [1, 1, 1, 1, 2]
    assert capsys.readouterr().err == ""
    in_halves(owner, "something else", lambda rows: asked.append(rows.stop), 9, 10)
    in_halves(Owner(), "reading", lambda rows: asked.append(rows.stop), 9, 10)
    assert asked[5:] == [9, 9]


def test_all_at_once_where_there_is_room() -> None:
    assert in_halves(Owner(), "reading", lambda rows: rows, 12, 99) == [slice(0, 12)]
    assert in_halves(Owner(), "reading", lambda rows: rows.start, 12, most=5) == [0, 5, 10]
    assert in_halves(Owner(), "reading", lambda rows: rows, 0) == []


def test_one_row_that_does_not_fit_is_one_line() -> None:
    def run(_: slice) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    with pytest.raises(
        BakeoutError, match=r"^reading: memory ran out at one alone \(CUDA out of memory. Tried"
    ):
        in_halves(Owner(), "reading", run, 4)


def test_no_other_error_is_taken_for_one() -> None:
    asked = []

    def run(rows: slice) -> None:
        asked.append(rows)
        raise RuntimeError("index out of range")

    with pytest.raises(RuntimeError, match="index out of range"):
        in_halves(Owner(), "reading", run, 4)
    assert asked == [slice(0, 4)]


@dataclass(frozen=True)
class Found:
    """Of some rows."""

    h: Tensor
    by_layer: dict[int, Tensor]


def test_parts_are_joined() -> None:
    whole = torch.arange(24).view(4, 6)
    (one,) = parts = [(Found(whole, {2: whole + 1}), whole)]
    assert joined(parts) is one
    halves = [(Found(of, {2: of + 1}), of) for of in whole.split(3)]
    found, tensor = joined(halves)
    assert torch.equal(found.h, whole) and torch.equal(found.by_layer[2], whole + 1)
    assert torch.equal(tensor, whole)
    said = joined([torch.tensor([[5, 6]]), torch.tensor([[7], [8]])])
    assert said.tolist() == [[5, 6], [7, -1], [8, -1]]


def test_the_command_line_says_it_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("bakeout.verbs.showing.show_folder", full)
    assert command_line(["show", "folder"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: memory ran out (CUDA out of memory.")
