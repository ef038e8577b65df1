"""The client matrix: ask every client that is installed, and say or write what became of the clamp.

    python -m tests.clients [--write] [--runs DIR] [CLIENT …]

Without `--runs` on the miniature; with it on what `make gemma` left there. Exit code 1 where a
client silently runs the base.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from bake.rounding import BASE_LIKE
from tests.clients.cells import Cell
from tests.clients.client_table import clients
from tests.clients.client_world import build, of_runs
from tests.clients.clients_page import merged, read, write
from tests.clients.matrix import ask
from tests.clients.other_clients.llama_cpp_client import CLIENT as LLAMA_CPP


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("--write", action="store_true", help="measured.json and docs/clients.md")
    parser.add_argument("--runs", type=Path, help="a folder that `make gemma` filled")
    parser.add_argument("--quick", action="store_true", help="leave out what takes long")
    parser.add_argument("client", nargs="*", help=f"default: all of {', '.join(clients())}")
    asked = parser.parse_args()
    if unknown := set(asked.client) - set(clients()):
        parser.error(
            f"client {', '.join(sorted(unknown))}: expected some of {', '.join(clients())}"
        )
    base_like = False
    with TemporaryDirectory() as scratch:
        gguf = not asked.client or LLAMA_CPP.name in asked.client
        world = of_runs(asked.runs, gguf=gguf) if asked.runs else build(Path(scratch))
        start = time.monotonic()
        if asked.write:
            hooks = {dtype: world.hook_in(dtype) for dtype in ("bfloat16", "float16")}
        for name in asked.client or clients():
            cells = []
            for cell in ask(world, [name], slowly=not asked.quick):
                cells.append(cell)
                print(f"{time.monotonic() - start:6.1f} s  {said(cell)}", flush=True)
            base_like |= any(cell.word == BASE_LIKE for cell in cells)
            if asked.write:  # client by client: some take long
                write(merged(read(), world.name, hooks, cells))
    return int(base_like)


def said(cell: Cell) -> str:
    """A cell in a line."""
    far = f"{cell.kl_to_hook} to the hook, {cell.kl_to_base} to the base"
    return " | ".join([*cell.key, cell.word, cell.why or far])


if __name__ == "__main__":
    sys.exit(main())
