"""What in a model's folder makes a library run code of others, or read what is not the model.

Read from transformers 5.23, peft 0.21, onnxruntime-genai 0.18. Nothing of a folder is loaded here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bake.errors import FolderError
from bake.reading.model_config import heads_by_layer

_RUN = (
    *("py", "pyc", "pyo", "pyw", "pyd", "pyx", "pth", "egg", "whl", "ipynb"),
    *("so", "dll", "dylib", "pt", "pkl", "pickle", "ckpt", "joblib", "dill", "bin", "distcp"),
)
"""Endings of what Python imports, what is linked in, and what is or holds a pickle."""
_RUNS = re.compile(rf".*\.({'|'.join(_RUN)}|so\.[\d.]+)", re.IGNORECASE | re.DOTALL)
_KEYS = {
    **dict.fromkeys(("auto_map", "custom_generate", "auto_mapping"), "names code"),
    **dict.fromkeys(("custom_ops_library", "trust_remote_code"), "names code"),
    **dict.fromkeys(("use_kernels", "kernel_config", "distributed_config"), "brings kernels"),
    **dict.fromkeys(("fusion_config", "quantization_config"), "rewrites the model"),
    **dict.fromkeys(("compression_config", "per_layer_config"), "rewrites the model"),
    **dict.fromkeys(("configuration_files", "transformers_weights"), "names other files"),
}
"""Keys of JSON files, at any depth, that a library obeys, and what it does then."""
_SWITCHES = ("trust_remote_code", "use_kernels")
"""Those that are off where they say false, as some tools write them."""
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation")
"""Keys whose value is looked up on the hub where it is a repository's."""
_PLAIN = ("tokenizer.json", "vocab.json", "manifest.json", "model.safetensors.index.json")
"""Large JSON files in which nobody looks for such keys."""
MOST_BYTES = 16 << 20
"""Of a JSON file of settings; Gemma 3's tokenizer_config.json has 1.2 MB."""


def runs_code(name: str) -> bool:
    """Whether a file of this name may be imported, linked in or unpickled."""
    return _RUNS.fullmatch(name) is not None


def code_files(folder: Path) -> list[str]:
    """Names of a folder's files that may be imported, linked in or unpickled, and of folders in it
    that are links, whose files are not the folder's.
    """
    found = []
    for root, folders, files in os.walk(folder):
        inside = Path(root).relative_to(folder)
        names = [name for name in files if runs_code(name)]
        names += [name for name in folders if (Path(root) / name).is_symlink()]
        found += [(inside / name).as_posix() for name in names]
    return sorted(found)


def obeyed_keys(folder: Path, *, below: bool = True) -> list[tuple[str, str, str]]:
    """(file, key, what it does) of each key in a folder's JSON files that makes a library run code
    of others, or another model than the files say. Keys without a value do nothing, nor do switches
    that are off.

    Args:
        folder: of a model.
        below: look into the folders in it too.

    Raises:
        FolderError: a file of settings is too large.
    """
    found = []
    for root, folders, files in os.walk(folder):
        if not below:
            folders.clear()
        for name in files:
            path = Path(root) / name
            if name.lower().endswith(".json") and path.is_file():
                file = path.relative_to(folder).as_posix()
                if file not in _PLAIN:
                    found += [(file, key, what) for key, what in _keys_in(path)]
    return sorted(found)


def _keys_in(path: Path) -> list[tuple[str, str]]:
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise FolderError(
            f"{path}: has {size:,} bytes; expected settings of at most {MOST_BYTES:,}. Do not use "
            "this folder"
        )
    try:
        data = json.loads(path.read_bytes())
        return list(_obeyed(data, ""))
    except RecursionError:
        return [("…", "is nested too deeply to be read")]
    except (OSError, ValueError):
        return []  # no library reads it either, and what needs it says so


def _obeyed(data: Any, above: str) -> Iterator[tuple[str, str]]:
    items = data.items() if isinstance(data, dict) else ()
    for key, value in items:
        name = f"{above}{key}"
        if value is None or (key in _SWITCHES and value is False):
            continue
        if key == "per_layer_config" and heads_by_layer(value):
            continue
        if key in _KEYS:
            yield name, _KEYS[key]
        elif key in _KERNELS and re.search(r"[/|:]", str(value)):
            yield name, "brings kernels"
        else:
            yield from _obeyed(value, f"{name}.")
    for value in data if isinstance(data, list) else ():
        yield from _obeyed(value, above)
