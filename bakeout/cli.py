"""The command line: `bakeout VERB …`. Errors are one line on stderr; exit codes as documented."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import FrameType

import typer

import bakeout.evidence_verbs  # noqa: F401  registers its verbs
from bake.errors import BakeoutError
from bakeout.verbs import app
from verify.kinds import KINDS

BAD_INPUT, UNEXPECTED, INTERRUPTED = 2, 3, 130
_GOES_ON = "the same command goes on where it was"
_KEPT = {"verify": _GOES_ON, "select": _GOES_ON, "features": _GOES_ON, "sweep": _GOES_ON}
"""By verb, what an interruption leaves, where it leaves something."""


def main() -> None:
    """Entry point of the `bakeout` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    debug = "--debug" in arguments
    arguments = _spread_kinds([argument for argument in arguments if argument != "--debug"])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(arguments, prog_name="bakeout", standalone_mode=False)
        if code == INTERRUPTED:  # typer makes an exit code of an interruption in a verb
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _fail(
            f"interrupted; {_KEPT.get(arguments[0], 'nothing was kept')}", INTERRUPTED, debug
        )
    except BakeoutError as error:
        return _fail(str(error), BAD_INPUT, debug)
    except Exception as error:
        if hasattr(error, "format_message"):  # the command line's own usage errors
            return _fail(f"{error.format_message()}; see bakeout --help", BAD_INPUT, debug)
        if isinstance(error, OSError) and error.filename is not None:
            return _fail(f"{error.filename}: {error.strerror}", BAD_INPUT, debug)
        return _fail(
            f"unexpected {type(error).__name__}: {error}; run again with --debug to see where",
            UNEXPECTED,
            debug,
        )


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    line = " ".join(message.split())
    printable = "".join(c if c.isprintable() else "?" for c in line)
    print(f"error: {printable}", file=sys.stderr)
    return code


def _spread_kinds(arguments: list[str]) -> list[str]:
    """`--only a b` and `--only a,b` as `--only a --only b`."""
    spread: list[str] = []
    after_only = False
    for argument in arguments:
        words = argument.split(",")
        if after_only and all(word in KINDS for word in words):
            if spread[-1] == "--only":
                spread.pop()
            spread += [part for word in words for part in ("--only", word)]
            continue
        after_only = argument == "--only"
        spread.append(argument)
    return spread


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
