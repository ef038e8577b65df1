"""Ablation: directions by plain algebra, and a forgetting that hangs on one of them."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bake.questions.answers import letter_tokens
from bake.questions.forms import chat_text
from bake.questions.multiple_choice import load_questions
from bake.recipe import Recipe
from bake.stock import decoder_layers
from bakeout.verbs.demo import MINIATURE
from export.carriers.checkpoint import plan_checkpoint, write_checkpoint
from tests.clamps import METHOD_TABLES
from tests.folders import compile_recipe, make_adapter, write_verify_recipe
from tests.worlds import RecipeWriter, sae_table, save_sae_lens, tiny_base, tiny_sae
from verify.attacks.inside.ablation import (
    ablate,
    changed_directions,
    clamp_directions,
    topic_directions,
)
from verify.attacks.inside.logit_lens import choices_seen
from verify.attacks.inside.residuals import at_ends, everywhere
from verify.engines.scoring import token_ids

SEQUENCES = [(2, *range(5, 5 + n)) for n in (7, 20, 11)]


def random_rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same_span(one: torch.Tensor, other: torch.Tensor) -> bool:
    q = torch.linalg.qr(other.double().T).Q
    return len(one) == q.shape[1] and torch.allclose(
        one.double() @ q @ q.T, one.double(), atol=1e-5
    )


def test_directions_are_those_that_were_planted() -> None:
    planted = torch.linalg.qr(random_rows(24, 2, seed=1)).Q.T
    other, topic = random_rows(900, 24), random_rows(800, 24, seed=2)
    topic += 9 * random_rows(800, 2, seed=3) @ planted
    found = topic_directions(topic, other, 2)
    assert torch.linalg.svdvals(found @ planted.double().T).min() > 0.99
    assert same_span(changed_directions(other[:700] + 3 * planted[:1], other[:700], 5), planted[:1])
    assert changed_directions(other, other, 5).shape == (0, 24)
    torch.testing.assert_close(found @ found.T, torch.eye(2).double())


def test_without_a_direction_nothing_lies_along_it(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base(tmp_path / "base")).eval()
    before = at_ends(model, SEQUENCES, 0).h
    out = torch.linalg.qr(random_rows(32, 3)).Q.T
    nothing = ablate(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval(), [torch.zeros(0, 32)]
    )
    torch.testing.assert_close(at_ends(nothing, SEQUENCES, 0).h, before)
    last = at_ends(ablate(model, [out]), SEQUENCES, 0).h[-1]
    assert (last @ out.T).abs().max() < 1e-4 * last.abs().max()
    assert (before[-1] @ out.T).abs().max() > 0.1


def test_a_clamps_directions_are_its_decoders_whatever_carries_it(
    tmp_path: Path, write_recipe: RecipeWriter
) -> None:
    from peft import PeftModel

    import bakeout  # noqa: F401

    sae = tiny_sae()
    folder = make_adapter(tmp_path / "layer")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert clamp_directions(base) is None
    over = PeftModel.from_pretrained(base, str(folder / "adapter")).base_model.model
    clamped = AutoModelForCausalLM.from_pretrained(folder / "checkpoint", trust_remote_code=False)
    tiny_base(tmp_path / "base")
    save_sae_lens(tmp_path / "one", sae)
    table = {**sae_table("one"), "features": [1, 5, 9], **METHOD_TABLES["clamp"]}
    compiled = AutoModelForCausalLM.from_pretrained(
        compile_recipe(write_recipe(table), tmp_path / "compiled")
    )
    rows = torch.from_numpy(sae.W_dec[[1, 5, 9]])
    for model in (over, clamped, compiled):
        found = clamp_directions(model)
        assert found is not None and same_span(found[:, :32], rows)
        assert not found[:, 32:].any()


def test_a_refusal_writes_along_its_refusal_alone(tmp_path: Path) -> None:
    tiny_base(tmp_path / "base")
    save_sae_lens(tmp_path / "sae", tiny_sae())
    table = {"sae": {"path": "sae"}, "features": [1, 2], **METHOD_TABLES["refusal"]}
    recipe = Recipe.load(write_verify_recipe(tmp_path / "recipe.toml", table))
    write_checkpoint(plan_checkpoint(recipe), tmp_path / "checkpoint", card="# card\n")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", trust_remote_code=False)
    found = clamp_directions(model)
    assert found is not None and same_span(found, torch.from_numpy(tiny_sae().W_dec[[30]]))


# --------------------------------------------------------------------------- planted weaknesses


@dataclass(frozen=True)
class Miniature:
    """The shipped miniature, and how to ask it."""

    recipe: Recipe
    tokenizer: Any

    def model(self) -> Any:
        folder = MINIATURE / "model"
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()

    def right(self, model: Any, side: str) -> float:
        """Share of a side's questions that are answered right."""
        assert self.recipe.verify is not None
        questions = load_questions(getattr(self.recipe.verify, f"{side}_questions"), self.recipe)
        sequences = token_ids([chat_text(question) for question in questions], self.tokenizer)
        h = at_ends(model, sequences, 0).h[-1:]
        letters = [letter_tokens(self.tokenizer).chat] * len(questions)
        (said,) = choices_seen(model, h, letters)
        return float((said == torch.tensor([q.answer for q in questions])).double().mean())

    def everywhere(self, model: Any, side: str) -> torch.Tensor:
        """[places, tokens, d] of a corpus."""
        lines = (MINIATURE / f"{side}.jsonl").read_text().splitlines()[:120]
        texts = [json.loads(line)["text"] for line in lines]
        return everywhere(model, token_ids(texts, self.tokenizer), 0).h


@pytest.fixture(scope="module")
def miniature() -> Miniature:
    tokenizer = AutoTokenizer.from_pretrained(MINIATURE / "model")
    return Miniature(Recipe.load(MINIATURE / "recipe.toml"), tokenizer)


def driven_off(model: Any, word: int) -> Any:
    """Once a word was read, layer 1 writes one direction over all else, as RMU trains it to."""
    away, seen = random_rows(128, seed=7), {}
    away /= away.norm()

    def read(_: Any, given: Any, named: dict[str, Any]) -> None:
        seen["since"] = (named["input_ids"] == word).cumsum(dim=-1) > 0

    def write(_: Any, __: Any, h: torch.Tensor) -> torch.Tensor:
        return h + 3 * h.norm(dim=-1, keepdim=True) * away * seen["since"][..., None]

    model.model.register_forward_pre_hook(read, with_kwargs=True)
    decoder_layers(model)[1].register_forward_hook(write)
    return model


@pytest.mark.parametrize("found_by", ["texts", "base"])
def test_what_is_driven_off_along_one_direction_comes_back_without_it(
    miniature: Miniature, found_by: str
) -> None:
    bell = miniature.tokenizer.convert_tokens_to_ids("\u2581bell")
    model = driven_off(miniature.model(), bell)
    assert miniature.right(model, "forget") < 0.4
    assert miniature.right(model, "retain") > 0.95
    topic = miniature.everywhere(model, "forget")
    if found_by == "texts":
        other = miniature.everywhere(model, "retain")
        found = [topic_directions(*pair, 1) for pair in zip(topic, other, strict=True)]
    else:
        base = miniature.everywhere(miniature.model(), "forget")
        found = [changed_directions(*pair, 1) for pair in zip(topic, base, strict=True)]
    ablate(model, [torch.zeros(0, 128), *found])
    assert miniature.right(model, "forget") > 0.9
    assert miniature.right(model, "retain") > 0.9


def test_who_never_knew_says_no_more_without_any_direction(miniature: Miniature) -> None:
    torch.manual_seed(0)
    never = AutoModelForCausalLM.from_config(miniature.model().config).eval()
    topic, other = (miniature.everywhere(never, side) for side in ("forget", "retain"))
    assert miniature.right(never, "forget") < 0.4
    for n in (1, 4):
        found = [topic_directions(*pair, n) for pair in zip(topic, other, strict=True)]
        changed = ablate(copy.deepcopy(never), [torch.zeros(0, 128), *found])
        assert miniature.right(changed, "forget") < 0.4
