"""The client matrix on the miniature: no client silently runs the base, and the page says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bake.recipe import Recipe
from bake.rounding import BASE_LIKE, LOUD, REFUSES, ROUNDS, SAME
from tests.clients.cells import NOT_RUN, Cell
from tests.clients.client_table import clients
from tests.clients.client_world import ClientWorld, build
from tests.clients.clients_page import PAGE, cells_of, merged, page, read
from tests.clients.matrix import ask, version_of
from tests.clients.other_clients.llama_cpp_client import QUANTIZED
from tests.folders import baked_world

WORDS = {SAME, ROUNDS, LOUD, REFUSES, NOT_RUN}
DEFAULT = (
    "llama.cpp",
    "transformers",
    "lm-eval",
    "peft, bakeout imported",
    "peft",
    "ONNX Runtime (Python)",
    "onnxruntime-genai",
)
"""Installed by the extras that `make setup` takes."""
BF16_BAR = 3.0
"""How many times the bfloat16 hook's own distance a compiled folder in bfloat16 may have."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> ClientWorld:
    """With a few graphs and files of each kind only."""
    out = tmp_path_factory.mktemp("clients")
    return build(out, precisions=("shared", "int4"), outtypes=("q8_0",))


def measured() -> dict[tuple[str, str, str], Cell]:
    """What the page says of the miniature."""
    (mini,) = [of for of in read() if of["world"] == "the miniature"]
    return {cell.key: cell for cell in cells_of(mini)}


def tried(world: ClientWorld, *names: str) -> list[Cell]:
    """Clients' cells; none of them may be the base, or another than the page has for it."""
    cells, known = list(ask(world, names, slowly=False, together=True)), measured()
    for cell in cells:
        assert cell.word in WORDS, cell
        old = known[cell.key]
        words = {cell.word, old.word}
        if NOT_RUN not in words and cell.versions == old.versions:
            # Between these two lies a bar, and machines round otherwise.
            assert len(words) == 1 or words == {SAME, ROUNDS}, (cell, old)
    return cells


@pytest.mark.long
def test_what_the_default_extras_install(world: ClientWorld) -> None:
    cells = {cell.key: cell for cell in tried(world, *DEFAULT)}
    unwritten = [cell.dtype for cell in cells.values() if cell.word == NOT_RUN]
    assert set(unwritten) == {"fp16", "int8", "f32", "bf16", "f16", *QUANTIZED}
    own = world.hook_in("bfloat16")["kl_to_hook"]
    for client in ("transformers", "lm-eval"):
        for carrier in ("layer", "compiled", "compiled bfloat16"):
            exact, rounded = (cells[client, carrier, of] for of in ("float32", "bfloat16"))
            if carrier != "compiled bfloat16":  # whose weights are rounded as they are stored
                assert exact.word == SAME, exact
            assert rounded.word == ROUNDS and rounded.kl_to_hook is not None
            assert rounded.kl_to_hook <= BF16_BAR * own, (rounded, own)
            # Everything but the clamp is stock, and its clamp has no number for float16.
            narrow = cells[client, carrier, "float16"].word
            assert narrow in ((SAME, ROUNDS) if carrier == "layer" else (LOUD,))
    assert cells["peft, bakeout imported", "adapter", "float32"].word == SAME
    unknown = cells["peft", "adapter", "float32"]
    assert unknown.word == REFUSES and "…" not in unknown.why
    assert cells["ONNX Runtime (Python)", "onnx", "float32"].word == SAME
    assert cells["onnxruntime-genai", "onnx", "float32"].word == SAME
    assert cells["ONNX Runtime (Python)", "onnx", "int4"].word == ROUNDS
    assert cells["llama.cpp", "gguf", "q8_0"].word == ROUNDS


@pytest.mark.parametrize("name", [name for name in clients() if name not in DEFAULT])
def test_what_else_is_installed(name: str, request: pytest.FixtureRequest) -> None:
    client, _, _ = clients()[name]
    if client.say is None:
        pytest.skip(f"{name}: {client.why}")
    if missing := [package for package in client.packages if version_of(package) is None]:
        pytest.skip(f"{name}: not installed: {' '.join(missing)}")
    cells = tried(request.getfixturevalue("world"), name)
    if all(cell.word == NOT_RUN for cell in cells):
        pytest.skip(f"{name}: {cells[0].why}")


def test_the_base_the_hook_and_noise_are_told_apart(tmp_path: Path) -> None:
    tiny = baked_world(tmp_path, [1, 5, 9])
    world = ClientWorld("tiny", {}, Recipe.load(tiny / "recipe.toml"))

    def judged(said: list[Any]) -> str:
        word: str = world.judged(said, [None] * len(said))["word"]
        return word

    asked = list(zip(world.prompts, world.places, strict=True))
    hook = [world.hook(ids)[at].numpy() for ids, at in asked]
    base = [world.base(ids)[at].numpy() for ids, at in asked]
    assert judged(hook) == SAME and judged(base) == BASE_LIKE
    assert judged([0.9 * one + 0.1 * two for one, two in zip(base, hook, strict=True)]) == BASE_LIKE
    assert (
        judged([one + 0.01 * np.sin(np.arange(one.size)).reshape(one.shape) for one in hook])
        == ROUNDS
    )
    assert judged([np.full_like(one, np.nan) for one in hook]) == LOUD
    # What the base goes on to say by itself is the base, wherever that leads.
    own = [[*ids, int(world.base(ids)[-1].argmax())] for ids in world.prompts]
    ends = [world.base(ids)[-1:].numpy() for ids in world.prompts]
    assert world.judged(ends, own)["word"] == BASE_LIKE


def test_the_page_is_what_was_measured() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(read())
    cells = [cell for of in read() for cell in cells_of(of)]
    assert {cell.word for cell in cells} <= WORDS
    assert {cell.client for cell in cells} == set(clients())
    assert all(cell.why for cell in cells if cell.word in (REFUSES, NOT_RUN))


def test_what_is_not_installed_keeps_what_was_measured() -> None:
    old = Cell("a", "layer", "float32", SAME, 1e-9, 1.0, 1.0, versions="a 1")
    worlds = merged([], "w", {}, [old, Cell("b", "layer", "float32", SAME, 1e-9, 1.0, 1.0)])
    worlds = merged(worlds, "w", {}, [Cell("a", "layer", "float32", NOT_RUN, why="no a")])
    assert cells_of(worlds[0])[0] == old
    worlds = merged(worlds, "w", {}, [Cell("a", "layer", "float32", ROUNDS, 1e-3, 1.0, 1.0)])
    assert [cell.word for cell in cells_of(worlds[0])] == [ROUNDS, SAME]
    assert "| **b** | layer | float32 | exact | 1.0e-09 | 1.0e+00 |" in page(worlds)
