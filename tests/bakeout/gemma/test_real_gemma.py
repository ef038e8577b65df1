"""What `make gemma` left in `runs/gemma`, token by token; skipped where it was not run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest
import torch

from bake.questions.open_prompts import load_prompts
from bake.recipe import Recipe
from bake.stock import load_base, load_tokenizer
from export.manifest import Manifest
from verify.engines.engines import open_engines
from verify.engines.onnx_files import find_graphs
from verify.engines.runners import HookedRunner
from verify.reference.oracle import Oracle
from verify.reference.whole_sae import load_sites

RUN = Path(__file__).parents[3] / "runs" / "gemma"
ASKED, NEW = 12, 64
"""Of how many prompts, and how many tokens of each."""
TIE = 1e-3
"""Two sound engines may part where the first two tokens' logits are no further apart."""

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not all((RUN / name / "manifest.json").is_file() for name in ("checkpoint", "adapter")),
        reason="runs/gemma is not there; `make gemma` writes it",
    ),
]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    chosen = Recipe.load(RUN / "checkpoint" / "recipe.toml")  # with the numbers that were selected
    return Recipe.load(RUN / "recipe.toml").with_clamps(chosen.clamp)


@pytest.fixture(scope="module")
def prompts(recipe: Recipe) -> list[list[int]]:
    """Half of them on the topic."""
    assert recipe.verify is not None and recipe.verify.completions is not None
    named, tokenizer = recipe.verify.completions, load_tokenizer(recipe)
    assert named.generic is not None
    rows = [
        prompt.prompt
        for source, answered in ((named.prompts, True), (named.generic, False))
        for prompt in load_prompts(source, recipe, answered=answered)[: ASKED // 2]
    ]
    return [list(tokenizer(row)["input_ids"]) for row in rows]


@pytest.fixture(scope="module")
def reference(recipe: Recipe) -> HookedRunner:
    model = load_base(recipe)
    return HookedRunner("reference", model, Oracle(model, load_sites(recipe)))


def go_on(runner: Any, ids: list[int]) -> list[int]:
    batch = torch.tensor([ids])
    said = runner.go_on(batch, torch.ones_like(batch), (1,), NEW)[0].tolist()
    return [token for token in said if token not in (-1, 1)]


@pytest.fixture(scope="module")
def expected(reference: HookedRunner, prompts: list[list[int]]) -> list[list[int]]:
    return [go_on(reference, ids) for ids in prompts]


def by_genai(folder: Path, ids: list[int]) -> list[int]:
    model = og.Model(str(folder))
    asked = og.GeneratorParams(model)
    asked.set_search_options(max_length=len(ids) + NEW, batch_size=1, do_sample=False)
    generator = og.Generator(model, asked)
    generator.append_tokens(np.array([ids], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(ids) :]


def engines(recipe: Recipe, carrier: str) -> Iterator[Any]:
    folder = RUN / carrier
    graphs = [] if carrier == "adapter" else find_graphs(folder)
    with open_engines(folder, Manifest.read(folder).carrier, graphs, "cpu") as opened:
        assert opened.torch is not None
        opened.load_torch(recipe, "float32", opened.threads)
        yield opened.torch
        for graph in [graph for graph in graphs if graph.name == "onnx"]:
            with opened.open(graph) as runner:
                yield runner


def check(
    said: list[list[int]],
    expected: list[list[int]],
    prompts: list[list[int]],
    reference: HookedRunner,
) -> None:
    """The same tokens, but after a tie."""
    assert max(len(row) for row in expected) >= NEW // 2
    for ids, ours, theirs in zip(prompts, expected, said, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if same is None:
            assert abs(len(ours) - len(theirs)) <= 1  # the token that ends may be left out
            continue
        batch = torch.tensor([[*ids, *ours[:same]]])
        first, second = reference.logits(batch, torch.ones_like(batch))[0].topk(2).values.tolist()
        assert first - second < TIE, (same, ours, theirs)


@pytest.mark.parametrize("carrier", ["checkpoint", "compiled", "adapter"])
def test_every_carrier_goes_on_as_the_hook_does(
    carrier: str,
    recipe: Recipe,
    prompts: list[list[int]],
    expected: list[list[int]],
    reference: HookedRunner,
) -> None:
    for runner in engines(recipe, carrier):
        check([go_on(runner, ids) for ids in prompts], expected, prompts, reference)


def test_genai_goes_on_as_the_hook_does_and_reads_the_tokenizer(
    recipe: Recipe,
    prompts: list[list[int]],
    expected: list[list[int]],
    reference: HookedRunner,
) -> None:
    folder = RUN / "checkpoint"
    said = [by_genai(folder, ids) for ids in prompts]
    check(said, expected, prompts, reference)
    tokenizer, theirs = load_tokenizer(recipe), og.Tokenizer(og.Model(str(folder)))
    for ids in prompts:
        text = tokenizer.decode(ids[1:])
        assert theirs.encode(f"<bos>{text}").tolist() == ids  # it never adds BOS by itself
        assert theirs.decode(ids[1:]) == text
