"""Attribution against finite differences of the model itself, and against a plain loop."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE
from transformers import AutoModelForCausalLM

from bake.questions.prompts import Choice, Prompt, left_padded
from bake.recipe import Recipe
from bake.sae.folding import load_decoder, load_encoder
from bake.sae.layouts import find_sae
from bake.search.attribution import (
    attribution,
    candidates,
    letter_margin,
    residual_gradient,
    text_margin,
)
from bake.search.statistics import FeatureSite
from tests.worlds import FAMILIES, save_sae_lens, tiny_base, tiny_sae

LETTERS = ((10, 11), (12,), (13, 14), (15,))
IDS = torch.tensor([2, 5, 7, 9, 21, 30])


def margin_by_hand(logits: Any, answer: int) -> float:
    best = [max(float(logits[i]) for i in ids) for ids in LETTERS]
    wrong = [b for i, b in enumerate(best) if i != answer]
    return best[answer] - sum(wrong) / 3


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_the_slope_of_the_margin(tmp_path: Path, family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base(tmp_path / "base", family)).double()
    model.requires_grad_(False)
    asked = left_padded(
        [Prompt("forget", "chat", 1, tuple(IDS.tolist()), every_token=False)],
        pad_id=0,
        last_only=True,
    )
    h, gradient = residual_gradient(
        model, 1, asked, lambda logits: letter_margin(logits[0, -1], LETTERS, 2)
    )
    direction = torch.randn(h.shape, generator=torch.Generator().manual_seed(0)).double()

    def margin(step: float) -> float:
        def shift(_: Any, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (output[0] + step * direction, *output[1:])
            return output + step * direction

        handle = model.get_decoder().layers[1].register_forward_hook(shift)
        with torch.no_grad():
            logits = model(input_ids=IDS[None]).logits[0, -1]
        handle.remove()
        return margin_by_hand(logits, 2)

    slope = (margin(3e-3) - margin(-3e-3)) / 6e-3  # norms round to float32
    assert slope == pytest.approx(float((gradient.double() * direction).sum()), rel=1e-2)
    logits = torch.randn(40)
    assert float(letter_margin(logits, LETTERS, 1)) == pytest.approx(margin_by_hand(logits, 1))


def test_attribution_is_activation_times_decoder_times_gradient(tmp_path: Path) -> None:
    folder = save_sae_lens(tmp_path / "sae", tiny_sae())
    clamp = {"sae": {"path": "sae"}, "method": "zero", "features": [0]}
    data = {"schema": 1, "base": {"model": "base"}, "clamp": [clamp]}
    files = find_sae(
        Recipe.parse(data, name="t", folder=tmp_path).clamp[0].sae,
        Recipe.parse(data, name="t", folder=tmp_path),
    )
    h, gradient = torch.randn(5, 32), torch.randn(5, 32)
    W_dec = torch.from_numpy(load_decoder(files))
    found = attribution(h, gradient, FeatureSite(1, load_encoder(files)), W_dec)
    sae = SAE.load_from_disk(folder)
    with torch.no_grad():
        acts = sae.encode(h)
        expected = [
            sum(float(acts[t, f] * (sae.W_dec[f] @ gradient[t])) for t in range(5))
            for f in range(64)
        ]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.count_nonzero(found) > 10


def test_candidates_are_proposed_by_any_question_and_ordered_by_the_sum() -> None:
    first = np.zeros(50)
    first[[3, 4]] = 5.0, 1.0
    second = np.zeros(50)
    second[[4, 7, 8]] = 6.0, 2.0, -9.0
    assert candidates([first, second], 10) == [4, 3, 7]
    assert candidates([first, second], 2) == [4, 3]


def test_gradient_is_the_slope_of_the_margin_of_texts(tmp_path: Path) -> None:
    """Four prompts, h moving in each of them: the parts add up to the margin."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base(tmp_path / "base")).double()
    model.requires_grad_(False)
    choices = [((9,), 3), ((12, 31), 5), ((7, 8, 6), 2), ((10,), 8)]
    slope, found = 0.0, {-1: 0.0, 0: 0.0, 1: 0.0}
    for index, (own, n_characters) in enumerate(choices):
        prompt = Prompt(
            *("forget", "cloze", 1, (2, 5, 21, 30, *own)),
            every_token=False,
            choice=Choice(index, len(own), n_characters),
        )
        asked = left_padded([prompt], pad_id=0, last_only=True)
        margin = partial(text_margin, asked=asked, answer=2)
        h, gradient = residual_gradient(model, 1, asked, margin)
        direction = torch.randn(h.shape, generator=torch.Generator().manual_seed(index)).double()
        slope += float((gradient.double() * direction).sum())
        for sign in found:

            def shift(_: Any, __: Any, output: Any, by: Any = 3e-3 * sign * direction) -> Any:
                if isinstance(output, tuple):
                    return (output[0] + by, *output[1:])
                return output + by

            handle = model.get_decoder().layers[1].register_forward_hook(shift)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt.ids])).logits[0]
            handle.remove()
            said = [float(logits[3 + i].log_softmax(-1)[token]) for i, token in enumerate(own)]
            found[sign] += sum(said) / n_characters * (1 if index == 2 else -1 / 3)
            if sign == 0:
                part = float(margin(logits[None, -asked.n_last :]))
                expected = sum(said) / n_characters * (1 if index == 2 else -1 / 3)
                assert part == pytest.approx(expected, rel=1e-5)
    assert slope == pytest.approx((found[1] - found[-1]) / 6e-3, rel=1e-2)  # norms round
