"""Small files, read whole: regular ones only, no larger than their kind, strict JSON and TOML.

Whoever names a file may have been given it by a stranger. Nothing here waits for a pipe, reads a
device, or takes more time or memory than a few times the cap.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
from pathlib import Path
from typing import IO, Any, NoReturn

from bake.errors import short
from bake.files.folder_files import open_in

KB, MB = 1 << 10, 1 << 20
CAPS: dict[str, int] = {
    "manifest.json": 16 * MB,
    "config.json": 4 * MB,
    "cfg.json": 4 * MB,
    "adapter_config.json": 4 * MB,
    "generation_config.json": 4 * MB,
    "model.safetensors.index.json": 16 * MB,
    "recipe.toml": 1 * MB,
    "report.json": 32 * MB,
    "tokenizer.json": 96 * MB,
    "tokenizer.model": 64 * MB,
    "tokenizer_config.json": 16 * MB,
    "special_tokens_map.json": 4 * MB,
    "added_tokens.json": 32 * MB,
    "chat_template.jinja": 1 * MB,
    "chat_template.json": 4 * MB,
    "processor_config.json": 4 * MB,
    "preprocessor_config.json": 4 * MB,
    "genai_config.json": 4 * MB,
    "witnesses.npz": 64 * MB,
    "README.md": 16 * MB,
    "NOTICE": 4 * MB,
    "LICENSE": 4 * MB,
}
"""Most bytes of a file, by its name. Gemma 3's tokenizer.json, of 262,144 tokens, has 33 MB, its
tokenizer_config.json 1.2 MB, its index 0.1 MB; a manifest of a thousand files 0.1 MB; a report of
10,000 questions some 10 MB; a recipe with 8,192 features 50 kB."""
ROW_BYTES = 16 * MB
"""Most bytes of one row of questions or texts."""
HEADER_BYTES = 16 * MB
"""Most bytes of a safetensors header: 100,000 tensors take some 12 MB."""
GRAPH_BYTES = 256 * MB
"""Most bytes of an ONNX graph without its weights: that of a Gemma 3 27B has some 2 MB."""
MOST_CONTAINERS = 1 << 20
"""Most lists and objects in a file: each takes some 60 bytes of memory, were it empty."""
DEEPEST = 64
"""Most levels of lists and tables in one another."""
_KEY_PARTS = 16
"""Most parts of a dotted TOML key; tomllib's time grows with their square."""
_DOTTED = re.compile(
    rf"""(?<![\w-])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){{{_KEY_PARTS}}}""", re.ASCII
)


class UnreadableError(ValueError):
    """A file that is not what its kind of file may be; whoever asked for it says which it is."""


def cap_of(path: Path) -> int:
    """Most bytes of a file, by its name; JSON of another name is taken for a config."""
    return CAPS.get(path.name, CAPS["config.json"])


def wrong_file(folder: Path) -> str | None:
    """Which file of a folder, of those that transformers reads whole, is no regular one or larger
    than its kind: what it is and what was expected; None where all are right.
    """
    for name in CAPS:
        path = folder / name
        try:
            with open_regular(path, cap_of(path)):
                pass
        except OSError:  # mostly not there
            continue
        except UnreadableError as error:
            return f"{name} {error}"
    return None


def open_regular(path: Path, most: int | None = None) -> IO[bytes]:
    """Open a regular file, never waiting for a writer at the other end of a pipe.

    Args:
        path: of the file; links are followed.
        most: bytes that it may have.

    Raises:
        OSError: it is not there, or may not be read.
        UnreadableError: it is a folder, pipe or device, larger, or its name none of a file.
    """
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except IsADirectoryError as error:
        raise UnreadableError("is a folder; expected a file") from error
    except ValueError as error:  # NUL, or half of a surrogate pair
        raise UnreadableError(f"its name is none that a file can have ({error})") from error
    try:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise UnreadableError("is a folder, pipe or device; expected a regular file")
        if most is not None and found.st_size > most:
            raise UnreadableError(
                f"has {found.st_size:,} bytes; expected at most {most:,} of such a file"
            )
    except BaseException:
        file.close()
        raise
    return file


def read_bytes(path: str | Path, most: int | None = None) -> bytes:
    """A small file's bytes.

    Args:
        path: of the file.
        most: bytes that it may have; by its name where None.

    Raises:
        OSError, UnreadableError: as `open_regular`.
    """
    path = Path(path)
    most = cap_of(path) if most is None else most
    with open_regular(path, most) as file:
        data = file.read(most + 1)
    if len(data) > most:  # it grew
        raise UnreadableError(f"has more than {most:,} bytes; expected no more of such a file")
    return data


def read_in(folder: Path, name: str) -> bytes:
    """A small file of a folder that somebody else may have made, by its name there.

    Raises:
        FolderError: the name leads elsewhere, or to no regular file of the folder.
        UnreadableError: it is larger than its kind.
    """
    most = cap_of(folder / name)
    with open_in(folder, name) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise UnreadableError(f"has more than {most:,} bytes; expected no more of such a file")
    return data


def read_text(path: str | Path, most: int | None = None) -> str:
    """A small file's text, which is UTF-8.

    Raises:
        OSError, UnreadableError: as `read_bytes`, or it is no UTF-8 text.
    """
    return _decoded(read_bytes(path, most))


def read_json(path: str | Path, most: int | None = None) -> Any:
    """What a small JSON file holds.

    Raises:
        OSError, UnreadableError: as `read_text`, or as `parse_json`.
    """
    return parse_json(read_bytes(path, most))


def parse_json(data: bytes | str, *, of_data: bool = False) -> Any:
    """JSON as its standard has it, for untrusted text.

    Args:
        data: UTF-8, or text.
        of_data: of rows of a data set, in fields that nobody reads there may be anything that
            Python's own reader takes: NaN, a key twice, half of a surrogate pair.

    Raises:
        UnreadableError: it is none, says a key twice (which parsers read differently), holds NaN,
            an infinity, a number beyond 128 bits, half of a surrogate pair, or is nested deeper
            than anything that bakeout reads.
    """
    text = data if isinstance(data, str) else _decoded(data)
    if text.count("[") + text.count("{") > MOST_CONTAINERS:
        raise UnreadableError(f"holds more than {MOST_CONTAINERS:,} lists and objects")
    strict: dict[str, Any] = {
        "object_pairs_hook": _once,
        "parse_constant": _no_constant,
        "parse_float": _finite,
        "parse_int": _whole,
    }
    try:
        found = json.loads(text, **({} if of_data else strict))
    except UnreadableError:
        raise
    except RecursionError as error:
        raise UnreadableError("is nested too deep") from error
    except ValueError as error:  # not JSON, or a whole number of thousands of digits
        raise UnreadableError(f"is no JSON: {_first_line(error)}") from error
    _check_depth(found)
    if "\\u" in text and not of_data:
        _check_values(found, whole=False)
    return found


def parse_toml(data: bytes | str) -> dict[str, Any]:
    """TOML from an untrusted text.

    Raises:
        UnreadableError: it is none, is nested too deep, or holds what no name or number may.
    """
    text = data if isinstance(data, str) else _decoded(data)
    if _DOTTED.search(text):
        raise UnreadableError(f"has a key of more than {_KEY_PARTS} parts")
    try:
        found = tomllib.loads(text)
    except RecursionError as error:
        raise UnreadableError("is nested too deep") from error
    except ValueError as error:
        raise UnreadableError(_first_line(error)) from error
    _check_depth(found)
    _check_values(found)
    return found


# --------------------------------------------------------------------------- what they hold


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"is no UTF-8 text ({error.reason} at byte {error.start})") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UnreadableError(f"says {short(repr(twice))} twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise UnreadableError(f"holds {name}, which is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number - number != 0:
        raise UnreadableError(f"holds {short(text)}, which is beyond any float64")
    return number


def _whole(text: str) -> int:
    """A whole number of at most 128 bits; transformers writes 10^30 for `no limit`."""
    if len(text) > 39:
        raise UnreadableError(f"holds {short(text)}, which has more than 128 bits")
    return int(text)


def _check_depth(data: Any) -> None:
    level, depth = [data], 0
    while level := [
        child
        for value in level
        if isinstance(value, dict | list)
        for child in (value.values() if isinstance(value, dict) else value)
        if isinstance(child, dict | list)
    ]:
        depth += 1
        if depth > DEEPEST:
            raise UnreadableError(f"is nested deeper than {DEEPEST} levels")


def _check_values(data: Any, *, whole: bool = True) -> None:
    """Refuse texts, keys among them, that lead to trouble further on, and `whole` numbers."""
    waiting = [data]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif whole and isinstance(value, int) and abs(value) >> 63:
            raise UnreadableError(f"holds {short(hex(value))}, which has more than 64 bits")
        elif isinstance(value, str):
            if "\0" in value:
                raise UnreadableError(f"holds a NUL in {short(ascii(value))}")
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise UnreadableError(
                    f"holds half of a surrogate pair in {short(ascii(value))}"
                ) from error


def _first_line(error: Exception) -> str:
    return short(next(iter(str(error).splitlines()), type(error).__name__))
