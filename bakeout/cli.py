"""The command line: `bakeout VERB …`. Errors are one line on stderr; exit codes as documented."""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from dataclasses import dataclass
from importlib import import_module
from types import FrameType

import typer

from bake.errors import BakeoutError, printable
from bake.files.halving import out_of_memory, reason_in
from bake.files.memory import LARGE_PAGES
from bake.new_folder import is_disk_full

BAD_INPUT, UNEXPECTED, INTERRUPTED = 2, 3, 130


@dataclass(frozen=True)
class Verb:
    """One verb. Its module is imported when it is asked for, and not before."""

    module: str
    """In `bakeout.verbs`."""
    function: str
    """A function of it that typer takes, or an app of verbs below this one."""
    help: str
    """The first line of that function's docstring."""
    goes_on: bool = False
    """Whether the same command goes on where it was interrupted."""


VERBS: dict[str, Verb] = {
    "demo": Verb(
        "demo",
        "demo",
        "Bake the shipped miniature, load the result as a stranger would, and compare.",
    ),
    "bake": Verb(
        "baking",
        "bake",
        "Write a clamped checkpoint: the base's shards byte for byte, and the clamp beside them.",
    ),
    "import-gguf": Verb(
        "importing",
        "convert",
        "Write a GGUF file's Gemma as a base model's folder: bfloat16 weights, config, tokenizer.",
    ),
    "distill": Verb(
        "training",
        "distill",
        "Train a stock checkpoint to forget by itself: no part to delete, and nothing exact.",
        goes_on=True,
    ),
    "export": Verb("exporting", "app", "Carry a clamped checkpoint's clamp in another form."),
    "select": Verb(
        "selecting",
        "select",
        'Find the features of a recipe that says features = "select", and say why.',
        goes_on=True,
    ),
    "sweep": Verb(
        "selecting",
        "sweep",
        "Measure a grid of settings on validation questions, and the best of them on test.",
        goes_on=True,
    ),
    "features": Verb(
        "featuring",
        "features",
        "Write a page on a recipe's features: where they fire, how strongly, on which texts.",
        goes_on=True,
    ),
    "train-sae": Verb(
        "training", "train_sae", "Train an SAE with sae_lens, for a model that has no public one."
    ),
    "show": Verb(
        "showing", "show", "What was baked: layers, features, method, provenance, exactness."
    ),
    "chat": Verb(
        "chat",
        "chat",
        "Type a prompt, see the answer as it comes. Each prompt stands alone: nothing is "
        "remembered.",
    ),
    "web": Verb(
        "web.web_verb",
        "web",
        "Serve a page on this machine that runs the folder in the browser: chat, and what fired.",
    ),
    "verify": Verb(
        "verifying",
        "verify",
        "Compare a folder with the hooked reference. Exit code 1 when it does not hold.",
        goes_on=True,
    ),
    "audit": Verb(
        "auditing",
        "audit",
        "Attack folders: fine-tune, strip, round, look inside, ask otherwise. Says what came back.",
        goes_on=True,
    ),
    "compare": Verb(
        "auditing",
        "compare",
        "Put folders of one base side by side: what reports measured, what loads and removes each.",
    ),
    "card": Verb(
        "publishing",
        "card",
        "Write the folder's README.md anew: what was removed, what was measured, what remains.",
    ),
    "sign": Verb(
        "publishing",
        "sign",
        "Sign a folder's files with a key, a certificate, or an identity (Sigstore).",
    ),
    "push": Verb(
        "publishing",
        "push",
        "Upload a folder that passed its verification to the hub, with a card that shows it.",
    ),
}
"""The verbs, in the order of `bakeout --help`. To add one: an entry here, and its module."""


def app_with(asked: str | None) -> typer.Typer:
    """The command line with one verb in full; of the others there are names and help only."""
    app = typer.Typer(
        help="Bake SAE-based unlearning into a Gemma checkpoint's files, and prove that it holds.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    for name, verb in VERBS.items():
        found = _absent
        if name == asked:
            found = getattr(import_module(f"bakeout.verbs.{verb.module}"), verb.function)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name)
        else:
            app.command(name, help=None if name == asked else verb.help)(found)
    return app


def _absent() -> None:
    """Stands for a verb that was not asked for."""


def main() -> None:
    """Entry point of the `bakeout` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    debug = "--debug" in arguments
    arguments = _spread_kinds([argument for argument in arguments if argument != "--debug"])
    arguments = _own_ray(arguments)
    for name, value in {"TOKENIZERS_PARALLELISM": "false", **LARGE_PAGES}.items():
        os.environ.setdefault(name, value)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        asked = next((argument for argument in arguments if argument in VERBS), None)
        code = app_with(asked)(arguments, prog_name="bakeout", standalone_mode=False)
        if code == INTERRUPTED:  # typer makes an exit code of an interruption in a verb
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        goes_on = arguments[0] in VERBS and VERBS[arguments[0]].goes_on
        left = "the same command goes on where it was" if goes_on else "nothing was kept"
        return _fail(f"interrupted; {left}", INTERRUPTED, debug)
    except BakeoutError as error:
        return _fail(str(error), BAD_INPUT, debug)
    except Exception as error:
        if is_disk_full(error):
            goes_on = arguments[0] in VERBS and VERBS[arguments[0]].goes_on
            left = "what was found is kept" if goes_on else "nothing was kept"
            said = f"the disk is full; {left}. Free some, and run the same command again"
            return _fail(said, BAD_INPUT, debug)
        if out_of_memory(error):
            said = f"memory ran out ({reason_in(error)}); take a machine or a device with more"
            return _fail(said, BAD_INPUT, debug)
        if type(error).__name__ == "NoArgsIsHelpError":
            asked_for = " ".join(["bakeout", *arguments])
            return _fail(f"no verb; expected one of those in {asked_for} --help", BAD_INPUT, debug)
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
    print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


def _spread_kinds(arguments: list[str]) -> list[str]:
    """`--only a b`, `--only a,b` and `--only=a,b` as `--only a --only b`."""
    if not any(argument.startswith("--only") for argument in arguments):
        return arguments
    from verify.evidence.kinds import KINDS

    spread: list[str] = []
    expected = among = False
    for argument in arguments:
        name, _, kinds = argument.partition("=")
        if argument == "--only":
            expected = among = True
            continue
        if name == "--only" or expected or (among and set(argument.split(",")) <= KINDS.keys()):
            asked = kinds if name == "--only" else argument
            spread += [
                part for kind in asked.split(",") if kind for part in ("--only", kind.strip())
            ]
            expected, among = False, True
            continue
        among = False
        spread.append(argument)
    return [*spread, "--only"] if expected else spread


def _own_ray(arguments: list[str]) -> list[str]:
    """`--ray` that no address (HOST:PORT) follows, as `--ray=local`."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=False)
    return [
        "--ray=local" if name == "--ray" and not re.search(r"://|:\w*$", following) else name
        for name, following in pairs
    ]


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
