"""Asks clients, and judges what they say: cells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bake.rounding import REFUSES
from tests.clients.cells import NOT_RUN, Cell, Client, Way
from tests.clients.client_table import clients
from tests.clients.client_world import ClientWorld
from tests.clients.onnx_clients.npm_client import node_modules

ROOT = Path(__file__).parents[2]


def version_of(package: str) -> str | None:
    """Of a package as `Client.packages` names it; None where it is not installed."""
    name = package.removeprefix("npm:")
    if package != name:
        stated = node_modules() / name / "package.json"
        if not stated.is_file():
            return None
        found: str = json.loads(stated.read_text())["version"]
        return found
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None


def versions_of(client: Client) -> str:
    """Of the packages that are installed, `name version, …`."""
    found = {package.removeprefix("npm:"): version_of(package) for package in client.packages}
    return ", ".join(f"{name} {of}" for name, of in found.items() if of is not None)


@dataclass(frozen=True)
class Asked:
    """One client in one way, and where it is found."""

    client: Client
    way: Way
    module: str
    number: int

    @property
    def place(self) -> list[str | int]:
        """For `asking.py`: module, number of the client in it, number of the way."""
        return [self.module, self.number, self.client.ways.index(self.way)]

    def cell(self, word: str, why: str = "", **distances: Any) -> Cell:
        """What became of it."""
        named = self.client.name, self.way.carrier, self.way.dtype
        return Cell(*named, word, why=why, versions=versions_of(self.client), **distances)


def ask(
    world: ClientWorld, names: Iterable[str] = (), *, slowly: bool, together: bool = False
) -> Iterator[Cell]:
    """The cells of some clients.

    Args:
        world: what they are given.
        names: of the clients; all when empty.
        slowly: whether ways that take long are tried too.
        together: whether clients share a process, which is quicker; else each has its own.
    """
    table, processes = clients(), dict[Any, list[Asked]]()
    for name in names or table:
        client, module, number = table[name]
        ways = [Asked(client, way, module, number) for way in client.ways if slowly or not way.slow]
        if client.say is None:
            yield from (of.cell(NOT_RUN, client.why) for of in ways)
            continue
        process = client.knows_bakeout if together else name
        there = [of for of in ways if of.way.carrier in world.folders]
        processes.setdefault(process, []).extend(there)
    for asked in processes.values():
        with TemporaryDirectory() as scratch:
            for one, answer in zip(asked, _answers(world, asked, Path(scratch)), strict=True):
                yield _judged(world, one, answer)


def _judged(world: ClientWorld, asked: Asked, answer: dict[str, Any]) -> Cell:
    if "not_here" in answer:
        return asked.cell(NOT_RUN, answer["not_here"])
    if "refuses" in answer:
        return asked.cell(REFUSES, answer["refuses"])
    found = world.judged(answer["said"], answer["own"])
    return asked.cell(found.pop("word"), **found)


def _answers(world: ClientWorld, asked: Sequence[Asked], scratch: Path) -> Iterator[dict[str, Any]]:
    """What processes say, in the order of what is asked: a new one goes on where one died."""
    request = {
        "ways": [of.place for of in asked],
        "folders": {name: str(path.resolve()) for name, path in world.folders.items()},
        "prompts": world.prompts,
        "places": world.places,
        "knows_bakeout": any(of.client.knows_bakeout for of in asked),
    }
    (scratch / "request.json").write_text(json.dumps(request))
    done = 0
    while done < len(asked):
        process = subprocess.run(
            [sys.executable, "-m", "tests.clients.asking", str(scratch), str(done)],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                "HF_HUB_OFFLINE": "1",
            },
            capture_output=True,
            check=False,
        )
        while done < len(asked) and (scratch / f"{done}.json").is_file():
            yield _answer(scratch, done)
            done += 1
        if done < len(asked):
            yield {"refuses": f"its process ended with {process.returncode}"}
            done += 1


def _answer(scratch: Path, number: int) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((scratch / f"{number}.json").read_text())
    if answer:
        return answer
    with np.load(scratch / f"{number}.npz") as found:
        n = sum(name.startswith("logits_") for name in found)
        own = [found[f"ids_{i}"].tolist() if f"ids_{i}" in found else None for i in range(n)]
        return {"said": [found[f"logits_{i}"] for i in range(n)], "own": own}
