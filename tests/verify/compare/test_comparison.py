"""How engines are shown the same batches: the reference first, the others what it chose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bake.errors import FolderError
from bake.stock import load_base
from export.carriers.checkpoint import plan_checkpoint, write_checkpoint
from tests.clamps import recipe_on_layers
from tests.engines import InProcess, compared_with, material_of
from tests.worlds import tiny_base, tiny_tokenizer
from verify.compare import comparing, comparison
from verify.compare.chosen import choose
from verify.compare.comparing import FEWEST_DECODED
from verify.compare.comparison import Comparison
from verify.engines.runners import HookedRunner
from verify.reference.oracle import Oracle
from verify.reference.whole_sae import load_sites
from verify.tolerances import parity_failures


class Watched(InProcess):
    """The folder's engine, and what it is asked."""

    broken = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "checkpoint")
        self.load("float32")
        self.asked: list[tuple[Any, ...]] = []
        self.decoded_tokens = 0

    def read(self, *asked: Any) -> Any:
        if self.broken:
            raise FolderError("it ended")
        self.asked.append(asked)
        return super().read(*asked)

    def decoded(self, ids: torch.Tensor, mask: torch.Tensor, n_last: int) -> torch.Tensor:
        self.decoded_tokens += int(mask[:, -n_last:].sum())
        return super().decoded(ids, mask, n_last)


class World:
    """A base and a checkpoint of a clamp on two layers."""

    def __init__(self, folder: Path, write_recipe: Callable[..., Path]) -> None:
        base = tiny_tokenizer(tiny_base(folder / "gemma2", "gemma2"))
        self.recipe = recipe_on_layers(write_recipe, folder, base, [0, 2], "clamp")
        write_checkpoint(plan_checkpoint(self.recipe), folder / "out", card="# card\n")
        self.engine = Watched(folder / "out")

    def oracle(self) -> Oracle:
        return Oracle(load_base(self.recipe), load_sites(self.recipe))

    def compared(self, parity: bool = True) -> Comparison:
        oracle = self.oracle()
        here = [
            HookedRunner("base", oracle.model),
            HookedRunner("reference", oracle.model, oracle),
        ]
        return compared_with(oracle, here, self.recipe, parity, [self.engine])


@pytest.fixture
def world(tmp_path: Path, write_recipe: Callable[..., Path]) -> World:
    return World(tmp_path, write_recipe)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_an_engine_is_asked_for_what_the_reference_chose(
    world: World, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "share_compared", lambda *_: share)
    found = world.compared()
    oracle = world.oracle()
    reference = HookedRunner("reference", oracle.model, oracle)
    batches = list(found.material.batches(found.prompts))
    assert len(world.engine.asked) == len(batches) > 1
    for batch, (ids, mask, wanted, scored) in zip(batches, world.engine.asked, strict=True):
        reference.logits(ids, mask)
        assert oracle.last_fired is not None
        assert torch.equal(ids, batch.input_ids) and torch.equal(mask, batch.attention_mask)
        assert torch.equal(wanted, choose(batch, oracle.last_fired, share))
        assert torch.equal(scored, batch.scored)
        assert bool((wanted == batch.wanted).all()) is (share == 1)
    parity = found.parity_of("checkpoint")
    assert list(parity_failures("checkpoint", parity, 12)) == []
    asked = sum(int(wanted.sum()) for *_, wanted, _ in world.engine.asked)
    assert parity.tokens_compared == asked + world.engine.decoded_tokens
    assert found.parity_of("base").tokens_compared == asked
    everything = sum(int(batch.wanted.sum()) for batch in batches)
    of_tokens = {"checkpoint": everything + world.engine.decoded_tokens, "base": everything}
    for name, expected in of_tokens.items():  # the base is compared with nothing that is decoded
        assert found.parity_of(name).of_tokens == (None if share == 1 else expected)
    # Its clamps fired on the same tokens as they do when all of it is read by itself.
    read = sum(found.fired.values())
    assert read > oracle.tokens_fired > 0  # what was decoded comes on top


def test_few_tokens_are_decoded_where_a_vocabulary_is_large(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = world.compared().parity_of("checkpoint")
    n_prompts = 2 * 3  # forget questions, in both forms
    assert world.engine.decoded_tokens == n_prompts * comparing.DECODED_TOKENS
    vocab_size = len(material_of(world.recipe).tokenizer)
    for logits, n_last in ((1, FEWEST_DECODED), (30 * n_prompts * vocab_size, 30)):
        monkeypatch.setattr(comparing, "DECODED_LOGITS", logits)
        world.engine.decoded_tokens = 0
        found = world.compared().parity_of("checkpoint")
        assert world.engine.decoded_tokens == n_prompts * n_last
        apart = n_prompts * (comparing.DECODED_TOKENS - n_last)
        assert found.tokens_compared == whole.tokens_compared - apart
        assert list(parity_failures("checkpoint", found, 12)) == []


def test_without_parity_nothing_is_decoded_and_ends_are_asked_for(world: World) -> None:
    found = world.compared(parity=False)
    assert world.engine.decoded_tokens == 0 and found.parities == {}
    for ids, _, wanted, scored in world.engine.asked:
        assert int(wanted.sum()) == len(ids) and wanted[:, -1].all()
        assert not scored[:, -1].any()
    given = found.answers
    assert given["checkpoint"].given == given["reference"].given != given["base"].given
    losses = {name: of.losses for name, of in found.losses.items()}
    assert losses["checkpoint"] == pytest.approx(losses["reference"], abs=1e-5)
    assert len(losses["base"]) == sum(len(prompt.ids) - 1 for prompt in found.material.windows)


def test_an_engine_that_ends_meanwhile_ends_the_comparison(world: World) -> None:
    world.engine.broken = True
    with pytest.raises(FolderError, match="it ended"):
        world.compared()
