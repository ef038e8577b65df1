"""How the house is built: which rooms import which, how large they are, what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

from bake.methods import METHODS
from bakeout.cli import VERBS
from verify.reference.editing import EDITS

ROOT = Path(__file__).parents[1]
ROOMS = {"bake", "export", "verify", "model_cards", "bakeout"}
MAY_IMPORT = {
    "bake": {"bake"},
    "export": {"bake", "export"},
    "verify": {"bake", "export", "verify"},
    "model_cards": {"bake", "export", "verify", "model_cards"},
    "bakeout": ROOMS,
}
VERIFY_MAY_IMPORT = {
    "bake.base",
    "bake.errors",
    "bake.families",
    "bake.files",
    "bake.new_folder",
    "bake.public",
    "bake.questions",
    "bake.reading",
    "bake.recipe",
    "bake.rounding",
    "bake.sae.fit_figures",
    "bake.scale.crew",
    "bake.sources",
    "bake.stock",
    "bake.strangers",
    "export.carriers.carriers",
    "export.carriers.onnx.precisions",
    "export.carriers.onnx.regenerated",
    "export.clamped",
    "export.code_check",
    "export.folder_contents",
    "export.manifest",
    "export.signing",
    "export.witness_file",
}
"""Data, the loading of stock models, types and file formats: no arithmetic of the clamp."""
MOST_LINES, MOST_FILES = 350, 15


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
    return found


def modules(path: Path) -> set[str]:
    """The modules that a file imports; a name that it takes from one counts as the module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    return found | {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_rooms_import_in_one_direction(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        used = {name.split(".")[0] for name in imports(path)} & ROOMS
        assert used <= MAY_IMPORT[room], f"{path.name} imports {used - MAY_IMPORT[room]}"


def test_the_oracle_stays_apart() -> None:
    for path in (ROOT / "verify").rglob("*.py"):
        used = {name for name in modules(path) if name.split(".")[0] in {"bake", "export"}}
        strange = {
            name
            for name in used
            if not any(f"{name}.".startswith(f"{ok}.") for ok in VERIFY_MAY_IMPORT)
        }
        assert not strange, f"{path.name} imports {strange}"


def test_the_oracle_knows_every_method() -> None:
    assert EDITS.keys() == METHODS.keys()


@pytest.mark.parametrize("room", ["bake", "export", "verify"])
def test_public_names_are_there(room: str) -> None:
    package = import_module(room)
    assert dir(package) == sorted(package.__all__)
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def test_sae_lens_is_imported_where_it_is_needed_only() -> None:
    users = {
        path.name
        for path in (ROOT / "bake").rglob("*.py")
        if any(name.split(".")[0] == "sae_lens" for name in imports(path))
    }
    assert users == {"layouts.py", "train_sae.py"}


def test_rooms_are_small_and_names_are_unique() -> None:
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    for path in files:
        n_lines = len(path.read_text(encoding="utf-8").splitlines())
        assert n_lines <= MOST_LINES or path.name == "modeling_clamped_gemma.py", path
    folders = {path.parent for path in [*files, *(ROOT / "tests").rglob("*.py")]}
    for folder in folders:
        inside = [path for path in folder.iterdir() if path.is_file()]
        assert len(inside) <= MOST_FILES, f"{folder.relative_to(ROOT)} holds {len(inside)} files"
    names = Counter(path.name for path in files if not path.name.startswith("__"))
    assert [name for name, n in names.items() if n > 1] == []


def test_help_says_what_each_verb_says_of_itself() -> None:
    for name, verb in VERBS.items():
        found = getattr(import_module(f"bakeout.verbs.{verb.module}"), verb.function)
        said = getattr(found, "info", found)
        text = said.help if said is not found else str(found.__doc__)
        assert " ".join(text.split("\n\n")[0].split()) == verb.help, name


@pytest.mark.parametrize(
    "statement",
    ["import bakeout", "import bakeout.cli", "import bake", "import export", "import verify"],
)
def test_importing_loads_nothing_heavy_and_prints_nothing(statement: str) -> None:
    code = (
        f"import sys; {statement}; "
        "heavy = {'torch', 'transformers', 'sae_lens', 'onnxruntime', 'datasets', 'peft', 'ray'}; "
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


FORKING = """
import importlib, os, sys, traceback
for name in ("torch._dynamo", "torch.distributed.tensor", "scipy.optimize"):  # slow to import
    importlib.import_module(name)
known = {name.partition(".")[0] for name in sys.modules}
assert not known & {"bakeout", "bake", "export", "transformers", "peft", "sae_lens"}
failed = []
for code in sys.argv[1:]:
    if not (child := os.fork()):
        try:
            exec(code, {})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(code)
sys.exit("\\n".join(failed) or 0)
"""


def run_apart(codes: list[str]) -> None:
    """Run each in a process of its own, forked from one that knows nothing of what it imports but
    the libraries beneath.
    """
    command = [sys.executable, "-W", "ignore", "-c", FORKING, *codes]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_bakeout_registers_with_the_auto_classes() -> None:
    use = (
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "sites = {'schema': 1, 'sites': [], 'exempt_token_ids': []}\n"
        "for name in ('gemma', 'gemma2', 'gemma3_text', 'gemma3'):\n"
        "    config = AutoConfig.for_model(f'clamped_{name}', sae_clamp=sites)\n"
        "    assert type(config) in AutoModelForCausalLM._model_mapping, name\n"
    )
    autos = [f"from transformers import {name}" for name in ("AutoConfig", "AutoModelForCausalLM")]
    run_apart(
        [f"import bakeout\n{auto}\n{use}" for auto in autos]
        + [f"{auto}\nimport bakeout\n{use}" for auto in autos]
    )


def test_registration_survives_any_order_of_imports() -> None:
    first = [
        "import transformers.modeling_layers",
        "import transformers.modeling_utils",
        "from transformers import AutoTokenizer",
        "import peft",
        "import sae_lens",
        "import bake.modeling_clamped_gemma",
        "import tests.insertion",
    ]
    use = (
        "from transformers import AutoConfig\n"
        "AutoConfig.for_model('clamped_gemma2', sae_clamp={'schema': 1})\n"
    )
    run_apart([f"import bakeout\n{line}\n{use}" for line in first])
