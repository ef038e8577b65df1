"""Where the clamp fires: on which tokens, in which examples, and which features never do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from verify.compare.loss_split import after_firing
from verify.report.measures import FiredText

if TYPE_CHECKING:
    from bake.questions.prompts import Batch, Prompt
    from verify.reference.oracle import Oracle

EXAMPLES = 3
"""How many sequences of each source are kept."""
SOURCES = ("forget", "retain", "text")


def fired_on(oracle: Oracle, batch: Batch) -> dict[str, Any]:
    """What an oracle's last forward, which was of this batch, fired on, as JSON data.

    Returns:
        positions: per prompt, the tokens on which any clamp fired, from 0 (BOS).
        after: per token of text whose loss is taken, whether it was predicted at or after a firing.
        active: by layer, per prompt, which of the clamp's features were active, as indices.
    """
    fired = oracle.last_fired
    assert fired is not None and fired.shape == batch.input_ids.shape
    lead = fired.shape[1]  # padding stands in front
    positions = [
        [at - (lead - len(prompt.ids)) for at in row.nonzero()[:, 0].tolist()]
        for prompt, row in zip(batch.prompts, fired, strict=True)
    ]
    after = [] if batch.of_choices else after_firing(fired.cpu(), batch.scored).int().tolist()
    active = {
        str(layer): [row.nonzero()[:, 0].tolist() for row in flags]
        for layer, flags in oracle.last_active.items()
    }
    return {"positions": positions, "after": after, "active": active}


class Firings:
    """What oracles do from now on."""

    def __init__(self, oracles: Mapping[str, Oracle], reference: str) -> None:
        self._oracles, self._reference = oracles, oracles[reference]
        self._tokens = {name: oracle.tokens_fired for name, oracle in oracles.items()}
        self._by_layer = dict(self._reference.fired_by_layer)

    def since(self, batch: Batch) -> dict[str, Any]:
        """On how many tokens they fired since; and on which of a batch, their last one."""
        return {
            "tokens": {
                name: oracle.tokens_fired - self._tokens[name]
                for name, oracle in self._oracles.items()
            },
            "by_layer": {
                str(layer): n - self._by_layer[layer]
                for layer, n in self._reference.fired_by_layer.items()
            },
            **fired_on(self._reference, batch),
        }


class FiredExamples:
    """Of every source, the sequences on which the clamps fired most.

    Taking the most shows the forgetting where it is plainest, and the side effects on what is to
    be kept where they are worst.

    Args:
        form: of questions; those in other forms are left out. Of a question's choices, the one on
            which they fired most stands for all.
    """

    def __init__(self, form: str) -> None:
        self._form = form
        self._kept: dict[str, list[tuple[Prompt, tuple[int, ...]]]] = {}

    def add(self, prompts: Sequence[Prompt], positions: Sequence[Sequence[int]]) -> None:
        """Take in a batch's prompts and the tokens of each on which a clamp fired."""
        for prompt, found in zip(prompts, positions, strict=True):
            if prompt.form not in (self._form, "text"):
                continue
            kept = self._kept.setdefault(prompt.source, [])
            kept.append((prompt, tuple(found)))
            kept.sort(key=lambda example: (-len(example[1]), example[0].row, example[0].ids))
            most: dict[Any, tuple[Prompt, tuple[int, ...]]] = {}
            for example in kept:
                of = example[0]
                most.setdefault(of if of.choice is None else of.item, example)
            kept[:] = list(most.values())[:EXAMPLES]

    @property
    def prompts(self) -> list[Prompt]:
        """What was kept, where a clamp fired on it."""
        return [prompt for kept in self._kept.values() for prompt, fired in kept if fired]

    def result(self, tokenizer: Any) -> tuple[FiredText, ...]:
        """What was kept, as text."""
        return tuple(
            FiredText(
                source=prompt.source,
                form=prompt.form,
                row=prompt.row,
                tokens=tuple(tokenizer.convert_ids_to_tokens(list(prompt.ids))),
                fired=fired,
            )
            for source in SOURCES
            for prompt, fired in self._kept.get(source, [])
        )


class FeatureWatch:
    """Which of the clamps' features were active on what is to be forgotten.

    Args:
        features: by layer, the clamp's features.
    """

    def __init__(self, features: dict[int, tuple[int, ...]]) -> None:
        self._features = features
        self._seen: dict[int, set[int]] = {}

    def add(self, prompts: Sequence[Prompt], active: dict[str, list[list[int]]]) -> None:
        """Take in which features were active in which of a batch's prompts."""
        for layer, rows in active.items():
            seen = self._seen.setdefault(int(layer), set())
            for prompt, indices in zip(prompts, rows, strict=True):
                if prompt.source == "forget":
                    seen.update(indices)

    def never_active(self) -> Iterator[tuple[int, int]]:
        """(layer, feature) of those that never were."""
        for layer, features in self._features.items():
            if layer not in self._seen:
                continue
            for index, feature in enumerate(features):
                if index not in self._seen[layer]:
                    yield layer, feature
