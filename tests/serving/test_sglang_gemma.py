"""SGLang's own registry, loader and layers on clamped folders, in a process of its own."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from tests.serving.clamped_folders import (
    APART,
    CASES,
    DAMAGE,
    ROWS,
    SERVED,
    Served,
    answers,
    clamped_folders,
    kl,
    ours,
)
from tests.worlds import VOCAB

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None and not (APART / "sglang").is_dir(),
    reason="SGLang is not installed; `make test` installs it",
)
WAYS: dict[str, dict[str, object]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "auto": {"dtype": "auto"},
    "offloaded": {"wrapped": True},
    "embeddings": {"embeds": True},
    "not loaded": {"load_format": "dummy"},
    "trusted": {"trust_remote_code": True},
    "as stock": {
        "trust_remote_code": True,
        "json_model_override_args": json.dumps({"architectures": ["Gemma2ForCausalLM"]}),
    },
}
"""Trusted: as if bakeout were not installed. As stock: a flag says that it is a Gemma 2."""
THREE = ("gemma", "gemma2, two places", "gemma3_text")
WINDOW = 8
LIMITS = {"gemma": 1e-5}
"""Mean KL to transformers, in nats; of SGLang's Gemma 1, whose GELU is the exact one, else 1e-8."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    out = tmp_path_factory.mktemp("sglang")
    folders = clamped_folders(out)
    asked = [(name, way) for name in (*CASES, *DAMAGE) for way in ("float32", "trusted")]
    asked += [(name, way) for name in THREE for way in ("bfloat16", "auto", "offloaded")]
    asked += [("gemma2, two places", way) for way in ("embeddings", "not loaded", "as stock")]
    requests = [
        {
            "folder": str(folders[name]),
            "dtype": "float32",
            "rows": ROWS,
            "trust_remote_code": False,
            **WAYS[way],
        }
        for name, way in asked
    ]
    return Served(folders, dict(zip(asked, answers("sglang_here", requests, out), strict=True)))


@pytest.mark.parametrize(
    ("name", "way"),
    [(name, "float32") for name in SERVED]
    + [(name, way) for name in THREE for way in ("offloaded", "bfloat16")],
)
def test_it_serves_what_transformers_does(served: Served, name: str, way: str) -> None:
    got = served.said[name, way]
    assert isinstance(got, torch.Tensor), got
    assert got.shape == (sum(map(len, ROWS)), VOCAB)
    want, base = (ours(served.folders[name], "float32", clamped=of) for of in (True, False))
    if way == "bfloat16":  # a token near its threshold may fire or not
        assert kl(want, got) < 0.05 * kl(base, got)
    else:
        assert kl(want, got) < LIMITS.get(name, 1e-8) < 1e-3 < kl(want, base)


def test_bos_is_left_alone_by_its_id(served: Served) -> None:
    at = [0, len(ROWS[0]), len(ROWS[0]) + len(ROWS[1])]  # where each sequence begins with BOS
    said = [served.said[name, "float32"][at] for name in ("gemma2, BOS too", "gemma2, two places")]
    assert not torch.equal(*said)


def test_where_only_embeddings_are_given_position_0_is_left_alone(served: Served) -> None:
    ids, embeds = (served.said["gemma2, two places", way] for way in ("float32", "embeddings"))
    inner = torch.zeros(len(ids), dtype=torch.bool)
    inner[len(ROWS[0]) + 2 : len(ROWS[0]) + len(ROWS[1])] = True  # from its second BOS on
    assert kl(ids[~inner], embeds[~inner]) < 1e-8 < 1e-5 < kl(ids[inner], embeds[inner])


def test_a_sequence_gate_is_refused(served: Served) -> None:
    for way, words in (
        ("float32", "a clamp with a sequence gate cannot be served by SGLang"),
        ("trusted", "nor with the attention of vLLM and others (sglang)"),
    ):
        said = served.said["gemma2, dynamic", way]
        assert isinstance(said, str)
        assert words in said


@pytest.mark.parametrize("words", DAMAGE)
def test_a_damaged_clamp_is_refused(served: Served, words: str) -> None:
    said = served.said[words, "float32"]
    assert isinstance(said, str)
    assert words in said
    answered = served.said[words, "trusted"]
    assert isinstance(answered, str) or answered.isnan().all()


def test_a_clamp_that_nothing_was_loaded_into_answers_nan(served: Served) -> None:
    answered = served.said["gemma2, two places", "not loaded"]
    assert isinstance(answered, torch.Tensor), answered
    assert answered.isnan().all()


def test_float16_which_auto_takes_for_float32_is_refused(served: Served) -> None:
    for name, refused in (("gemma", False), ("gemma2, two places", True), ("gemma3_text", True)):
        said = served.said[name, "auto"]
        assert isinstance(said, str) == refused
        assert not refused or "dtype float16" in said


@pytest.mark.parametrize("name", SERVED)
def test_the_folders_own_code_clamps_too(served: Served, name: str) -> None:
    got = served.said[name, "trusted"]
    assert isinstance(got, torch.Tensor), got
    want, base = (ours(served.folders[name], "float32", clamped=of) for of in (True, False))
    assert kl(want, got) < 0.25 * kl(base, got)  # SGLang sees a token further than the window
    early = torch.tensor([at < WINDOW for row in ROWS for at in range(len(row))])
    assert kl(want[early], got[early]) < 1e-5 < 1e-3 < kl(base[early], got[early])


def test_called_a_stock_gemma_it_is_refused(served: Served) -> None:
    said = served.said["gemma2, two places", "as stock"]
    assert isinstance(said, str)
    assert "sae_clamp" in said
