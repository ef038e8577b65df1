from __future__ import annotations

import io
import sys

import pytest
import torch

from verify.engines.forward import AT_ONCE, parted
from verify.engines.torch_worker import (
    BLOCKED,
    Blocker,
    pack,
    read_message,
    unpack,
    write_message,
)


def test_messages_keep_their_bounds() -> None:
    stream = io.BytesIO()
    for data in (b"one", b"", b"x" * 70000):
        write_message(stream, data)
    stream.seek(0)
    assert [read_message(stream) for _ in range(4)] == [b"one", b"", b"x" * 70000, None]
    assert read_message(io.BytesIO(b"\x09\0\0\0\0\0\0\0short")) is None


def test_words_and_tensors_come_back() -> None:
    ids = torch.arange(6).reshape(2, 3)
    words, tensors = unpack(pack({"op": "read"}, {"input_ids": ids}))
    assert words == {"op": "read"}
    assert torch.equal(tensors["input_ids"], ids)
    assert unpack(pack({"error": "no"})) == ({"error": "no"}, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_what_was_formed_is_parted_into_logits_and_losses(dtype: torch.dtype, rate: float) -> None:
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 11, (5, 13), generator=draws)
    whole = torch.randn(5, 13, 11, generator=draws).to(dtype)
    wanted = torch.rand(5, 13, generator=draws) < 0.3
    scored = torch.rand(5, 13, generator=draws) < rate
    scored[:, -1] = False
    assert rate == 0 or int(scored.sum()) > AT_ONCE
    for one in (wanted, wanted & scored, wanted | scored, wanted & False):
        logits, losses = parted(whole[one | scored], one, scored, ids)
        assert (logits.dtype, losses.dtype) == (torch.float32, torch.float64)
        assert torch.equal(logits, whole[one].float()) and logits.is_contiguous()
        expected = [
            float(-whole[row, at].double().log_softmax(-1)[ids[row, at + 1]])
            for row, at in scored.nonzero().tolist()
        ]
        assert losses.tolist() == pytest.approx(expected, abs=1e-6)


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
