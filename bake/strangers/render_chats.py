"""A chat template, rendered where it can do no harm: `python -I render_chats.py`, by its path.

Needs jinja2 only. A JSON object comes on stdin: `template`, `variables`, `chats`, and `seconds` of
processor time. A JSON list goes to stdout: for each chat {"text": …} or {"error": …}. Globals are
those that transformers gives to templates; the sandbox is jinja2's, and memory is limited too.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MEMORY_BYTES = 1 << 29
"""Of the process. It takes a tenth of that itself."""
CPU_SECONDS = 5
"""For all chats of a request; they take milliseconds."""
MOST_CHARACTERS = 1 << 22
"""Longest text that a chat may become."""


class Generation(Extension):
    """`{% generation %}`, which marks what the model says: here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  as jinja2 has it

    def parse(self, parser: Any) -> Any:
        """The block's own body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class PlainNamespace(Namespace):
    """jinja2's, without names that lead into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        names = dict(*rest, **kwargs)
        for name in names:
            _check_name(name)
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"{name} begins with an underscore")


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def render(template: str, variables: dict[str, Any], chats: list[Any]) -> list[dict[str, str]]:
    """For each chat its text, or why there is none."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    made.globals |= {"dict": _dict, "namespace": PlainNamespace}
    found = []
    for chat in chats:
        try:
            text = made.from_string(template).render(messages=chat, **variables)
            if len(text) > MOST_CHARACTERS:
                raise ValueError(f"it makes {len(text):,} characters of it")
            found.append({"text": text})
        except Exception as error:  # whatever a template raises, roles out of turn mostly
            found.append({"error": " ".join(str(error).split()) or type(error).__name__})
    return found


def main() -> None:
    """One request."""
    asked = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (asked["seconds"], asked["seconds"]))
    json.dump(render(asked["template"], asked["variables"], asked["chats"]), sys.stdout)


if __name__ == "__main__":
    main()
