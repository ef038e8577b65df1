"""vLLM's own registry, loader and layers on clamped checkpoints, in a process of its own."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.serving.clamped_folders import (
    APART,
    CASES,
    DAMAGE,
    ROWS,
    SERVED,
    TENSORS,
    Served,
    answers,
    clamped_folders,
    kl,
    ours,
)
from tests.worlds import VOCAB

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None and not (APART / "vllm").is_dir(),
    reason="vLLM is not installed; `make test` installs it",
)
TRUSTED = "float32, bakeout not installed, the folder's code trusted"
"""Then vLLM puts its own attention into the folder's classes."""
OFFLOADED = "float32, weights offloaded"
"""Then vLLM wraps the forward of each layer as it makes it."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    out = tmp_path_factory.mktemp("vllm")
    folders = clamped_folders(out)
    asked = [(name, "float32") for name in folders]
    for dtype in ("bfloat16", "float16"):
        asked += [(name, dtype) for name in ("gemma", "gemma2, two places", "gemma3_text")]
    asked += [(name, OFFLOADED) for name in ("gemma", "gemma3_text")]
    trusted = [(name, TRUSTED) for name in (*CASES, *DAMAGE, *TENSORS)]
    said = {}
    for some, flags in ((asked, ()), (trusted, ("alone",))):
        requests = [
            {
                "folder": str(folders[name]),
                "dtype": way.partition(",")[0],
                "trust_remote_code": way == TRUSTED,
                "wrapped": way == OFFLOADED,
                "rows": ROWS,
            }
            for name, way in some
        ]
        said |= dict(zip(some, answers("vllm_here", requests, out, *flags), strict=True))
    return Served(folders, said)


@pytest.mark.parametrize("name", SERVED)
def test_it_serves_what_transformers_does(served: Served, name: str) -> None:
    got = served.said[name, "float32"]
    assert isinstance(got, torch.Tensor), got
    assert got.shape == (sum(map(len, ROWS)), VOCAB)
    want, base = (ours(served.folders[name], "float32", clamped=of) for of in (True, False))
    assert kl(want, got) < 1e-8 < 1e-3 < kl(want, base)
    if (name, "bfloat16") in served.said:
        rounded = served.said[name, "bfloat16"]  # a token near its threshold may fire or not
        assert kl(want, rounded) < 0.05 * kl(base, rounded)


def test_bos_is_left_alone_by_its_id(served: Served) -> None:
    name = "gemma2, BOS too"
    with_bos = ours(served.folders[name], "float32")
    at = [0, len(ROWS[0]), len(ROWS[0]) + len(ROWS[1])]  # where each sequence begins with BOS
    alone = ours(served.folders["gemma2, two places"], "float32")
    assert kl(with_bos[at], served.said[name, "float32"][at]) < 1e-8
    assert kl(alone[at], served.said["gemma2, two places", "float32"][at]) < 1e-8
    assert not torch.equal(with_bos[at], alone[at])


def test_a_sequence_gate_is_refused(served: Served) -> None:
    said = served.said["gemma2, dynamic", "float32"]
    assert isinstance(said, str)
    assert "a clamp with a sequence gate cannot be served by vLLM" in said
    said = served.said["gemma2, dynamic", TRUSTED]
    assert isinstance(said, str)
    assert "nor with the attention of vLLM and others (vllm)" in said


@pytest.mark.parametrize("name", SERVED)
def test_so_does_the_folders_own_code_in_vllm(served: Served, name: str) -> None:
    got = served.said[name, TRUSTED]
    assert isinstance(got, torch.Tensor), got
    assert kl(ours(served.folders[name], "float32"), got) < 1e-8


@pytest.mark.parametrize("name", ["gemma", "gemma3_text"])
def test_offloaded_layers_are_clamped_too(served: Served, name: str) -> None:
    got = served.said[name, OFFLOADED]
    assert isinstance(got, torch.Tensor), got
    assert kl(ours(served.folders[name], "float32"), got) < 1e-8


@pytest.mark.parametrize("words", DAMAGE)
def test_a_damaged_clamp_is_refused(served: Served, words: str) -> None:
    said = served.said[words, "float32"]
    assert isinstance(said, str)
    assert words in said
    answered = served.said[words, TRUSTED]
    assert isinstance(answered, str) or answered.isnan().all()


@pytest.mark.parametrize("tensor", TENSORS)
def test_a_clamp_that_lacks_a_tensor_never_answers_as_the_base(served: Served, tensor: str) -> None:
    assert isinstance(served.said[tensor, "float32"], str)
    answered = served.said[tensor, TRUSTED]
    assert isinstance(answered, str) or answered.isnan().all()


def test_float16_is_refused_as_the_bases_is(served: Served) -> None:
    for name, refused in (("gemma", False), ("gemma2, two places", True), ("gemma3_text", True)):
        said = served.said[name, "float16"]
        assert isinstance(said, str) == refused
        assert not refused or "dtype float16" in said
