"""`docs/clients.md`, from the cells that were measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bake.rounding import BASE_LIKE, LOUD, REFUSES, ROUNDS, SAME
from tests.clients.cells import NOT_RUN, Cell
from tests.clients.client_table import clients

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"
MEASURED = Path(__file__).parent / "measured.json"
_HEAD = f"""\
# Clients

Which programs run which folder, and what becomes of the clamp in each. Written by `python -m
tests.clients --write`, from `tests/clients/measured.json`; do not edit it.

Every client is given a folder in a process that cannot import bakeout (some can, by name), shown
prompts on which the clamp fires, and compared from the first firing on: mean KL in nats per token
to the hooked reference in float32, and to the base. Cells say:

| word | what |
|---|---|
| exact | within 1e-5 nats per token of the hook ({SAME}, as `verify --only loads` has it) |
| {ROUNDS} | nearer the hook than the base, or with half of the clamp's effect and more |
| {LOUD} | something is not finite, or it is a nat and more from hook and base: noise |
| {REFUSES} | it does not load or run; in the client's own words |
| {NOT_RUN} | and why |

*{BASE_LIKE}*, nearer the base than the hook, fails the run that writes this page.
"""


def read() -> list[dict[str, Any]]:
    """Worlds with their cells, as they were measured last."""
    found: list[dict[str, Any]] = json.loads(MEASURED.read_text())
    return found


def merged(
    worlds: list[dict[str, Any]], name: str, hooks: dict[str, Any], cells: Sequence[Cell]
) -> list[dict[str, Any]]:
    """The worlds with one's cells measured anew.

    What is not installed this time keeps what was measured before.
    """
    world = next((of for of in worlds if of["world"] == name), None)
    if world is None:
        world = {"world": name, "hooks": {}, "cells": []}
        worlds = [*worlds, world]
    old = {cell.key: cell for cell in cells_of(world)}
    new = {cell.key: cell for cell in cells}
    kept = {
        key: old[key] if cell.word == NOT_RUN and key in old else cell for key, cell in new.items()
    }
    world["hooks"] |= hooks
    world["cells"] = [_plain(cell) for cell in (old | kept).values()]
    return worlds


def cells_of(world: dict[str, Any]) -> list[Cell]:
    """A world's cells."""
    return [Cell(**cell) for cell in world["cells"]]


def write(worlds: list[dict[str, Any]]) -> None:
    """Keep what was measured in ways that there still are, and write the page."""
    table = clients()
    for world in worlds:
        world["cells"] = [
            _plain(cell)
            for cell in cells_of(world)
            if cell.client in table
            and (cell.carrier, cell.dtype)
            in {(way.carrier, way.dtype) for way in table[cell.client][0].ways}
        ]
    MEASURED.write_text(json.dumps(worlds, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(worlds), encoding="utf-8")


def _plain(cell: Cell) -> dict[str, Any]:
    """For JSON: two digits of a distance say all that another machine would see again."""
    plain = {name: value for name, value in asdict(cell).items() if value not in (None, "")}
    return {
        name: float(f"{value:.1e}") if isinstance(value, float) else value
        for name, value in plain.items()
    }


def page(worlds: Iterable[dict[str, Any]]) -> str:
    """The whole page."""
    return "\n".join([_HEAD, *(_world(of) for of in worlds)])


def _world(world: dict[str, Any]) -> str:
    name = world["world"]
    lines = [f"## {name[0].upper()}{name[1:]}\n"]
    hooks = [
        f"{dtype} {_number(found['kl_to_hook'])} (to the base {_number(found['kl_to_base'])})"
        for dtype, found in world["hooks"].items()
    ]
    if hooks:
        lines.append(f"The hook itself, against itself in float32: {'; '.join(hooks)}.\n")
    lines += ["| client | carrier | as | what becomes of it | KL to hook | to base |"]
    lines += ["|---|---|---|---|---|---|"]
    notes = {name: client.note for name, (client, _, _) in clients().items()}
    by_client: dict[str, list[Cell]] = {}
    for cell in cells_of(world):
        by_client.setdefault(cell.client, []).append(cell)
    for name, cells in by_client.items():
        told = next((cell.versions for cell in cells if cell.versions), "")
        for n, group in enumerate(_groups(cells)):
            first = (f"**{name}** ({told})" if told else f"**{name}**") if n == 0 else ""
            if n == 0 and notes.get(name):
                first += f": {notes[name]}"
            lines.append(_row(first, group))
    return "\n".join([*lines, ""])


def _groups(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells of one carrier that say the same and measured nothing are one row."""
    groups: list[list[Cell]] = []
    for cell in cells:
        last = groups[-1][-1] if groups else None
        if (
            last is not None
            and cell.why
            and (cell.carrier, cell.word, cell.why) == (last.carrier, last.word, last.why)
        ):
            groups[-1].append(cell)
        else:
            groups.append([cell])
    return groups


def _row(first: str, group: Sequence[Cell]) -> str:
    cell = group[0]
    word = "exact" if cell.word == SAME else cell.word
    if cell.why:
        word = f"{word}: {_escaped(cell.why)}"
    dtypes = "; ".join(of.dtype for of in group)
    far = ("", "")
    if cell.word in (SAME, ROUNDS, LOUD, BASE_LIKE):
        far = (_number(cell.kl_to_hook), _number(cell.kl_to_base))
    return f"| {first} | {cell.carrier} | {dtypes} | {word} | {far[0]} | {far[1]} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"
