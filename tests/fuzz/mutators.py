"""What becomes of a good file in a stranger's hands: bytes, values, arrays, drawn from a seed."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import tomli_w

Mutator = Callable[[random.Random, bytes], bytes]
"""A good file → another one."""

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 64, 10**6, 2**31, 2**63, 2**64, -(2**63), 10**30),
    *(0.0, -0.0, 0.5, -1.0, 1e-320, 3.5e38, 1e300, float("nan"), float("inf"), -float("inf")),
    *(
        "",
        " ",
        "no",
        "true",
        "0",
        "-1",
        "1e5",
        "a" * 500,
        "\0",
        "\u202e",
        "é",
        "🔥",
        "\n",
        "\x1b[31m",
    ),
    *("../x", "/etc/passwd", "a/../../b", "C:\\x", "~", "file:///x", ".", "..", "\ud800", "\udfff"),
    *("blocks.1.hook_resid_post", "blocks.99999.hook_resid_post", "layers.0", "bfloat16", "gemma"),
    *("model.safetensors", "{{ 7*7 }}", "<script>", "[link](x)", "%s%n", "select", "layer"),
    *([], {}, [[]], [None], [1, 2, 3], ["a"], {"a": 1}, {"": None}, [[[[[]]]]], [1, "a", None]),
)
_BYTES = (
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"{",
    b"[",
    b'"',
    b"\\u0000",
    b"\n",
    b"-",
)


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four changes of bytes."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        length = min(rng.choice((1, 1, 2, 4, 8, 64, 1024)), len(out) - at)
        match rng.randrange(8):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(out):
                out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                del out[at : at + length]
            case 3:
                out[at:at] = out[at : at + length]
            case 4:
                out[at:at] = rng.choice(_BYTES) * rng.choice((1, 1, 3, 200))
            case 5:
                del out[at:]
            case 6 if length:
                other = rng.randrange(len(out) - length + 1)
                out[at : at + length] = out[other : other + length]
            case 7 if len(out) - at >= 8:
                number = rng.choice((0, 1, -1, 2**31 - 1, 2**32 - 1, 2**62, -(2**63), 10**12))
                struct.pack_into("<q", out, at, number - (number >= 2**63) * 2**64)
    return bytes(out)


def _places(data: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(container, key) of every value."""
    entries = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in list(entries):
        found.append((data, key))
        if isinstance(value, dict | list):
            _places(value, found)
    return found


def _changed(rng: random.Random, data: Any) -> Any:
    """Data with one to three values changed, keys taken out or put in."""
    data = copy.deepcopy(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(data, []) if isinstance(data, dict | list) else []
        if not places or rng.random() < 0.01:
            return copy.deepcopy(rng.choice(ODD))
        where, key = rng.choice(places)
        match rng.randrange(8):
            case 0:
                del where[key]
            case 1 if isinstance(where, dict):
                where[rng.choice(("", "x", "\0", "é", f"{key}2", "a" * 300))] = where.pop(key)
            case 2:
                where[key] = [where[key]]
            case 3:
                other, name = rng.choice(places)
                if isinstance(other, dict) and name in other:
                    where[key] = copy.deepcopy(other[name])
            case 4 if isinstance(where, list):
                where += copy.deepcopy(where[:200])
            case 5:
                nested: Any = 1
                for _ in range(rng.choice((3, 30, 70, 900))):
                    nested = [nested] if rng.random() < 0.5 else {"a": nested}
                where[key] = nested
            case _:
                where[key] = copy.deepcopy(rng.choice(ODD))
    return data


def _encoded(rng: random.Random, text: str) -> bytes:
    kind = rng.randrange(60)
    if kind == 0:
        return text.encode("utf-16", "surrogatepass")
    if kind == 1:
        return text.encode("utf-8-sig", "surrogatepass")
    if kind == 2:
        return text.encode("utf-32", "surrogatepass")
    return text.encode("utf-8", "surrogatepass")


def mutated_json(rng: random.Random, data: bytes) -> bytes:
    """Another JSON file: values of other types, keys twice, numbers that are none, deep nests."""
    if rng.random() < 0.2:
        return mutated_bytes(rng, data)
    try:
        text = json.dumps(_changed(rng, json.loads(data)), ensure_ascii=rng.random() < 0.5)
    except RecursionError:
        text = "[" * 5000
    if rng.random() < 0.03:
        text = text.replace("{", '{"schema": 1, "schema": 1,', 1)
    if rng.random() < 0.03:
        text = text.replace("1", "9" * rng.choice((25, 50, 5000)), 1)
    return _encoded(rng, text)


def mutated_lines(rng: random.Random, data: bytes) -> bytes:
    """JSON lines of which one is another."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = mutated_json(rng, lines[at])
    return b"\n".join(lines)


def mutated_toml(rng: random.Random, data: bytes) -> bytes:
    """Another TOML file."""
    import tomllib

    if rng.random() < 0.25:
        return mutated_bytes(rng, data)
    try:
        return _encoded(rng, tomli_w.dumps(_changed(rng, tomllib.loads(data.decode()))))
    except (TypeError, AttributeError, ValueError, RecursionError):  # what TOML cannot say
        return mutated_bytes(rng, data)


def mutated_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Another header over the same numbers, or other bytes."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.3:
        return mutated_bytes(rng, data)
    if rng.random() < 0.2:
        tail = bytearray(data[8 + size :])
        for _ in range(20):
            at = 4 * rng.randrange(len(tail) // 4)
            tail[at : at + 4] = struct.pack("<f", rng.choice((1e38, -3e38, float("nan"), 1e-44)))
        return data[: 8 + size] + bytes(tail)
    header = mutated_json(rng, data[8 : 8 + size])
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


_DTYPES = ("f2", "f4", "f8", ">f4", "u2", "i8", "c8", "c16", "?", "S3", "U2", "V2", "M8[s]", "g")


def mutated_npz(rng: random.Random, data: bytes) -> bytes:
    """Another npz: other dtypes, shapes, values, members, or bytes."""
    if rng.random() < 0.4:
        return mutated_bytes(rng, data)
    with np.load(io.BytesIO(data)) as opened:
        arrays = dict(opened)
    name = rng.choice(sorted(arrays))
    array = arrays[name]
    match rng.randrange(8):
        case 0 | 1:
            dtype = rng.choice(_DTYPES)
            with np.errstate(all="ignore"):
                kind = np.dtype(dtype)
                arrays[name] = (
                    array.astype(kind) if kind.kind in "fuicb" else np.zeros(array.shape, kind)
                )
        case 2:
            shape = list(array.shape) or [1]
            shape[rng.randrange(len(shape))] = rng.choice((0, 1, 2, 65))
            arrays[name] = np.resize(array, shape)
        case 3:
            arrays[name] = np.asfortranarray(array) if rng.random() < 0.5 else array[..., None]
        case 4:
            del arrays[name]
        case 5:
            arrays[rng.choice(("x", "../x", "a/b", "W_enc2", "é"))] = array
        case 6:
            flat = array.reshape(-1).copy()
            if flat.size:
                with np.errstate(all="ignore"):
                    flat[rng.randrange(flat.size)] = rng.choice((1, -1, 100, 127))
            arrays[name] = flat.reshape(array.shape)
        case 7:
            arrays[name] = array * 0
    out = io.BytesIO()
    (np.savez_compressed if rng.random() < 0.3 else np.savez)(out, **arrays)
    if rng.random() < 0.1:
        with zipfile.ZipFile(out, "a") as archive:
            archive.writestr(rng.choice(("note.txt", "x.npy", "W_enc.npy")), b"\x93NUMPY\x01\0v\0{")
    return out.getvalue()
