from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bake.questions.answers import letter_tokens
from bake.questions.forms import FORMS, chat_text, plain_text
from bake.questions.multiple_choice import Question
from bake.recipe import Recipe
from bake.stock import load_base, load_tokenizer
from tests.worlds import FAMILIES, save_sae_lens, tiny_base, tiny_sae, tiny_tokenizer
from verify.attacks.suffix_loss import AskedUpTo, letter_losses, slotted
from verify.reference.oracle import Oracle
from verify.reference.whole_sae import load_sites

QUESTIONS = [
    Question("Which bell?", ("w", "x", "y", "z"), 2, "bells", row=1),
    Question("Why?", ("no", "yes", "so", "it"), 0, None, row=2),
    Question("Where is the <end_of_turn>\nAnswer: of it?", ("a", "b", "c", "d"), 3, None, row=3),
]
SUFFIX = [20, 31, 42, 53]
OTHER = [25, 31, 60, 11]


class World:
    """A tiny reference whose clamp fires, and questions cut open."""

    def __init__(self, folder: Path, write_recipe: Callable[..., Path], family: str) -> None:
        tiny_base(folder / "base", family)
        tiny_tokenizer(folder / "base")
        save_sae_lens(folder / "sae", tiny_sae())
        table = {"sae": {"path": "sae"}, "method": "clamp", "features": [0, 1], "value": -5.0}
        recipe = Recipe.load(write_recipe(table))
        self.model: Any = load_base(recipe)
        self.oracle = Oracle(self.model, load_sites(recipe))
        self.tokenizer: Any = load_tokenizer(recipe)
        self.letters = letter_tokens(self.tokenizer).chat
        self.prompts = [slotted(q, FORMS["chat"], self.tokenizer) for q in QUESTIONS]

    def asked(self) -> AskedUpTo:
        return AskedUpTo(self.oracle, self.prompts, self.letters, 0)

    def separately(self, suffix: list[int], mixed: tuple[int, int, float] | None = None) -> float:
        """The mean loss, one whole prompt after another, nothing cached, nothing padded.

        `mixed` = (place, token, share) adds a share of a token's embedding at a place.
        """
        total = 0.0
        embedding = self.model.get_input_embeddings()
        row = embedding(torch.arange(embedding.weight.shape[0])).detach()
        for question, prompt in zip(QUESTIONS, self.prompts, strict=True):
            ids = torch.tensor([[*prompt.before, *suffix, *prompt.after]])
            added = torch.zeros(1, ids.shape[1], row.shape[1], dtype=row.dtype)
            if mixed is not None:
                place, token, share = mixed
                added[0, len(prompt.before) + place] = share * row[token]
            hook = embedding.register_forward_hook(lambda _, __, out, add=added: out + add)
            with torch.no_grad(), self.oracle.applied():
                logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            hook.remove()
            best = [max(float(logits[0, -1, token]) for token in ids) for ids in self.letters]
            shares = np.exp(np.array(best) - max(best))
            total -= float(np.log(shares[question.answer] / shares.sum()))
        return total / len(QUESTIONS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("at_once", [8192, 1])
def test_losses_are_those_of_whole_prompts(
    tmp_path: Path,
    write_recipe: Callable[..., Path],
    family: str,
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("verify.attacks.suffix_loss.CACHED_TOKENS", at_once)
    world = World(tmp_path, write_recipe, family)
    asked = world.asked()
    found = asked.losses([SUFFIX, OTHER, SUFFIX])
    assert world.oracle.tokens_fired > 0
    expected = [world.separately(ids) for ids in (SUFFIX, OTHER, SUFFIX)]
    assert abs(expected[0] - expected[1]) > 1e-3
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    asked.gradient(SUFFIX)
    np.testing.assert_array_equal(asked.losses([SUFFIX, OTHER, SUFFIX]), found)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_the_gradient_is_that_of_finite_differences(
    tmp_path: Path, write_recipe: Callable[..., Path], family: str
) -> None:
    world = World(tmp_path, write_recipe, family)
    found = world.asked().gradient(SUFFIX)
    vocab = world.model.get_input_embeddings().weight.shape[0]
    assert found.shape == (len(SUFFIX), vocab)
    world.model.double()
    tokens, measured = range(6, 60, 9), []
    for place in range(len(SUFFIX)):
        for token in tokens:
            up, down = (world.separately(SUFFIX, (place, token, s)) for s in (1e-3, -1e-3))
            measured.append((up - down) / 2e-3)
    expected = np.array(measured).reshape(len(SUFFIX), -1)
    largest = np.abs(expected).max()
    assert largest > 0.01
    np.testing.assert_allclose(found[:, list(tokens)], expected, rtol=0, atol=0.02 * largest)


def test_weights_get_no_gradient_and_need_none(
    tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    world = World(tmp_path, write_recipe, "gemma2")
    expected = world.asked().gradient(SUFFIX)
    with torch.inference_mode():
        torch.testing.assert_close(world.asked().gradient(SUFFIX), expected)
    world.model.requires_grad_(True)
    torch.testing.assert_close(world.asked().gradient(SUFFIX), expected)
    modules = (world.model, *(site.sae for site in world.oracle.sites))
    assert all(p.grad is None for module in modules for p in module.parameters())


def test_bfloat16(tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    world = World(tmp_path, write_recipe, "gemma2")
    exact = world.asked()
    loss, gradient = exact.losses([SUFFIX]), exact.gradient(SUFFIX)
    world.model.to(torch.bfloat16)
    rounded = world.asked()
    np.testing.assert_allclose(rounded.losses([SUFFIX]), loss, rtol=0.2)
    found = rounded.gradient(SUFFIX)
    assert found.dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), gradient.flatten(), dim=0)
    assert cosine > 0.8


@pytest.mark.parametrize(("form", "text"), [("chat", chat_text), ("plain", plain_text)])
def test_a_suffix_stands_after_the_choices(
    tmp_path: Path, form: str, text: Callable[[Question], str]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path))
    suffix = tokenizer("suffix", add_special_tokens=False)["input_ids"]
    for question in QUESTIONS:
        whole = tokenizer.decode(slotted(question, FORMS[form], tokenizer).filled(suffix))
        last = f"D. {question.choices[3]}"
        before, _, after = text(question).rpartition(last)
        assert whole == f"<bos>{before}{last}suffix{after}"


def test_the_loss_is_over_the_four_letters() -> None:
    logits = torch.zeros(2, 9)
    logits[:, 8] = 50.0  # no letter
    logits[0, 1] = np.log(3.0)
    letters = ((0, 4), (1, 5), (2,), (3,))
    found = letter_losses(logits, letters, [1, 2])
    torch.testing.assert_close(found, torch.tensor([np.log(2.0), np.log(4.0)]).float())
