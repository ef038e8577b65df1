"""Every error of bake, export and verify: its list, and that each says what to do about what."""

from __future__ import annotations

import ast
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bakeout.cli import run
from tests.folders import baked_world
from tests.reports import error_line

ROOT = Path(__file__).parents[2]
BUILTIN = {
    *("ValueError", "TypeError", "KeyError", "OSError", "EOFError", "RuntimeError"),
    *("AttributeError", "ImportError", "NotImplementedError", "ValidationError"),
    "UnreadableError",
}
"""Of Python, pydantic and `bake.reading`; a user meets them as the reason within one of ours."""
HELPERS = ("_not_a_token", "_none_passes", "one_line", "refuse(", "error}")
"""What makes or passes on a whole message: it is checked where it is made, or by its tests."""
REMEDY = re.compile(
    r"\bexpected\b|[;.:)] `?(accept|add|ask|bake|check|choose|compile|convert|copy|correct|"
    r"do not|download|export|free|give|join|load|log|look|lower|merge|move|multiply|name|pass|"
    r"pip|please report|put|raise it|remove|rename|save|select|set|take|update|use|write)\b"
    r"|[;.] \{(AGAIN|_AGAIN|remedy)",
    re.IGNORECASE,
)
"""What was expected, or what to do."""


def text_of(node: ast.expr) -> str:
    """A message with its fields in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return f"{{{ast.unparse(node.value if isinstance(node, ast.FormattedValue) else node)}}}"


def messages() -> Iterator[tuple[str, str]]:
    for room in ("bake", "export", "verify"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
                if not named or not node.args or not node.func.id.endswith("Error"):
                    continue
                if node.func.id not in BUILTIN:
                    where = f"{path.relative_to(ROOT)}:{node.lineno} {node.func.id}"
                    yield where, text_of(node.args[0])


def test_every_message_names_what_came_and_what_to_do() -> None:
    found = list(messages())
    for where, message in found:
        print(f"{where}\n    {message}")
    assert len(found) > 200
    unclear = [
        f"{where}: {message}"
        for where, message in found
        if not REMEDY.search(message) and not any(helper in message for helper in HELPERS)
    ]
    assert unclear == []
    nameless = [
        f"{where}: {message}"
        for where, message in found
        if not ("{" in message or ":" in message or "`" in message or ";" in message)
    ]
    assert nameless == []
    assert not [where for where, message in found if "\n" in message or "temporary" in message]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return baked_world(tmp_path_factory.mktemp("messages"), [1, 5, 9])


@pytest.mark.parametrize(
    ("verb", "file", "change"),
    [
        ("bake recipe.toml --out new", "base/config.json", lambda c: {**c, "model_type": "llama"}),
        ("bake recipe.toml --out new", "base/config.json", lambda c: {**c, "hidden_size": 7}),
        ("bake recipe.toml --out new", "base/config.json", lambda c: {**c, "num_hidden_layers": 9}),
        ("bake recipe.toml --out new", "base/config.json", lambda c: {**c, "head_dim": 5}),
        ("bake recipe.toml --out new", "base/config.json", lambda _: []),
        ("bake recipe.toml --out new", "sae/cfg.json", lambda c: {**c, "d_sae": 3}),
        ("export onnx checkpoint", "checkpoint/config.json", lambda c: {**c, "sae_clamp": None}),
        ("export compiled checkpoint --out new", "checkpoint/manifest.json", lambda _: {}),
        ("export adapter checkpoint --out new", "checkpoint/config.json", lambda _: 1),
        ("verify checkpoint --only integrity", "checkpoint/manifest.json", lambda _: {"files": 3}),
        ("verify checkpoint --recipe none.toml", "base/config.json", lambda c: c),
        ("verify none", "base/config.json", lambda c: c),
    ],
)
def test_an_error_is_one_line_and_names_no_temporary_path(
    world: Path,
    verb: str,
    file: str,
    change: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(world)
    path = world / file
    before = path.read_text()
    path.write_text(json.dumps(change(json.loads(before))))  # type: ignore[operator]
    capsys.readouterr()
    try:
        assert run(verb.split()) == 2
    finally:
        path.write_text(before)
    said = error_line(capsys)
    assert REMEDY.search(said), said
    assert ".bakeout-" not in said and "bakeout-" not in said.replace("--", "")
    temporary = tempfile.gettempdir()
    assert temporary not in said.replace(str(world), "")
    assert not (world / "new").exists()
