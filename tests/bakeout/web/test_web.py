"""`bakeout web`: what it serves, to whom, and what its graphs add to the folder's."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bakeout.cli import run
from bakeout.verbs.web.loopback import Loopback
from bakeout.verbs.web.served_graphs import FIRED, base_graph, clamped_graph
from bakeout.verbs.web.web_verb import PACKAGES, WebError, open_served, open_site, site_of
from tests.reports import error_line
from tests.worlds import talkative, tiny_tokenizer
from verify.engines.onnx_files import open_graph
from verify.engines.onnx_head import ROWS
from verify.engines.onnx_runner import without_clamp


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`baked` with a shared and an int4 graph, its `base`, and `node_modules` of empty files."""
    root = tmp_path_factory.mktemp("web")
    recipe = talkative(root)
    tiny_tokenizer(root / "base")
    baked = str(root / "baked")
    assert run(["bake", str(recipe), "--out", baked]) == 0
    for precision in ("shared", "int4"):
        assert run(["export", "onnx", baked, "--precision", precision]) == 0
    for package, (entry, _) in PACKAGES.items():
        (root / "node_modules" / package / entry).parent.mkdir(parents=True)
        (root / "node_modules" / package / entry).write_text(f"// {package}\n")
    (root / "node_modules" / "onnxruntime-web" / "dist" / "ort-wasm-simd-threaded.wasm").touch()
    return root


@pytest.fixture(scope="module")
def site(root: Path) -> Iterator[Loopback]:
    modules = root / "node_modules"
    with open_site(root / "baked", precision="shared", modules=modules, beside=True) as site:
        serving = threading.Thread(target=site.serve_forever)
        serving.start()
        yield site
        site.shutdown()
        serving.join()


def get(site: Loopback, path: str, host: str | None = None, method: str = "GET") -> Any:
    """(status, headers, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", site.server_port, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or f"127.0.0.1:{site.server_port}")
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def test_it_serves_what_the_page_needs_and_nothing_else(site: Loopback, root: Path) -> None:
    status, headers, body = get(site, "/")
    assert status == 200 and headers["Content-Type"].startswith("text/html")
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    for linked in ("/page.js", "/page.css"):
        assert linked.encode() in body and get(site, linked)[0] == 200
    facts = json.loads(get(site, "/facts.json")[2])
    assert [model["name"] for model in facts["models"]] == ["base", "clamped"]
    assert facts["before"] == facts["after"] == "" and facts["bos"] == 2
    for model in facts["models"]:
        assert get(site, model["graph"])[0] == 200
    for data in facts["data"]:
        assert get(site, data["url"])[2] == (root / "baked" / data["path"]).read_bytes()
    assert get(site, "/modules/onnxruntime-web.mjs")[2] == b"// onnxruntime-web\n"
    assert (
        get(site, "/modules/ort-wasm-simd-threaded.wasm")[1]["Content-Type"] == "application/wasm"
    )
    for path in ("/folder/config.json", "/folder/../recipe.toml", "/..%2f..%2fetc/passwd", "/data"):
        assert get(site, path)[0] == 404
    assert get(site, "/", method="HEAD")[2] == b""
    assert get(site, "/", method="POST")[0] == 501


def test_it_listens_on_this_machine_and_answers_to_its_name_only(site: Loopback) -> None:
    assert site.server_address[0] == "127.0.0.1"
    assert get(site, "/", host=f"localhost:{site.server_port}")[0] == 200
    for host in ("example.org", f"example.org:{site.server_port}", "127.0.0.1"):
        assert get(site, "/facts.json", host=host)[0] == 403


def said_by(model: Any, folder: Path, ids: list[int]) -> dict[str, Any]:
    """A served graph's outputs for a prompt, logits at its last token."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "position_ids": np.arange(len(ids))[None],
        ROWS: np.array([len(ids) - 1]),
    }
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feed[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def test_its_graphs_are_the_folder_and_the_base(root: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = root / "baked"
    graph = open_graph("onnx", folder / "model.onnx").model
    before = graph.SerializeToString(deterministic=True)
    ids = [2, 30, 40, 50, 2, 60, 61]
    found = {
        "baked": said_by(clamped_graph(graph), folder, ids),
        "base": said_by(base_graph(graph), folder, ids),
    }
    assert graph.SerializeToString(deterministic=True) == before
    models = {name: AutoModelForCausalLM.from_pretrained(root / name) for name in found}
    for name, model in models.items():
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, -1].numpy()
        assert np.abs(found[name]["logits"].reshape(-1) - expected).max() < 1e-4, name
    assert FIRED not in found["base"]
    # Where the clamp moved what its layer gives: not at BOS, wherever that stands.
    streams = []
    for model in models.values():
        layer = model.model.layers[1]
        layer.register_forward_hook(lambda _, __, out: streams.append(out))
        with torch.no_grad():
            model(torch.tensor([ids]))
    clamped, base = (out[0] if isinstance(out, tuple) else out for out in streams)
    moved = ((clamped - base).abs().amax(dim=-1) > 1e-4)[0]
    assert moved.any() and not moved[0] and not moved[4]
    assert (found["baked"][FIRED][0] > 0).tolist() == moved.tolist()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--precision", "int8"], "--precision int8"),
        (["--precision", "int5"], "int5"),
        (["--node-modules", "nowhere"], "npm install onnxruntime-web"),
    ],
)
def test_what_is_missing_is_said(
    root: Path, change: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--node-modules", str(root / "node_modules"), *change]
    assert run(["web", str(root / "baked"), "--port", "0", *options]) == 2
    assert said in error_line(capsys)


def test_a_compiled_clamp_cannot_be_taken_out(root: Path) -> None:
    folder = root / "baked"
    served = open_served(folder, "shared")
    compiled = replace(served.graph, model=without_clamp(served.graph.model))
    served, modules = replace(served, graph=compiled), root / "node_modules"
    found = clamped_graph(compiled.model)
    assert FIRED not in {value.name for value in found.graph.output}
    assert "/graphs/clamped.onnx" in site_of(folder, served, modules, beside=False)
    with pytest.raises(WebError, match="no SAEClamp to take out"):
        site_of(folder, served, modules, beside=True)


def test_a_port_that_is_taken(
    site: Loopback, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--node-modules", str(root / "node_modules"), "--port", str(site.server_port)]
    assert run(["web", str(root / "baked"), *options]) == 2
    assert f"--port {site.server_port}" in error_line(capsys)


def test_a_changed_file_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    folder = tmp_path / "changed"
    shutil.copytree(root / "baked", folder)
    (folder / "tokenizer.json").write_text("{}")
    options = ["--node-modules", str(root / "node_modules"), "--port", "0"]
    assert run(["web", str(folder), *options]) == 2
    assert "tokenizer.json" in error_line(capsys)
