"""Asks clients, and judges what they say: cells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
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


def ask(world: ClientWorld, names: Iterable[str] = (), *, slowly: bool) -> Iterator[Cell]:
    """The cells of some clients.

    Args:
        world: what they are given.
        names: of the clients; all when empty.
        slowly: whether ways that take long are tried too.
    """
    table = clients()
    for name in names or table:
        client, module, number = table[name]
        ways = [way for way in client.ways if slowly or not way.slow]
        yield from _cells(world, client, module, number, ways)


def _cells(
    world: ClientWorld, client: Client, module: str, number: int, ways: Sequence[Way]
) -> Iterator[Cell]:
    told = versions_of(client)

    def cell(way: Way, word: str, why: str = "", **distances: Any) -> Cell:
        return Cell(client.name, way.carrier, way.dtype, word, why=why, versions=told, **distances)

    if client.say is None:
        yield from (cell(way, NOT_RUN, client.why) for way in ways)
        return
    there = [way for way in ways if way.carrier in world.folders]
    with TemporaryDirectory() as scratch:
        answered = _answers(world, client, module, number, there, Path(scratch))
        for way, answer in zip(there, answered, strict=True):
            if "not_here" in answer:
                yield cell(way, NOT_RUN, answer["not_here"])
            elif "refuses" in answer:
                yield cell(way, REFUSES, answer["refuses"])
            else:
                found = world.judged(answer["said"], answer["own"])
                yield cell(way, found.pop("word"), **found)


def _answers(
    world: ClientWorld,
    client: Client,
    module: str,
    number: int,
    ways: Sequence[Way],
    scratch: Path,
) -> Iterator[dict[str, Any]]:
    """What a client's processes say, in the order of the ways: a new one goes on where one died."""
    left = [client.ways.index(way) for way in ways]
    while left:
        request = {
            "ways": left,
            "folders": {name: str(path.resolve()) for name, path in world.folders.items()},
            "prompts": world.prompts,
            "places": world.places,
            "knows_bakeout": client.knows_bakeout,
        }
        (scratch / "request.json").write_text(json.dumps(request))
        command = [sys.executable, "-m", "tests.clients.asking", module, str(number), str(scratch)]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        while left and (scratch / f"{left[0]}.json").is_file():
            yield _answer(scratch, left.pop(0))
        if left:
            lines = done.stderr.strip().splitlines() or [""]
            last = lines[-1] if done.returncode > 0 else f"its process died ({done.returncode})"
            yield {"refuses": last}
            left.pop(0)


def _answer(scratch: Path, index: int) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((scratch / f"{index}.json").read_text())
    if answer:
        return answer
    with np.load(scratch / f"{index}.npz") as found:
        n = sum(name.startswith("logits_") for name in found)
        own = [found[f"ids_{i}"].tolist() if f"ids_{i}" in found else None for i in range(n)]
        return {"said": [found[f"logits_{i}"] for i in range(n)], "own": own}
