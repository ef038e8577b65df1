"""Whether a folder holds code of its own: no verb runs any, and one that has other code than a
released bakeout wrote is refused before anything of it is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bake.errors import FolderError, shown
from bake.families import FAMILIES, Family
from bake.new_folder import MANIFEST
from bake.strangers.foreign import MOST_BYTES, code_files, obeyed_keys
from export.carriers.carriers import CARRIERS
from export.manifest import Manifest

MODELING_FILE = "modeling_clamped_gemma.py"
RELEASED = {
    "dad9c13f749905814815489a6964f4c0523d10419819131be161d147d4b530ce": "0.1.0",
    "fbae50d069e0aae18519d3def3044f7c43e2944f44e306ebdfb03e3c8051205c": "0.1.0",
    "7ea888bf4f407d3d5f5290aa25a5b4d80f9727c8b71738f74bc1b61e51619c68": "0.1.0",
    "88e4c326ec891d741938f0a6d4af42067bd9cf0e25842c197ebde09a7a58482f": "0.1.0",
    "d9394cf22f20babecc44ad0d75b5b281a0361fde77cd944aa872855e33f446e4": "0.1.0",
}
"""sha256 of every modeling file that a released bakeout wrote into folders, and the first version
that did. A change of `bake/modeling_clamped_gemma.py` adds a line; none is ever taken out."""
ADAPTER_KEYS = frozenset(
    (
        *("peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision"),
        *("sae_clamp", "base_fingerprint", "base_sha256"),
        *("hidden_size", "num_hidden_layers", "vocab_size"),
    )
)
"""All that `adapter_config.json` says."""
ADAPTER = "adapter_config.json"
PEFT_TYPE = "SAE_CLAMP: bakeout adds this method to peft; install it and `import bakeout` first"
"""`peft_type` of an adapter. Without bakeout peft says no more than this, as of an unknown key."""
PEFT_TYPES = (PEFT_TYPE, "SAE_CLAMP")
"""The one method of peft that is ever asked to load an adapter; the second in older folders."""
_CODE_BYTES = 1 << 20
"""Most of a modeling file."""


def auto_map_of(family: Family) -> dict[str, str]:
    """What a checkpoint's config.json says of its code, and nothing else may stand there."""
    module = Path(MODELING_FILE).stem
    classes = {"AutoConfig": family.config, "AutoModel": family.clamped_model}
    classes |= dict.fromkeys(family.auto_classes, family.clamped)
    return {auto: f"{module}.{name}" for auto, name in classes.items()}


def foreign_code(folder: Path, manifest: Manifest | None) -> list[str]:
    """What of a folder would run other code than bakeout's own: a line each, none for a sound one.

    Args:
        folder: what bakeout wrote, or a stranger says so; nothing of it is run or loaded.
        manifest: its own; None where it has none, as when transformers saved it again.
    """
    carrier = None if manifest is None else CARRIERS.get(manifest.carrier)
    config = _json(folder / "config.json") or {}
    # A carrier that is not known here may have code, but that must be known all the same.
    own = carrier.own_code if carrier is not None else "auto_map" in config
    found = [
        f"{name}: may be run when it is loaded; expected no file that is imported or unpickled"
        for name in code_files(folder)
        if not (own and name == MODELING_FILE)
    ]
    found += [
        f"{file}: {key} {what}; expected no such key"
        for file, key, what in obeyed_keys(folder)
        if not (own and (file, key) == ("config.json", "auto_map"))
    ]
    if own:
        found += _modeling_file(folder, "nothing" if manifest is None else manifest.bakeout)
    if own and config:
        found += _auto_map(config, whole=carrier is not None)
    elif config and carrier is not None and config.get("model_type") not in list(FAMILIES):
        found.append(_strange(config.get("model_type"), FAMILIES))
    if (folder / ADAPTER).exists() or (carrier is not None and carrier.over_base):
        found += _adapter(folder, expected=carrier is not None and carrier.over_base)
    return found


def check_code(folder: Path, manifest: Manifest | None = None) -> None:
    """Refuse a folder with code of its own. Whatever opens a folder asks this first.

    Args:
        folder: what is to be opened.
        manifest: its own, where it was read already.

    Raises:
        FolderError: it has some, or its manifest cannot be read.
    """
    if manifest is None and (folder / MANIFEST).exists():
        manifest = Manifest.read(folder)
    for error in foreign_code(folder, manifest):
        raise FolderError(f"{folder}: {error}")


def _modeling_file(folder: Path, version: str) -> list[str]:
    """What is wrong with a folder's modeling file. One without it, as where a graph of rounded
    weights lies alone, has no code.
    """
    path = folder / MODELING_FILE
    if not path.exists() and not path.is_symlink():
        return []
    digest = _sha256(path)
    if digest in RELEASED:
        return []
    return [
        f"{MODELING_FILE}: is none that a released bakeout wrote (sha256 {digest[:16]}…): it was "
        f"changed, or another bakeout wrote the folder (it says {version}). Verify it with that "
        "version, or bake it again"
    ]


def _auto_map(config: dict[str, Any], *, whole: bool) -> list[str]:
    """What is wrong with the classes that config.json names.

    Args:
        config: its content.
        whole: all that bakeout writes must be there, besides nothing else.
    """
    model_type, stated = config.get("model_type"), config.get("auto_map")
    families = {family.model_type: family for family in FAMILIES.values()}
    family = families.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        return [_strange(model_type, families)]
    expected = auto_map_of(family)
    part = isinstance(stated, dict) and all(expected.get(key) == stated[key] for key in stated)
    if stated == expected or (part and not whole):
        return []
    return [
        f"config.json: auto_map is {shown(stated)}; expected what bakeout writes. Bake or download "
        "the folder again"
    ]


def _strange(model_type: Any, known: Iterable[str]) -> str:
    return f"config.json: model_type is {shown(model_type)}; expected one of {', '.join(known)}"


def _adapter(folder: Path, *, expected: bool) -> list[str]:
    """What peft would be told by a folder."""
    if not expected:
        return [f"{ADAPTER}: is loaded on top of the weights beside it; expected none. Remove it"]
    config = _json(folder / ADAPTER)
    if config is None:
        return []
    if config.get("peft_type") not in PEFT_TYPES:
        said = shown(config.get("peft_type"))
        return [f"{ADAPTER}: peft_type is {said}; expected {PEFT_TYPES[-1]}"]
    other = sorted(config.keys() - ADAPTER_KEYS)
    return [f"{ADAPTER}: says {shown(key)}; expected {', '.join(ADAPTER_KEYS)}" for key in other]


def _sha256(path: Path) -> str:
    if not path.is_file() or path.stat().st_size > _CODE_BYTES:
        return "of no such file"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _json(path: Path) -> dict[str, Any] | None:
    """A JSON object of a folder, or None where it is none; one that is too large is refused."""
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        return None
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None
