"""The power of the suite: every planted defect makes a verification fail for the right reason.

A defect is planted as a bug or an attacker would leave it: the manifest's hashes are rewritten, so
that nothing is caught by them. And sound folders pass.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from bake.errors import BakeoutError
from bake.recipe import Recipe
from export.carriers.checkpoint import CLAMP_SHARD
from export.carriers.onnx.onnx_folder import export_onnx
from tests.clamps import METHOD_TABLES
from tests.defects import (
    as_released,
    bake_tables,
    drop_graph,
    in_clamp,
    in_code,
    in_config,
    rewrite_file,
    set_to,
)
from tests.engines import InProcess
from tests.worlds import (
    tiny_sae,
)
from verify.evidence.kinds import KINDS, Kind
from verify.report.findings import VerifyReport
from verify.run import verify_folder

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(autouse=True)
def in_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves starting a process, where it is not the folder's own code that is defective."""
    if not any(defect in request.node.name for defect in CODE):
        monkeypatch.setattr("verify.engines.engines.TorchRunner", InProcess)


# --------------------------------------------------------------------------- defects


def swap_a_feature(clamp: dict[str, np.ndarray]) -> None:
    sae = tiny_sae()
    clamp["W_enc"][:, 2], clamp["W_dec"][2] = sae.W_enc[:, 7], sae.W_dec[7]
    clamp["b_enc"][2] = sae.b_enc[7] - sae.b_dec @ sae.W_enc[:, 7]
    clamp["theta"][2] = sae.threshold[7]


def forget_b_dec(clamp: dict[str, np.ndarray]) -> None:
    sae = tiny_sae()
    clamp["b_enc"] = clamp["b_enc"] + sae.b_dec @ clamp["W_enc"]


def move_a_layer(folder: Path) -> None:
    tensors = load_file(folder / CLAMP_SHARD)
    moved = {name.replace("layers.1.", "layers.2."): array for name, array in tensors.items()}
    save_file(moved, folder / CLAMP_SHARD, metadata={"format": "pt"})
    rewrite_file(folder, CLAMP_SHARD, (folder / CLAMP_SHARD).read_bytes())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {
        name.replace("layers.1.sae", "layers.2.sae"): file
        for name, file in index["weight_map"].items()
    }
    rewrite_file(folder, "model.safetensors.index.json", json.dumps(index).encode())
    in_config(lambda config: config["sae_clamp"]["sites"][0].update(layer=2))(folder)


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / SHARD).read_bytes())
    data[len(data) // 2 & ~3] ^= 1  # the lowest bit of a mantissa
    rewrite_file(folder, SHARD, bytes(data))


def other_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    rewrite_file(folder, "tokenizer.json", json.dumps(tokenizer).encode())


def other_template(folder: Path) -> None:
    rewrite_file(folder, "chat_template.jinja", b"{{ messages[0]['content'] }}")


def stale_graph(folder: Path) -> None:
    in_clamp(set_to("value", lambda v: v * 1.01))(folder)


def graph_without_clamp(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        if node.domain == "ai.bakeout":
            node.op_type, node.domain = "Identity", ""
            del node.input[1:]
    rewrite_file(folder, "model.onnx", model.SerializeToString())


def graph_with_the_clamp_in_prefill_only(folder: Path) -> None:
    """Exempt where the cache is not empty."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    helper = onnx.helper
    clamp = next(node for node in model.graph.node if node.domain == "ai.bakeout")
    zero = helper.make_tensor("zero", onnx.TensorProto.INT64, [1], [0])
    nodes = [
        helper.make_node("Shape", ["past_key_values.0.key"], ["cached"], start=2, end=3),
        helper.make_node("Constant", [], ["none"], value=zero),
        helper.make_node("Greater", ["cached", "none"], ["later"]),
        helper.make_node("Or", [clamp.input[1], "later"], ["spared"]),
    ]
    clamp.input[1] = "spared"
    rest = list(model.graph.node)
    at = rest.index(clamp)
    del model.graph.node[:]
    model.graph.node.extend([*rest[:at], *nodes, *rest[at:]])
    rewrite_file(folder, "model.onnx", model.SerializeToString())


EDIT = "            return self.sae_clamp(h, exempt)\n"
BY_ID = "        exempt = input_ids == token_ids[0]\n"
BY_INDEX = "        exempt = torch.arange(input_ids.shape[1]).expand_as(input_ids) == 0\n"
DEFECTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "sign of the value": (in_clamp(set_to("value", np.negative)), "parity: checkpoint"),
    "one feature swapped": (in_clamp(swap_a_feature), "parity: checkpoint"),
    "off-by-one layer": (move_a_layer, "layers 1"),
    "theta dropped": (in_clamp(set_to("theta", np.zeros_like)), "parity: checkpoint"),
    "trigger at or above": (
        in_code("on = (a > self.trigger)", "on = (a >= self.trigger)"),
        "parity",
    ),
    "route transposed": (in_clamp(set_to("route", np.transpose)), "parity: checkpoint"),
    "BOS exemption lost": (
        in_config(lambda config: config["sae_clamp"]["sites"][0].update(exempt_bos=False)),
        "parity: checkpoint",
    ),
    "exemption by index": (in_code(BY_ID, BY_INDEX), "parity: checkpoint"),
    "float16 clamp": (
        in_code(
            "        a = self.feature_acts(h)\n",
            "        a = self.feature_acts(h).half().float()\n",
        ),
        "parity: checkpoint",
    ),
    "decoder not folded": (in_clamp(set_to("W_dec", lambda w: w * 1.3)), "parity: checkpoint"),
    "b_dec ignored": (in_clamp(forget_b_dec), "parity: checkpoint"),
    "clamp skipped in decode": (
        in_code(EDIT, f"            return h if h.shape[1] == 1 else {EDIT.strip()[7:]}\n"),
        "parity: checkpoint",
    ),
    "first batch row only": (
        in_code(EDIT, f"            return torch.cat([{EDIT.strip()[7:]}[:1], h[1:]])\n"),
        "parity: checkpoint",
    ),
    "one base weight off by one bit": (flip_a_bit, f"integrity: {SHARD}"),
    "wrong tokenizer": (other_tokenizer, "integrity: tokenizer.json"),
    "chat template changed": (other_template, "integrity: chat_template.jinja"),
    "stale ONNX": (stale_graph, "integrity: model.onnx: was made from other weights"),
    "ONNX without the clamp": (graph_without_clamp, "integrity: model.onnx: holds 0 clamps"),
    "ONNX without the clamp in decode": (graph_with_the_clamp_in_prefill_only, "parity: onnx"),
    "dropped last layer": (
        in_config(lambda config: config.update(num_hidden_layers=3, layer_types=None)),
        "num_hidden_layers",
    ),
    "wrong rope": (
        in_config(lambda c: c.update(rope_parameters={"rope_type": "default", "rope_theta": 9.0})),
        "parity: checkpoint",
    ),
    "wrong window": (in_config(lambda config: config.update(sliding_window=5)), "parity"),
}
CODE = (
    "trigger at or above",
    "exemption by index",
    "float16 clamp",
    "clamp skipped in decode",
    "first batch row only",
)
GRAPHS = ("stale ONNX", "ONNX without the clamp", "ONNX without the clamp in decode")


def reasons(folder: Path, recipe: Recipe) -> list[str]:
    """Why a verification does not pass, by its files, and by what its engines say."""
    found = []
    for kind in ("integrity", "parity"):
        try:
            report: VerifyReport = verify_folder(folder, recipe, only=frozenset({kind}))
        except BakeoutError as error:
            found.append(str(error))
        else:
            found += [str(failure) for failure in report.failures]
    return found


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_caught(
    work: Path, defect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, reason = DEFECTS[defect]
    folder = shutil.copytree(work / "sound", work / defect.replace(" ", "_"))
    if defect not in GRAPHS:  # the graph would be bound to other weights, which is caught first
        drop_graph(folder)
    plant(folder)
    if defect in CODE:
        found = reasons(folder, Recipe.load(work / "sound.toml"))
        (only,) = set(found)  # whatever is asked for
        assert only.startswith("integrity: modeling_clamped_gemma.py: is none that a released")
        as_released(folder, monkeypatch)
    found = reasons(folder, Recipe.load(work / "sound.toml"))
    assert any(reason in text for text in found), found


# --------------------------------------------------------------------------- sound folders

SOUND: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    **{
        f"{method}, {base}": (base, [METHOD_TABLES[method]], {})
        for base, methods in (
            ("gemma", ("clamp", "refusal", "scale")),
            ("gemma2", tuple(METHOD_TABLES)),
            ("gemma3_text", ("conditional clamp", "zero", "random decoder")),
        )
        for method in methods
    },
    **{
        f"two hook points, {base}": (base, [METHOD_TABLES["clamp"], METHOD_TABLES["refusal"]], {})
        for base in ("gemma", "gemma2", "gemma3_text")
    },
    **{
        f"bfloat16, {base}": (base, [METHOD_TABLES["conditional clamp"]], {"dtype": "bfloat16"})
        for base in ("gemma", "gemma2", "gemma3_text")
    },
    "BOS clamped": ("gemma2", [{**METHOD_TABLES["clamp"], "exempt_bos": False}], {}),
}


HELD = frozenset(
    name
    for name, kind in KINDS.items()
    if kind.gather is None or kind.failures is not Kind.failures
)
"""The kinds of evidence in which anything can be out of tolerance."""


@pytest.mark.parametrize("case", SOUND)
def test_a_sound_folder_passes(work: Path, case: str) -> None:
    base, tables, options = SOUND[case]
    name = case.replace(" ", "_").replace(",", "")
    folder = bake_tables(work, name, tables, base, **options)
    export_onnx(folder)
    only = frozenset() if case.startswith("two") else HELD
    report = verify_folder(folder, Recipe.load(work / f"{name}.toml"), only)
    assert report.verdict == "pass", report.failures
    assert (report.scope == "full") == (not only)


def test_there_are_twenty_of_each() -> None:
    assert len(DEFECTS) >= 20 and len(SOUND) >= 20
