"""Processes on a Ray cluster that help a verification: each does all of it but what others do.

All run the same program over the same files, and share what they find piece by piece, as if it came
from a run that was interrupted. So the report is the single process's, whoever did what, and a
process that is lost costs the pieces that it was at.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

from bake.base import find_base
from bake.errors import RanOutError, ScaleError
from bake.files.halving import never_halve
from bake.questions.multiple_choice import load_questions
from bake.questions.trivia import load_trivia
from bake.scale.crew import MOST_DEATHS, Crew, Lost
from bake.stock import load_tokenizer
from export.manifest import Manifest
from verify.engines.engines import open_engines
from verify.engines.onnx_files import find_graphs
from verify.evidence.completions import open_prompts
from verify.gather import gather
from verify.journal import Journal, Others, arithmetic, versions
from verify.material import load_material
from verify.reference.whole_sae import load_sites
from verify.run import Asked

PARTS_EACH = 4
"""Parts for each process that work is cut into."""
_PROCESS_BYTES, _COPIES = 2 << 30, 4
"""What a process takes: so many bytes, and so many times the base as it is stored: base and engine,
either of which may be float32 where 16 bits are stored."""
_HERE = 0
"""The number of the process that reports."""


class Board:
    """Who does which piece, and what came of those that are done; of one process at a time."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, Any]] = {}
        """By kind of journal, the pieces in the order in which they were done."""
        self._doing: dict[tuple[str, str], int] = {}

    def take(
        self, who: int, kind: str, seen: int, names: Sequence[str]
    ) -> tuple[dict[str, Any], str | None]:
        """What `verify.journal.Others.take` gives; the first `seen` pieces are known there."""
        done = self._found.setdefault(kind, {})
        free = (of for of in names if of not in done and (kind, of) not in self._doing)
        mine = next(free, None)
        if mine is not None:
            self._doing[kind, mine] = who
        return dict(islice(done.items(), seen, None)), mine

    def put(self, kind: str, found: Mapping[str, Any]) -> None:
        """Pieces are done."""
        done = self._found.setdefault(kind, {})
        done.update({name: of for name, of in found.items() if name not in done})

    def release(self, who: int) -> None:
        """A process is gone: others may do what it was at."""
        self._doing = {key: by for key, by in self._doing.items() if by != who}


class Helper:
    """Helps a verification in a process of its own, confined as that is.

    Args:
        asked: what is verified. The folder, the recipe's files and the base must lie at the same
            paths on all machines.
        inputs: `inputs_sha256` where the verification was begun, which has looked for what may not
            be loaded: other contents than those are not.
        board: what is shared.
    """

    def __init__(self, asked: Asked, inputs: str, board: Any) -> None:
        self._asked, self._inputs, self._board = asked, inputs, board

    def about(self) -> dict[str, str]:
        """What it depends on what it finds."""
        return about_here()

    def help(self, who: int, n_parts: int) -> None:
        """Do pieces until there are none.

        Args:
            who: a number that no other process has.
            n_parts: in how many parts work is cut, the same for all.

        Raises:
            ScaleError: folder, recipe, base, SAEs, questions or texts are others here.
            RanOutError: it has too little memory for what the others do at once.
            BakeoutError: of the kind of trouble that a verification meets.
        """
        import torch

        never_halve()

        asked = self._asked
        torch.set_num_threads(asked.threads)
        folder = asked.folder
        if inputs_sha256(asked) != self._inputs:
            raise ScaleError(
                f"{folder}, its base or what the recipe names: others on {socket.gethostname()} "
                "than where verify was started; expected the same files on all machines. Copy them "
                "there"
            )
        graphs = find_graphs(folder, Manifest.read(folder).files)
        with open_engines(folder, asked.report.carrier, graphs, asked.options.device) as engines:
            references, verify = (
                _Told(self._board, who, kind, n_parts) for kind in ("references", "verify")
            )
            own = Journal(shared=Journal(others=references), others=verify)
            gather(
                *(folder, asked.recipe, asked.report, asked.kinds),
                *(_untold, engines, own, asked.options),
            )


class _Told:
    """`verify.journal.Others` of one journal of one process."""

    def __init__(
        self,
        board: Any,
        who: int,
        kind: str,
        n_parts: int,
        look_after: Callable[[], None] = lambda: None,
    ) -> None:
        self.n_parts = n_parts
        self._board, self._who, self._kind, self._look_after = board, who, kind, look_after
        self._seen, self._asking = 0, threading.Lock()

    def take(self, names: Sequence[str]) -> tuple[dict[str, Any], str | None]:
        """See `verify.journal.Others.take`."""
        self._look_after()
        with self._asking:
            asked = self._board.take.remote(self._who, self._kind, self._seen, names)
            found, mine = self._got(asked)
            self._seen += len(found)
        return found, mine

    def put(self, found: Mapping[str, Any]) -> None:
        """See `verify.journal.Others.put`."""
        if found:
            self._board.put.remote(self._kind, dict(found))

    @staticmethod
    def _got(answer: Any) -> Any:
        import ray

        return ray.get(answer)


class _Helpers:
    """The helpers of this process: they come when they have started, and are replaced when lost."""

    def __init__(self, crew: Crew, board: Any) -> None:
        import ray

        self._ray, self._crew, self._board = ray, crew, board
        self.n_parts = PARTS_EACH * (crew.size + 1)
        self._calls: dict[Any, tuple[int, Any]] = {}
        self._n_begun = self._n_lost = 0

    def look_after(self) -> None:
        """Give work to who has come, and what a lost one was at to others.

        Raises:
            BakeoutError: that a helper met.
        """
        for actor in self._crew.arrived():
            self._n_begun += 1
            self._calls[actor.help.remote(self._n_begun, self.n_parts)] = (self._n_begun, actor)
        if not self._calls:
            return
        ended = self._ray.wait([*self._calls], num_returns=len(self._calls), timeout=0)[0]
        for call in ended:
            who, actor = self._calls.pop(call)
            try:
                self._crew.result(call)
            except (Lost, RanOutError):
                self._board.release.remote(who)
                self._n_lost += 1
                if self._n_lost < MOST_DEATHS * self._crew.size:  # else without it
                    self._crew.replace(actor)


@contextmanager
def helped_by(crew: Crew, asked: Asked) -> Iterator[Callable[[str], Others]]:
    """Let a crew's machines help until this is left; one whose place this process has does not.

    Args:
        crew: of which the workers so far are let go.
        asked: what is verified.

    Yields:
        By a journal's kind, who they are.

    Raises:
        ScaleError: helpers do not start, or have other versions, folders or bases.
    """
    base = find_base(asked.recipe)
    options = replace(asked.options, cache=None, tasks=(), trust=None)  # what concerns it alone
    stored = sum((base.folder / shard).stat().st_size for shard in base.shards)
    board = crew.start(
        *(Helper, replace(asked, options=options), inputs_sha256(asked)),
        memory=_PROCESS_BYTES + _COPIES * stored,
        cores=asked.threads,
        gpu=asked.options.device != "cpu",
        beside=Board,
        about=about_here(),
    )
    helpers = _Helpers(crew, board)
    yield lambda kind: _Told(board, _HERE, kind, helpers.n_parts, helpers.look_after)


def about_here() -> dict[str, str]:
    """Everything of this machine on which the last digit of a result depends."""
    here = {name: str(of) for name, of in versions().items()}
    return {**here, "the arithmetic": json.dumps(arithmetic())}


def inputs_sha256(asked: Asked) -> str:
    """Of the contents of the folder, the base, the SAEs, the recipe, every file that it names, and
    the questions and texts that are asked, wherever they come from.
    """
    recipe = asked.recipe
    base = find_base(recipe)
    digest = hashlib.sha256(json.dumps(recipe.to_dict(), sort_keys=True).encode())
    if any(clamp.sae.path is None for clamp in recipe.clamp):  # else they are files below
        for site in load_sites(recipe):
            for name, tensor in sorted(site.sae.state_dict().items()):
                digest.update(name.encode() + tensor.numpy().tobytes())
    material = load_material(recipe, load_tokenizer(recipe))
    asked_of: list[Any] = [material.questions, material.windows, open_prompts(recipe)]
    if recipe.verify is not None:
        asked_of += [load_questions(source, recipe) for source in recipe.verify.reworded.values()]
        named = recipe.verify.completions
        if named is not None and named.trivia is not None:
            asked_of.append(load_trivia(named.trivia, recipe, topic=None))
    digest.update(repr(asked_of).encode())
    for path in [asked.folder, base.folder, *recipe.local_sources]:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                with file.open("rb") as opened:
                    content = hashlib.file_digest(opened, "sha256").digest()
                digest.update(file.relative_to(path).as_posix().encode() + b"\0" + content)
    return digest.hexdigest()


def _untold(what: str, share: float) -> None:
    """Only the process that reports tells how far it is."""
