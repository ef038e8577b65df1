"""Defects hardly larger than rounding: each is caught, or it is shown why it cannot be.

The hashes are rewritten after planting, as in `test_planted_defects`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bake.recipe import Recipe
from bake.rounding import BAR
from tests.clamps import METHOD_TABLES
from tests.defects import (
    FORWARD_LINE,
    REFUSAL_TABLE,
    as_released,
    bake_tables,
    drop_graph,
    in_clamp,
    in_code,
    set_to,
)
from tests.engines import InProcess
from verify.report.findings import VerifyReport
from verify.run import verify_folder


def one(
    key: str, index: int, change: Callable[[np.ndarray], np.ndarray]
) -> Callable[[dict[str, np.ndarray]], None]:
    """One feature's part of a tensor as a function of itself."""

    def apply(clamp: dict[str, np.ndarray]) -> None:
        at = (slice(None), index) if key == "W_enc" else (index,)
        clamp[key][at] = change(clamp[key][at])

    return apply


def later_by_half_a_percent(clamp: dict[str, np.ndarray]) -> None:
    clamp["b_enc"][1] += 0.005 * clamp["theta"][1]


def in_bfloat16(clamp: dict[str, np.ndarray]) -> None:
    for name, array in clamp.items():
        if array.dtype == np.float32:
            clamp[name] = torch.from_numpy(array).bfloat16().float().numpy()


BACKBONE = '        if "sae_exempt" not in kwargs:\n'
HIDDEN = """        inputs["attention_mask"] = attention_mask.clone()
        inputs["attention_mask"][:, 9] = 0
"""
HEAD = "        self.model = ClampedGemma2Model(config)\n"
ROUNDED = (
    "        self.register_forward_hook(\n"
    "            lambda _, __, out: out.__setitem__('logits', out.logits.half().float())\n"
    "        )\n"
)
WHERE = "sae_exempt if self.exempt_bos else None"
BEFORE_THE_LAYER = f"""        if self.sae_clamp is not None:
            hidden_states = self.sae_clamp(hidden_states, {WHERE})
            return super().forward(hidden_states, *args, **kwargs)
"""
IN_A_NORM = f"""        if self.sae_clamp is not None:
            norm = self.pre_feedforward_layernorm
            hook = norm.register_forward_pre_hook(
                lambda _, given: (self.sae_clamp(given[0], {WHERE}),)
            )
            h = super().forward(hidden_states, *args, **kwargs)
            hook.remove()
            return h
"""
DEFECTS: dict[str, Callable[[Path], None]] = {
    "one value off by 2 %": in_clamp(one("value", 1, lambda v: v * 1.02)),
    "one value off by 0.01 %": in_clamp(one("value", 1, lambda v: v * 1.0001)),
    "one W_dec row scaled by 1.01": in_clamp(one("W_dec", 1, lambda w: w * 1.01)),
    "one W_dec row scaled by 1.0001": in_clamp(one("W_dec", 1, lambda w: w * 1.0001)),
    "theta off by 1 %": in_clamp(set_to("theta", lambda t: t * 1.01)),
    "one b_enc off by 0.5 % of theta": in_clamp(later_by_half_a_percent),
    "clamp rounded to bfloat16": in_clamp(in_bfloat16),
    "one W_enc column rounded to float16": in_clamp(
        one("W_enc", 1, lambda w: w.astype(np.float16).astype(np.float32))
    ),
    "one value off by a float16 rounding": in_clamp(one("value", 1, lambda v: v * (1 + 2.0**-12))),
    "clamp before the layer": in_code(FORWARD_LINE, BEFORE_THE_LAYER + FORWARD_LINE),
    "clamp in a norm, not in the residual": in_code(FORWARD_LINE, IN_A_NORM + FORWARD_LINE),
    "one column of the attention mask": in_code(BACKBONE, HIDDEN + BACKBONE),
    "logits in float16": in_code(HEAD, HEAD + ROUNDED),
    "delta rounded to bfloat16": in_code(
        "(h + delta).to(h.dtype)", "(h + delta.bfloat16()).to(h.dtype)"
    ),
}
CODE = (*list(DEFECTS)[-5:], "twice")


@pytest.fixture(autouse=True)
def in_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves starting a process, where it is not the folder's own code that is defective."""
    if not any(defect in request.node.name for defect in CODE):
        monkeypatch.setattr("verify.engines.engines.TorchRunner", InProcess)


def verified(work: Path, name: str, base: str, plant: Callable[[Path], None]) -> VerifyReport:
    """A verification of a copy of a folder with a defect in it, by engines with that defect."""
    folder = shutil.copytree(work / base, work / name.replace(" ", "_"))
    if (folder / "model.onnx").exists():
        drop_graph(folder)
    plant(folder)
    recipe = Recipe.load(work / f"{base}.toml")
    with pytest.MonkeyPatch.context() as patch:
        as_released(folder, patch)
        return verify_folder(folder, recipe, only=frozenset({"parity"}))


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_subtle_defect_is_caught(work: Path, defect: str) -> None:
    report = verified(work, defect, "sound", DEFECTS[defect])
    checkpoint = report.engine("checkpoint")
    assert checkpoint is not None and checkpoint.parity is not None
    rounding = checkpoint.parity.rounding
    assert rounding is not None
    assert report.verdict == "fail", f"worst {rounding.worst:.3g}, typical {rounding.typical:.3g}"
    assert {failure.kind for failure in report.failures} == {"parity"}
    assert any(failure.what == "max_abs_logit" for failure in report.failures)


@pytest.mark.parametrize("defect", list(DEFECTS)[:9])
def test_a_subtle_defect_is_caught_where_few_tokens_are_compared(
    work: Path, defect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a large vocabulary: the fewest tokens of every prompt, and few from a cache."""
    monkeypatch.setattr("verify.compare.chosen.COMPARED_LOGITS", 1)
    monkeypatch.setattr("verify.compare.comparing.DECODED_LOGITS", 1)
    report = verified(work, f"few {defect}", "sound", DEFECTS[defect])
    checkpoint = report.engine("checkpoint")
    assert checkpoint is not None and checkpoint.parity is not None
    parity = checkpoint.parity
    assert parity.of_tokens is not None and parity.tokens_compared < parity.of_tokens / 4
    assert report.verdict == "fail", parity.rounding
    assert any(failure.what == "max_abs_logit" for failure in report.failures)


@pytest.mark.parametrize("defect", list(DEFECTS)[:9])
def test_a_subtle_defect_of_a_16_bit_folder_is_caught_in_float32(work: Path, defect: str) -> None:
    """A value that is 2 % off is less than what bfloat16 rounds away of the residual stream."""
    if not (work / "rough").exists():
        bake_tables(work, "rough", [REFUSAL_TABLE], dtype="bfloat16")
    report = verified(work, f"rough {defect}", "rough", DEFECTS[defect])
    assert report.dtype == "bfloat16" and report.verdict == "fail"
    assert all(failure.what.endswith(", in float32") for failure in report.failures[:1])


def test_rounding_twice_to_bfloat16_is_one_rounding_and_cannot_be_told(work: Path) -> None:
    """The delta rounded before it is added, in a model that rounds the sum anyway: at most one more
    rounding of one layer's output, which is what every sound engine may differ by. The report says
    what size of fault it would have seen.
    """
    bake_tables(work, "sixteen", [METHOD_TABLES["clamp"]], dtype="bfloat16")
    twice = in_code("(h + delta).to(h.dtype)", "h + delta.to(h.dtype)")
    report = verified(work, "rounded twice", "sixteen", twice)
    checkpoint = report.engine("checkpoint")
    assert checkpoint is not None and checkpoint.parity is not None
    rounding = checkpoint.parity.rounding
    assert rounding is not None and rounding.worst <= BAR / 2
    assert report.verdict == "pass", report.failures
    assert rounding.smallest_fault is not None and rounding.smallest_fault > 1e-3
    assert checkpoint.parity.float32 is not None and checkpoint.parity.float32.worst <= BAR / 2
    assert replace(rounding, smallest_fault=None) != rounding
