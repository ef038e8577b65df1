"""The lens: the model's own words behind the last layer, and what an earlier one still says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from bake.questions.answers import letter_tokens
from bake.questions.forms import chat_text
from bake.questions.multiple_choice import load_questions
from bake.recipe import Recipe
from bake.stock import decoder_layers, load_model
from bakeout.verbs.demo import MINIATURE
from tests.logits import flat_logits
from tests.worlds import FAMILIES, tiny_base
from verify.attacks.inside.logit_lens import choices_seen, tokens_seen
from verify.attacks.inside.probe import probe
from verify.attacks.inside.residuals import at_ends
from verify.engines.scoring import token_ids

SEQUENCES = [(2, *range(5, 5 + n)) for n in (7, 3, 20)]


@pytest.mark.parametrize("family", FAMILIES)
def test_behind_the_last_layer_it_is_what_the_model_says(tmp_path: Any, family: str) -> None:
    folder = tiny_base(tmp_path / "base", family)
    where = {"pretrained_model_name_or_path": str(folder), "local_files_only": True}
    auto = AutoModelForImageTextToText if family == "gemma3" else AutoModelForCausalLM
    model = load_model(auto, where)
    found = tokens_seen(model, at_ends(model, SEQUENCES, 0).h)
    said = [flat_logits(model, torch.tensor([ids]))[-1].argmax() for ids in SEQUENCES]
    assert found.shape == (4, 3)
    assert found[-1].tolist() == [int(token) for token in said]
    letters = [[10], [11], [12], [13]]
    seen = choices_seen(model, at_ends(model, SEQUENCES, 0).h, [letters] * 3)
    logits = torch.stack([flat_logits(model, torch.tensor([ids]))[-1, 10:14] for ids in SEQUENCES])
    assert torch.equal(seen[-1], logits.argmax(dim=-1))


def overwritten(model: Any) -> Any:
    """The last layer writes noise over what stood there. Changes `model`."""
    weight = decoder_layers(model)[-1].mlp.down_proj.weight
    draw = torch.Generator().manual_seed(0)
    weight.data = torch.randn(weight.shape, generator=draw)
    decoder_layers(model)[-1].post_feedforward_layernorm.weight.data += 30
    return model


def test_what_only_the_last_layer_hides_is_seen_and_what_was_never_known_is_not() -> None:
    """By the lens, and by a probe that was trained on other facts."""
    recipe = Recipe.load(MINIATURE / "recipe.toml")
    tokenizer = AutoTokenizer.from_pretrained(MINIATURE / "model")
    letters = letter_tokens(tokenizer).chat
    assert recipe.verify is not None
    questions = load_questions(recipe.verify.forget_questions, recipe)
    right = torch.tensor([question.answer for question in questions])
    sequences = token_ids([chat_text(question) for question in questions], tokenizer)
    base = AutoModelForCausalLM.from_pretrained(MINIATURE / "model", attn_implementation="eager")
    torch.manual_seed(0)
    never = AutoModelForCausalLM.from_config(base.config)

    def shares(model: Any) -> tuple[float, float, float]:
        h = at_ends(model.eval(), sequences, 0).h
        seen = (choices_seen(model, h, [letters] * len(right)) == right).double().mean(dim=1)
        known, asked = slice(0, 80), slice(80, 120)
        found = probe(h[:, known], right[known], h[:, asked])
        probed = (found.chosen == right[asked]).double().mean()
        return float(seen[-1]), float(seen.max()), float(probed)

    said, seen, probed = shares(overwritten(base))
    assert said < 0.5
    assert seen > 0.9 and probed > 0.8
    said, seen, probed = shares(never)
    assert max(said, seen, probed) < 0.45
