"""Attribution: how much each feature moves the answer of a question, to first order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

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


def residual_gradient(
    model: Any, layer: int, ids: Tensor, letters: Sequence[Sequence[int]], answer: int
) -> tuple[Tensor, Tensor]:
    """A layer's output on one prompt, and the gradient of the letter margin there.

    Args:
        model: a stock Gemma; its parameters need no gradient.
        layer: from 0.
        ids: [seq], BOS first.
        letters: as in `letter_margin`.
        answer: index of the right letter.

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
            logits = model(input_ids=ids[None], logits_to_keep=1, use_cache=False).logits[0, -1]
            (gradient,) = torch.autograd.grad(letter_margin(logits, letters, answer), kept[0])
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
