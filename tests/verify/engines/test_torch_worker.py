from __future__ import annotations

import io
import sys

import pytest
import torch

from verify.engines.torch_worker import BLOCKED, Blocker, pack, read_message, unpack, write_message


def test_messages_keep_their_bounds() -> None:
    stream = io.BytesIO()
    for data in (b"one", b"", b"x" * 70000):
        write_message(stream, data)
    stream.seek(0)
    assert [read_message(stream) for _ in range(4)] == [b"one", b"", b"x" * 70000, None]
    assert read_message(io.BytesIO(b"\x09\0\0\0\0\0\0\0short")) is None


def test_words_and_tensors_come_back() -> None:
    ids = torch.arange(6).reshape(2, 3)
    words, tensors = unpack(pack({"op": "logits"}, {"input_ids": ids}))
    assert words == {"op": "logits"}
    assert torch.equal(tensors["input_ids"], ids)
    assert unpack(pack({"error": "no"})) == ({"error": "no"}, {})


def test_every_package_of_bakeout_is_blocked_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocker = Blocker()
    monkeypatch.setattr(sys, "meta_path", [blocker, *sys.meta_path])
    for name in BLOCKED:
        with pytest.raises(ImportError, match=f"{name}.anything is a package of bakeout"):
            blocker.find_spec(f"{name}.anything")
    assert blocker.tried == [f"{name}.anything" for name in BLOCKED]
    for name in ("verify.report", "verify.report.findings"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=r"verify\.report is a package of bakeout"):
        import verify.report.findings  # noqa: F401
    assert blocker.find_spec("baker") is None
    assert blocker.find_spec("torch.export") is None
