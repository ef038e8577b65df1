"""Witnesses: which prompts fire the clamp, and what the model says to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bake.files.halving import in_halves, joined
from export.clamped import Clamped
from export.streamed import Run, StreamedModel
from export.witness_file import Witnesses

MOST, FEWEST = 6, 3
"""Prompts that become witnesses, where so many fire."""
LENGTH = 32
"""Longest prompt, in tokens, BOS included."""
WIDTH = 512
"""Vocabulary entries that are recorded of each token's logits."""
_PLACES = 2
"""Tokens of each prompt whose logits are recorded: the last ones."""
_CANDIDATES = 64
"""Most prompts that are tried, of those that are given."""
_ROUNDS = 12
"""How often a search without given prompts makes new ones out of the best."""
_SEED = 0
EDGE = 128.0
"""How many roundings every gate of a witness must be away from its other side, so that it opens and
closes alike on every machine."""


def find_witnesses(
    clamped: Clamped, prompts: Sequence[Sequence[int]], device: str = "cpu"
) -> Witnesses | None:
    """Prompts that fire the clamp, and what the model says to them, in float32.

    Those are taken that show most of the features that are read; each is cut after the token that
    follows the last firing. Where no given prompt fires, prompts are searched for.

    Args:
        clamped: the folder.
        prompts: token ids, BOS first; may be empty.
        device: as torch names it, where the model runs.

    Returns:
        None where nothing was found that fires and shows it.
    """
    model = StreamedModel(clamped, device)
    candidates = [list(ids[:LENGTH]) for ids in _spread(prompts)]
    found = _firing(candidates, _look(model, candidates)) if candidates else []
    if not found:
        found = _search(model, clamped)
    if not found:
        return None
    chosen = [prompt.ids for prompt in _most_features(found)]
    input_ids, mask = _padded(chosen)
    seq = input_ids.shape[1]
    places = torch.tensor(
        [
            (row, seq - back)
            for row, ids in enumerate(chosen)
            for back in range(1, 1 + min(_PLACES, len(ids)))
        ]
    )
    clamped_logits, sensitivity = model.run_disturbed(input_ids, mask, places)
    with model.unclamped():
        unclamped_logits = model.run(input_ids, mask, places).logits
    kept = _telling(clamped_logits, unclamped_logits)
    witnesses = Witnesses(
        input_ids,
        mask,
        places,
        kept,
        clamped_logits.gather(-1, kept),
        unclamped_logits.gather(-1, kept),
        sensitivity[:, None],
    )
    return witnesses if witnesses.telling else None


def _telling(logits: Tensor, unclamped: Tensor) -> Tensor:
    """[m, vocab] twice -> [m, w]: half the likeliest entries, half those that move most."""
    width = min(WIDTH, logits.shape[-1])
    likely = logits.topk(width // 2, dim=-1).indices
    change = (logits - unclamped).abs().scatter(-1, likely, -1.0)
    return torch.cat([likely, change.topk(width - width // 2, dim=-1).indices], dim=-1)


# --------------------------------------------------------------------------- which prompts


@dataclass(frozen=True)
class _Prompt:
    """A prompt that fires."""

    ids: list[int]
    """Cut after the token that follows the last firing."""
    features: frozenset[tuple[int, int]]
    """(layer, row) of the features that are active where a clamp moves the residual stream."""


def _spread(prompts: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """At most `_CANDIDATES` of them, evenly from all."""
    return prompts[:: max(1, -(-len(prompts) // _CANDIDATES))]


def _look(model: StreamedModel, prompts: list[list[int]]) -> Run:
    input_ids, mask = _padded(prompts)

    def run(rows: slice) -> Run:
        return model.run_to_last_clamp(input_ids[rows], mask[rows])

    return joined(in_halves(model, "trying prompts", run, *input_ids.shape))


def _firing(prompts: list[list[int]], run: Run) -> list[_Prompt]:
    """Those of some prompts at which a clamp acts, and no gate is near its other side."""
    found = []
    for row, ids in enumerate(prompts):
        features: set[tuple[int, int]] = set()
        last = 0
        for layer, moved in run.moved.items():
            begin = moved.shape[1] - len(ids)
            seen = run.active[layer][row, begin:] & moved[row, begin:, None]  # [token, feature]
            features |= {(layer, feature) for feature in seen.any(0).nonzero().flatten().tolist()}
            last = max([last, *seen.any(1).nonzero().flatten().tolist()])
        begin = run.edges[0].shape[1] - len(ids)
        if min(float(edges[row, begin:].amin()) for edges in run.edges) <= EDGE:
            continue
        if features:
            found.append(_Prompt(ids[: last + 2], frozenset(features)))
    return found


def _most_features(prompts: Iterable[_Prompt]) -> list[_Prompt]:
    """Greedily: the next prompt is the one that shows most of what is not yet shown."""
    left, shown = list(prompts), frozenset[tuple[int, int]]()
    chosen: list[_Prompt] = []
    while left and len(chosen) < MOST:
        best = max(left, key=lambda prompt: (len(prompt.features - shown), -len(prompt.ids)))
        if len(chosen) >= FEWEST and not best.features - shown:
            break
        left.remove(best)
        chosen.append(best)
        shown |= best.features
    return chosen


def _search(model: StreamedModel, clamped: Clamped) -> list[_Prompt]:
    """Prompts of arbitrary tokens, the ones nearest to firing changed again and again."""
    generator = torch.Generator().manual_seed(_SEED)
    vocab = clamped.tensors[f"{clamped.backbone_prefix}embed_tokens.weight"].shape[0]
    bos = (clamped.exempt_token_ids or (2,))[0]

    def tokens(*shape: int) -> Tensor:
        return torch.randint(0, vocab, shape, generator=generator)

    prompts = torch.cat([torch.full((32, 1), bos), tokens(32, 15)], dim=1)
    for _ in range(_ROUNDS):
        run = _look(model, prompts.tolist())
        if found := _firing(prompts.tolist(), run):
            return found
        nearness = torch.stack(run.margins)[..., 1:].amax(dim=(0, 2))  # of each prompt, past BOS
        best = prompts[nearness.topk(8).indices].repeat(4, 1)
        changed = torch.rand(best.shape, generator=generator) < 0.25
        changed[:8] = False
        changed[:, 0] = False
        prompts = torch.where(changed, tokens(*best.shape), best)
    return []


def _padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask): [n, seq], zeros on the left."""
    seq = max(len(ids) for ids in prompts)
    input_ids = torch.zeros(len(prompts), seq, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, seq - len(ids) :] = torch.tensor(ids)
        mask[row, seq - len(ids) :] = 1
    return input_ids, mask
