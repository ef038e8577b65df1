"""Chats through a tokenizer's own template, which a stranger may have written."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bake.errors import ModelError
from bake.files.scratch import Scratch
from bake.strangers import confined, render_chats

MOST_CHARACTERS = 1 << 18
"""Longest template; Gemma's have under two thousand."""
SECONDS = 60.0
"""Most that a request may take. Its processor time is limited more tightly, in `render_chats`."""


@dataclass(frozen=True)
class NotRendered:
    """A chat of which a template makes no text."""

    reason: str


def rendered(
    tokenizer: Any, chats: Sequence[Any], *, add_generation_prompt: bool = False
) -> list[str | NotRendered]:
    """What `apply_chat_template(…, tokenize=False)` gives, from a process that can do no harm.

    Args:
        tokenizer: with a chat template.
        chats: lists of messages.
        add_generation_prompt: end where the model is to go on.

    Returns:
        For each chat its text, or why there is none.

    Raises:
        ModelError: there is none, or it is too long, or takes too much memory or time.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise ModelError(
            f"the tokenizer's chat template: {str(error).splitlines()[0]}; take another tokenizer"
        ) from error
    if len(template) > MOST_CHARACTERS:
        raise ModelError(
            f"the chat template has {len(template):,} characters; expected at most "
            f"{MOST_CHARACTERS:,}. Take another tokenizer"
        )
    variables = {**tokenizer.special_tokens_map, "add_generation_prompt": add_generation_prompt}
    asked = {
        "template": template,
        "variables": {**variables, "tools": None, "documents": None},
        "seconds": render_chats.CPU_SECONDS,
        "chats": [[_said(message) for message in chat] for chat in chats],
    }
    with Scratch("chat") as scratch:
        process = confined.start(
            render_chats.__file__,
            scratch=scratch,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        with process, confined.time_limit(process, SECONDS):
            said, _ = process.communicate(json.dumps(asked, default=str).encode())
    if process.returncode:
        raise ModelError(
            "the chat template takes more time or memory than a chat needs "
            f"({render_chats.CPU_SECONDS} seconds, {render_chats.MEMORY_BYTES >> 20} MB); take "
            "another tokenizer"
        )
    found = json.loads(said)
    return [one["text"] if "text" in one else NotRendered(one["error"]) for one in found]


def _said(message: Any) -> dict[str, Any]:
    return {key: value for key, value in message.items() if value is not None}
