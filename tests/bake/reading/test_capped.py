"""Files read whole: regular, of their kind's size, strict JSON and TOML."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bake.reading.capped import (
    CAPS,
    UnreadableError,
    cap_of,
    open_regular,
    parse_json,
    parse_toml,
    read_bytes,
    read_json,
    read_text,
    wrong_file,
)


def test_a_file_of_its_caps_size_is_read_and_one_byte_more_is_not(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    os.truncate(path.touch() or path, CAPS["recipe.toml"])
    assert len(read_bytes(path)) == cap_of(path)
    os.truncate(path, cap_of(path) + 1)
    with pytest.raises(UnreadableError, match=r"1,048,577 bytes; expected at most 1,048,576"):
        read_bytes(path)
    assert len(read_bytes(path, 1 << 21)) == cap_of(path) + 1


def test_a_file_that_states_no_size_is_read_to_its_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc says 0 of files that have bytes, as a file that grows says less than it will have."""
    path = Path("/proc/self/status")
    if not path.exists():
        pytest.skip("no /proc")
    assert b"Name" in read_bytes(path, 1 << 20)
    with pytest.raises(UnreadableError, match="more than 10 bytes"):
        read_bytes(path, 10)


def test_pipes_devices_and_folders_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(UnreadableError, match="folder"):
            open_regular(path)
    for name in ("a\0b", "\ud800"):
        with pytest.raises(UnreadableError, match="name is none that a file can have"):
            open_regular(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "absent")


def test_wrong_files_of_a_folder_are_named(tmp_path: Path) -> None:
    assert wrong_file(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    assert wrong_file(tmp_path) is None
    (tmp_path / "tokenizer.json").touch()
    os.truncate(tmp_path / "tokenizer.json", CAPS["tokenizer.json"] + 1)
    assert str(wrong_file(tmp_path)).startswith("tokenizer.json has 100,663,297 bytes")
    (tmp_path / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "chat_template.jinja")
    assert "chat_template.jinja is a folder, pipe" in str(wrong_file(tmp_path))


@pytest.mark.parametrize(
    "data", [{}, [], 1, None, "é🔥", [1.5, -0.0, 10**38], {"a": [{"b": None}]}, 10**30]
)
def test_json_is_what_it_was(data: Any, tmp_path: Path) -> None:
    assert parse_json(json.dumps(data)) == parse_json(json.dumps(data).encode()) == data
    (tmp_path / "x.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    assert read_json(tmp_path / "x.json") == data


STRICT = [
    ('{"a": 1, "b": {"a": 1, "a": 1}}', "says 'a' twice"),
    ("[NaN]", "holds NaN"),
    ("[-Infinity]", "holds -Infinity"),
    ("[1e999]", "holds 1e999"),
    ("1" * 40, "more than 128 bits"),
    ('"\\ud800"', "half of a surrogate pair"),
    ('{"\\u0000": 1}', "holds a NUL"),
]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        *STRICT,
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("{'a': 1}", "is no JSON"),
        ("1" * 6000, "more than 128 bits"),
        ("[" * 100_000, "nested too deep"),
        ("[" * 70 + "]" * 70, "nested deeper than 64"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested deeper than 64"),
        ("[" + "[]," * (1 << 20) + "[]]", "more than 1,048,576 lists"),
    ],
)
def test_json_that_is_none_or_leads_to_trouble(text: str, match: str) -> None:
    with pytest.raises(UnreadableError, match=match):
        parse_json(text)


def test_rows_of_data_may_hold_what_nobody_reads() -> None:
    for text, _ in STRICT:
        assert parse_json(text, of_data=True) is not None
    with pytest.raises(UnreadableError, match="nested"):
        parse_json("[" * 100 + "]" * 100, of_data=True)


@pytest.mark.parametrize("data", [b"\xff\xfe{\0}\0", b"\xff", "ä".encode("latin-1")])
def test_what_is_no_utf8_is_no_text(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "NOTICE").write_bytes(data)
    for read in (parse_json, parse_toml):
        with pytest.raises(UnreadableError, match="no UTF-8"):
            read(data)
    with pytest.raises(UnreadableError, match="no UTF-8"):
        read_text(tmp_path / "NOTICE")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a = ", "Invalid value"),
        ("a = " + "[" * 100_000, "nested too deep"),
        ("a = " + "[" * 70 + "]" * 70, "nested deeper"),
        ("a." * 500_000 + "b = 1", "key of more than 16 parts"),
        ("[" + '"a".' * 20 + "b]", "key of more than 16 parts"),
        ("a = " + "9" * 6000, "limit"),
        ("a = 18446744073709551616", "more than 64 bits"),
        ('a = "\\u0000"', "holds a NUL"),
        ('"\\u0000" = 1', "holds a NUL"),
        ("a = 1\na = 2", "overwrite"),
    ],
)
def test_toml_that_is_none_or_leads_to_trouble(text: str, match: str) -> None:
    with pytest.raises(UnreadableError, match=match):
        parse_toml(text)


def test_toml_is_what_it_was() -> None:
    text = 'a.b.c = 1\n[d]\ne = [[1, 2.5], ["é. f. g."]]\nf = "www.example.org/a.b.c"\n'
    assert parse_toml(text)["d"]["e"] == [[1, 2.5], ["é. f. g."]]
    assert parse_toml(text)["a"] == {"b": {"c": 1}}
