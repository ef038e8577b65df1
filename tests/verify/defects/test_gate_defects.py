"""What goes wrong with a sequence gate is found: in the file, and in what the folder says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from bake.errors import FolderError
from bake.recipe import Recipe
from export.carriers.onnx.onnx_folder import export_onnx
from tests.clamps import METHOD_TABLES
from tests.defects import as_released, bake_tables, drop_graph, in_code, in_config, rewrite_file
from verify.report.findings import VerifyReport
from verify.run import verify_folder


@pytest.fixture(scope="module")
def gated(work: Path) -> Path:
    """Two gates, in a checkpoint and a graph."""
    folder = bake_tables(work, "gated", [METHOD_TABLES["dynamic"]] * 2, "gemma3_text")
    export_onnx(folder)
    return folder


def found_in(folder: Path, gated: Path, *kinds: str) -> list[str]:
    recipe = Recipe.load(gated.with_suffix(".toml"))
    report: VerifyReport = verify_folder(folder, recipe, only=frozenset(kinds))
    return [str(failure) for failure in report.failures]


def set_tau(config: dict[str, Any]) -> None:
    config["sae_clamp"]["sites"][1]["tau"] = 0.6


def take_the_gate_off(config: dict[str, Any]) -> None:
    for site in config["sae_clamp"]["sites"]:
        del site["tau"]
    config["sae_clamp"]["schema"] = 1


SUM = "n_fired, n = (of.sum(1, keepdim=True) for of in kept)"
HARDLY_KEPT = in_code(SUM, SUM.replace("keepdim=True)", "keepdim=True) // 8"))
ONE_LATE = in_code("n = flags.cumsum(1)", "n = flags.cumsum(1) - flags.long()")


@pytest.mark.parametrize("change", [set_tau, take_the_gate_off])
def test_a_config_that_says_otherwise_as_the_manifest_does(
    gated: Path, tmp_path: Path, change: Callable[..., Any]
) -> None:
    folder = shutil.copytree(gated, tmp_path / "changed")
    drop_graph(folder)
    in_config(change)(folder)
    sites = json.loads((folder / "config.json").read_text())["sae_clamp"]["sites"]
    manifest = json.loads((folder / "manifest.json").read_text())
    for clamp, site in zip(manifest["clamps"], sites, strict=True):
        clamp["parameters"]["tau"] = site.get("tau")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = found_in(folder, gated, "integrity")
    assert any("tau is" in failure for failure in found), found
    found = found_in(folder, gated, "parity")
    assert any(failure.startswith("parity: checkpoint") for failure in found), found


def raise_the_schema(config: dict[str, Any]) -> None:
    config["sae_clamp"]["schema"] = 3


def a_little_more(config: dict[str, Any]) -> None:
    config["sae_clamp"]["sites"][0]["tau"] += 1e-7


@pytest.mark.parametrize("change", [set_tau, take_the_gate_off, raise_the_schema, a_little_more])
def test_a_config_that_is_not_the_manifests_is_refused_without_a_recipe(
    gated: Path, tmp_path: Path, change: Callable[..., Any]
) -> None:
    folder = shutil.copytree(gated, tmp_path / "changed")
    drop_graph(folder)
    in_config(change)(folder)
    with pytest.raises(FolderError, match=r"config\.json: .*(tau|schema)"):
        verify_folder(folder)
    with pytest.raises(FolderError, match=r"config\.json: .*(tau|schema)"):
        export_onnx(folder)


@pytest.mark.parametrize("defect", [HARDLY_KEPT, ONE_LATE], ids=["hardly kept", "one token late"])
def test_code_that_counts_otherwise(
    gated: Path, tmp_path: Path, defect: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(gated, tmp_path / "changed")
    drop_graph(folder)
    defect(folder)
    as_released(folder, monkeypatch)
    found = found_in(folder, gated, "parity")
    assert any(failure.startswith("parity: checkpoint") for failure in found), found


def zeroed(folder: Path, kind: str) -> None:
    """What a kind of node of every gate gives, times 0."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        if "sequence_gate" in node.name and node.op_type == kind:
            was, node.output[0] = node.output[0], f"{node.output[0]}/before"
            zero = onnx.helper.make_tensor("zero", onnx.TensorProto.FLOAT, [], np.zeros(1))
            nodes += [
                onnx.helper.make_node("Constant", [], [f"{was}/zero"], value=zero),
                onnx.helper.make_node("Mul", [f"{was}/before", f"{was}/zero"], [was]),
            ]
    assert len(nodes) > len(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    rewrite_file(folder, "model.onnx", model.SerializeToString())


def test_a_graph_that_forgets_what_fired(gated: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(gated, tmp_path / "changed")
    zeroed(folder, "ReduceSum")
    found = found_in(folder, gated, "integrity")
    assert any("the exporter does not write" in failure for failure in found), found
    found = found_in(folder, gated, "parity")
    assert any(failure.startswith("parity: onnx") for failure in found), found


def test_a_sound_one_passes(gated: Path) -> None:
    report = verify_folder(gated, Recipe.load(gated.with_suffix(".toml")))
    assert (report.verdict, report.scope) == ("pass", "full"), report.failures
    stated = json.loads((gated / "manifest.json").read_text())["clamps"][0]
    assert stated["method"] == "dynamic" and stated["parameters"]["tau"] == pytest.approx(0.3)
