"""Chat templates: programs that come with a tokenizer, run in a process that can be stopped.

Jinja's sandbox keeps a template from files and attributes, and neither from loops without end nor
from `10 ** 10 ** 10`, which no signal interrupts.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import time
from pathlib import Path
from typing import Any

from bake.errors import short
from bake.reading.capped import UnreadableError

SECONDS = 5.0
"""Longest that a template may take for one conversation."""
_BYTES = 1 << 30
"""Most memory that it may take."""
_TEXT = 64 << 20
"""Most bytes of what it writes."""


def rendered(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    """A conversation through a tokenizer's chat template, as text.

    Args:
        tokenizer: transformers'.
        messages: the conversation.
        options: of `apply_chat_template`.

    Raises:
        UnreadableError: the template refuses the conversation, is broken, or takes too long or too
            much memory.
    """
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        _render(writes, tokenizer, messages, options)
    os.close(writes)
    try:
        answer = _read(reads)
    finally:
        os.close(reads)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if answer[:1] != b"+":
        reason = answer[1:].decode("utf-8", "replace") or "it takes more memory than any needs"
        raise UnreadableError(short(" ".join(reason.split())))
    return answer[1:].decode("utf-8", "surrogatepass")


def _read(reads: int) -> bytes:
    answer, end = bytearray(), time.monotonic() + SECONDS
    while True:
        ready, _, _ = select.select([reads], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            return f"-it takes more than {SECONDS:g} s".encode()
        if not (block := os.read(reads, 1 << 16)):
            return bytes(answer)
        answer += block
        if len(answer) > _TEXT:
            return f"-it writes more than {_TEXT:,} bytes".encode()


def _render(writes: int, tokenizer: Any, messages: Any, options: dict[str, Any]) -> None:
    """In the child: never returns."""
    code = 1
    try:
        for sign in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sign, signal.SIG_DFL)
        with contextlib.suppress(OSError, ValueError):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + _BYTES
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
            answer = b"+" + text.encode("utf-8", "surrogatepass")
        except MemoryError:
            answer = b"-"
        except Exception as error:  # whatever a template raises
            answer = f"-{error or type(error).__name__}"[:4096].encode("utf-8", "replace")
        view = memoryview(answer)
        while view:
            view = view[os.write(writes, view) :]
        code = 0
    finally:
        os._exit(code)
