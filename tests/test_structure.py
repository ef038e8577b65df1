"""The arrows between the packages, and what importing them costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"bake", "export", "verify", "model_cards", "bakeout"}
MAY_IMPORT = {
    "bake": {"bake"},
    "export": {"bake", "export"},
    "verify": {"bake", "export", "verify"},
    "model_cards": {"bake", "export", "verify", "model_cards"},
    "bakeout": ROOMS,
}
ARITHMETIC = {"bake.modeling_clamped_gemma", "bake.clamp", "bake.insert", "bake.sae", "bake.arrays"}
"""What the oracle must not share with what it checks."""


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
    return found


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_rooms_import_in_one_direction(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        used = {name.split(".")[0] for name in imports(path)} & ROOMS
        assert used <= MAY_IMPORT[room], f"{path.name} imports {used - MAY_IMPORT[room]}"


def test_the_oracle_stays_apart() -> None:
    for path in (ROOT / "verify").rglob("*.py"):
        assert not imports(path) & ARITHMETIC, path.name


def test_only_one_file_of_bake_imports_sae_lens() -> None:
    users = {
        path.name
        for path in (ROOT / "bake").rglob("*.py")
        if any(name.split(".")[0] == "sae_lens" for name in imports(path))
    }
    assert users == {"sae.py"}


@pytest.mark.parametrize(
    "statement",
    ["import bakeout", "import bakeout.cli", "import bake", "import export", "import verify"],
)
def test_importing_loads_nothing_heavy_and_prints_nothing(statement: str) -> None:
    code = (
        f"import sys; {statement}; "
        "heavy = {'torch', 'transformers', 'sae_lens', 'onnxruntime', 'datasets', 'peft'}; "
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "first",
    ["from transformers import AutoConfig", "from transformers import AutoModelForCausalLM"],
)
@pytest.mark.parametrize("before", [True, False])
def test_importing_bakeout_registers_with_the_auto_classes(first: str, before: bool) -> None:
    lines = ["import bakeout", first] if before else [first, "import bakeout"]
    code = "\n".join(
        [
            *lines,
            "from transformers import AutoConfig, AutoModelForCausalLM",
            "sites = {'schema': 1, 'sites': [], 'exempt_token_ids': []}",
            "for name in ('gemma', 'gemma2', 'gemma3_text', 'gemma3'):",
            "    config = AutoConfig.for_model(f'clamped_{name}', sae_clamp=sites)",
            "    assert type(config) in AutoModelForCausalLM._model_mapping, name",
        ]
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize(
    "first",
    [
        "import transformers.modeling_layers",
        "import transformers.modeling_utils",
        "from transformers import AutoTokenizer",
        "import peft",
        "import sae_lens",
        "import bake.modeling_clamped_gemma",
        "import bake.insert",
    ],
)
def test_registration_survives_any_order_of_imports(first: str) -> None:
    code = (
        f"import bakeout\n{first}\nfrom transformers import AutoConfig\n"
        "AutoConfig.for_model('clamped_gemma2', sae_clamp={'schema': 1})\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
