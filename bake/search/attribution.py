"""Attribution: how much each feature moves the answer of a question, to first order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bake.questions.answers import DECIDES, NORMALISED
from bake.questions.loss import scored_losses
from bake.questions.multiple_choice import LETTERS
from bake.questions.prompts import Batch
from bake.search.select import Scores
from bake.search.statistics import FeatureSite

PER_QUESTION = 20
"""Features that each known question proposes. Source: Farrell et al., arXiv 2410.19278."""


def letter_margin(logits: Tensor, letters: Sequence[Sequence[int]], answer: int) -> Tensor:
    """Logit of the right letter minus the mean of the wrong ones.

    Args:
        logits: [vocab], at the last token.
        letters: per letter, its token ids; the better one counts.
        answer: index of the right letter.
    """
    per_letter = torch.stack([logits[list(ids)].amax() for ids in letters])
    wrong = [i for i in range(len(letters)) if i != answer]
    return per_letter[answer] - per_letter[wrong].mean()


def text_margin(logits: Tensor, asked: Batch, answer: int) -> Tensor:
    """One choice's part of this: log-likelihood per character of the right choice's text minus the
    mean of the wrong ones.

    Args:
        logits: [1, n_last, vocab], of the last columns.
        asked: the prompt that ends with the choice.
        answer: index of the right choice.
    """
    (prompt,) = asked.prompts
    assert prompt.choice is not None
    likelihood = -scored_losses(logits, asked).sum() / NORMALISED[DECIDES](prompt.choice)
    return likelihood if prompt.choice.index == answer else -likelihood / (len(LETTERS) - 1)


def residual_gradient(
    model: Any, layer: int, asked: Batch, margin: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """A layer's output on one prompt, and the gradient of a margin there.

    Args:
        model: a stock Gemma; its parameters need no gradient.
        layer: from 0.
        asked: the prompt.
        margin: of the logits of its last columns, [1, n_last, vocab].

    Returns:
        (h [seq, d_in], ∇_h margin [seq, d_in]), float32.
    """
    kept: list[Tensor] = []

    def cut(_: Any, __: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        kept.append(h.detach().requires_grad_())
        return (kept[0], *output[1:]) if isinstance(output, tuple) else kept[0]

    handle = model.get_decoder().layers[layer].register_forward_hook(cut)
    try:
        with torch.enable_grad():
            logits = model(
                input_ids=asked.input_ids.to(model.device),
                logits_to_keep=asked.n_last,
                use_cache=False,
            ).logits
            (gradient,) = torch.autograd.grad(margin(logits), kept[0])
    finally:
        handle.remove()
    return kept[0][0].detach().float(), gradient[0].float()


def attribution(h: Tensor, gradient: Tensor, site: FeatureSite, W_dec: Tensor) -> Scores:
    """Activation × (W_dec · ∇_h margin), summed over the positions of a prompt.

    Args:
        h: [n, d_in], the layer's output at the positions that count.
        gradient: [n, d_in], of the margin.
        site: whose features.
        W_dec: [d_sae, d_in], on h's device.

    Returns:
        [d_sae]; positive: the feature speaks for the right letter.

    Source: Farrell et al., arXiv 2410.19278.
    """
    encoder = site.encoder
    W_enc, b_enc, theta = (
        torch.from_numpy(a).to(h.device) for a in (encoder.W_enc, encoder.b_enc, encoder.theta)
    )
    pre = torch.addmm(b_enc, h, W_enc)
    acts = torch.where(pre > theta, pre, 0.0)
    scores: Scores = (acts * (gradient @ W_dec.T)).sum(0).double().cpu().numpy()
    return scores


def candidates(per_question: Sequence[Scores], most: int) -> list[int]:
    """Features that are among the top of any question, by their summed attribution.

    Args:
        per_question: [d_sae] for each known question.
        most: how many to give at most.
    """
    total = np.sum(per_question, axis=0)
    proposed: set[int] = set()
    for scores in per_question:
        top = np.argsort(-scores, kind="stable")[:PER_QUESTION]
        proposed |= {int(feature) for feature in top if scores[feature] > 0}
    return sorted(proposed, key=lambda feature: (-total[feature], feature))[:most]
