"""A process of clients: they are asked in ways, one after another; what became of each is written.

    python -m tests.clients.asking REQUEST_DIR FIRST

`request.json` holds `ways` (module, number of the client in it, number of its way), `folders`,
`prompts` and the `places` in each at which logits are wanted. From the FIRST on, way n is answered
by `n.json` and, where something was said, `n.npz`. Whoever dies leaves the rest unanswered.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import numpy as np

from tests.clients.cells import Generated, NotHereError, Prompt

OURS = ("bake", "export", "verify", "model_cards", "bakeout")
_WORDS = 160


class Blocker(MetaPathFinder):
    """Makes bakeout unknown to this process."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in OURS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def words_of(error: BaseException, known: Sequence[str]) -> str:
    """A refusal in one line, without paths of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # OpenVINO says first where in its source it stands, and what is wrong after that.
    text = " ".join(line for line in lines if not line.startswith(("Exception from", "Check '")))
    for path in sorted(known, key=len, reverse=True):
        text = text.replace(path, "FOLDER")
    text = re.sub(r"(?<![\w/])/(?:[\w.+-]+/)+", "…/", text)
    text = re.sub(r"0x[0-9a-f]+", "0x…", text)
    name = "" if type(error).__name__ == "RuntimeError" else f"{type(error).__name__}: "
    said = f"{name}{text}"
    return said if len(said) <= _WORDS else f"{said[: _WORDS - 1]}…"


def main(at: str, first: str) -> None:
    """Answer a request."""
    here = Path(at)
    request = json.loads((here / "request.json").read_text())
    if not request["knows_bakeout"]:
        sys.meta_path.insert(0, Blocker())
    warnings.simplefilter("ignore")
    folders = {name: Path(path) for name, path in request["folders"].items()}
    prompts = list(map(Prompt, request["prompts"], request["places"]))
    for index, (module, which, way) in list(enumerate(request["ways"]))[int(first) :]:
        found = importlib.import_module(module)
        client = (getattr(found, "CLIENTS", None) or (found.CLIENT,))[which]
        answer: dict[str, Any] = {}
        try:
            said = client.say(client.ways[way], folders, prompts)
            arrays = {}
            for number, (one, places) in enumerate(zip(said, request["places"], strict=True)):
                made = isinstance(one, Generated)
                arrays[f"logits_{number}"] = one.logits if made else one[places]
                if made:
                    arrays[f"ids_{number}"] = np.array(one.ids)
            np.savez(here / f"{index}.npz", **arrays)
        except NotHereError as error:
            answer = {"not_here": str(error)}
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            answer = (
                {"refuses": words_of(error, request["folders"].values())}
                if missing in OURS
                else {"not_here": f"{missing} is not installed"}
            )
        except Exception as error:
            answer = {"refuses": words_of(error, request["folders"].values())}
        (here / f"{index}.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
