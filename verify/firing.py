"""Where the clamp fires: a few sequences of every source, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from verify.report import FiredText

if TYPE_CHECKING:
    from verify.prompts import Batch, Prompt
    from verify.reference import Oracle

EXAMPLES = 3
"""How many sequences of each source are kept."""
SOURCES = ("forget", "retain", "text")


class FiredExamples:
    """Of every source, the sequences on which an oracle's clamps fired most.

    Taking the most shows the forgetting where it is plainest, and the side effects on what is to
    be kept where they are worst.

    Args:
        oracle: looked at after each of its forwards.
        form: chat | plain: questions in the other form are left out.
    """

    def __init__(self, oracle: Oracle, form: str) -> None:
        self._oracle = oracle
        self._form = form
        self._kept: dict[str, list[tuple[Prompt, tuple[int, ...]]]] = {}

    def __call__(self, batch: Batch) -> None:
        """Look at the oracle's last forward, which was of this batch."""
        fired = self._oracle.last_fired
        assert fired is not None and fired.shape == batch.input_ids.shape
        for prompt, row in zip(batch.prompts, fired.tolist(), strict=True):
            if prompt.form not in (self._form, "text"):
                continue
            real = row[len(row) - len(prompt.ids) :]  # padding stands in front
            found = tuple(position for position, flag in enumerate(real) if flag)
            kept = self._kept.setdefault(prompt.source, [])
            kept.append((prompt, found))
            kept.sort(key=lambda example: (-len(example[1]), example[0].row, example[0].ids))
            del kept[EXAMPLES:]

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
