"""`bakeout chat`: prompts in, answers out as they are made; base and clamped side by side."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bake.errors import DataError
from bakeout.terminal import console, printable
from bakeout.verbs.arguments import Device, DType, FolderPath
from bakeout.verbs.streaming import Language, Manner, Speaker, open_base, open_speaker

QUIT = "/quit"
HINT = f"One prompt a line. Ctrl-C stops an answer, Ctrl-D or {QUIT} ends."


def run_chat(
    folder: Path,
    *,
    engine: str,
    beside: str | None,
    device: str,
    dtype: str | None,
    manner: Manner,
) -> None:
    """Answer prompts from stdin until it ends.

    Args:
        folder: a clamped folder.
        engine: torch or onnx.
        beside: a model that answers too, by folder or hub id.
        device: cpu or cuda.
        dtype: in which torch runs them; as they are stored by default.
        manner: how answers are made.

    Raises:
        BakeoutError: something cannot be loaded; or a prompt that was piped in cannot be answered.
    """
    speakers = {f"clamped: {folder.resolve().name}": open_speaker(folder, engine, device, dtype)}
    language = Language(folder)
    if beside is not None:
        base = open_base(beside, device, language, dtype)
        speakers = {f"base: {Path(beside).name or beside}": base, **speakers}
    typed = sys.stdin.isatty()
    if typed:
        console().print(HINT, style="dim")
    with _terminable():
        for number, prompt in enumerate(prompts(typed)):
            try:
                answer(prompt, speakers, language, manner, seed=number)
            except DataError as error:
                if not typed:
                    raise
                print(f"error: {error}", file=sys.stderr)


def prompts(typed: bool) -> Iterator[str]:
    """Lines of stdin that are not blank, until it ends or one says /quit."""
    shown = sys.stdout.isatty()
    if typed:
        with suppress(ImportError):
            import readline  # noqa: F401  (lines that can be edited, and fetched again)
    while True:
        try:
            line = input("> " if typed and shown else "").strip()
            line.encode()  # bytes that were no text come as lone surrogates
        except EOFError:
            if typed:
                print()
            return
        except UnicodeError as error:
            raise DataError(f"a prompt is not UTF-8 ({error}); send text") from error
        except KeyboardInterrupt:
            if not typed:
                raise
            print(f"\n{HINT}")
            continue
        if line == QUIT:
            return
        if line:
            if shown and not typed:
                print(f"> {printable(line)}")
            yield line


def answer(
    prompt: str, speakers: dict[str, Speaker], language: Language, manner: Manner, *, seed: int
) -> None:
    """Stream the answers to one prompt; Ctrl-C stops them.

    Raises:
        DataError: the prompt is longer than what the model can read.
    """
    ids = language.prompt_ids(prompt)
    room = language.context - len(ids)
    if room < 1:
        raise DataError(
            f"the prompt has {len(ids)} tokens; the model reads {language.context} with its "
            "answer. Make it shorter"
        )
    manner = replace(manner, max_new_tokens=min(manner.max_new_tokens, room))
    answers = {
        name: language.pieces(speaker.tokens(ids, manner, seed))
        for name, speaker in speakers.items()
    }
    try:
        if len(answers) == 1:
            show_one(*answers.values())
        elif sys.stdout.isatty():
            show_columns(answers)
        else:
            for name, pieces in answers.items():
                print(f"[{printable(name)}]")
                show_one(pieces)
    except KeyboardInterrupt:
        print("\n(stopped)\n")


def show_one(pieces: Iterator[str]) -> None:
    """An answer as it comes, and an empty line."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print("\n")


def show_columns(answers: dict[str, Iterator[str]]) -> None:
    """Two answers side by side, a token of each in turn."""
    texts = dict.fromkeys(answers, "")
    going = dict(answers)
    with Live(console=console(), auto_refresh=False) as live:
        while going:
            for name in list(going):
                piece = next(going[name], None)
                if piece is None:
                    del going[name]
                else:
                    texts[name] += piece
                live.update(_columns(texts), refresh=True)
    print()


def _columns(texts: dict[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2), expand=True)
    for name in texts:
        table.add_column(escape(printable(name)), ratio=1, overflow="fold")
    table.add_row(*(Text(text) for text in texts.values()))
    return table


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the program here, where Ctrl-C does not."""

    def end(*_: object) -> None:
        raise typer.Abort

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def chat(
    folder: FolderPath,
    engine: Annotated[
        str,
        typer.Option(help="torch, or onnx: the folder's model.onnx, else its smallest graph."),
    ] = "torch",
    beside: Annotated[
        str | None,
        typer.Option(
            metavar="BASE", help="Let this model answer too: a folder or hub id, run in torch."
        ),
    ] = None,
    device: Device = "cpu",
    dtype: DType = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Sample, with the same draws in every run. Default: the likeliest token.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Type a prompt, see the answer as it comes. Each prompt stands alone: nothing is remembered.

    Ctrl-C stops an answer, Ctrl-D or /quit ends. Prompts may be piped in, one a line. Files
    that are not as the folder's manifest lists them are refused; whether they are what was baked is
    for `bakeout verify` to say.
    """
    manner = Manner(max_new_tokens, temperature)
    run_chat(folder, engine=engine, beside=beside, device=device, dtype=dtype, manner=manner)
