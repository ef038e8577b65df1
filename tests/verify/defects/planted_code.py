"""Code planted in folders: every way in which a library, or Python itself, might come to run it."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

Plant = Callable[[Path, Path], None]
"""What changes a folder so that a marker, the second path, is written where its code runs."""
MODELING = "modeling_clamped_gemma.py"


def code(marker: Path) -> str:
    """Python that leaves the marker."""
    return f"open({str(marker)!r}, 'a').write('ran')\n"


class Bomb:
    """What leaves the marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return exec, (code(self.marker),)


def rehash(folder: Path) -> None:
    """Let the manifest list what is there, as an attacker would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change a JSON file, which need not exist."""

    def apply(folder: Path) -> None:
        path = folder / name
        data = json.loads(path.read_text()) if path.exists() else {}
        change(data)
        path.write_text(json.dumps(data))

    return apply


def _file(*names: str) -> Plant:
    def plant(folder: Path, marker: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(code(marker))

    return plant


def _pickled(*names: str) -> Plant:
    def plant(folder: Path, marker: Path) -> None:
        for name in names:
            (folder / name).write_bytes(pickle.dumps(Bomb(marker)))

    return plant


def _mapped(name: str, auto: str, value: Any = "evil.Evil", inside: str | None = None) -> Plant:
    """An auto_map entry in a JSON file, and the code that it names."""

    def plant(folder: Path, marker: Path) -> None:
        def change(data: dict[str, Any]) -> None:
            part = data if inside is None else data.setdefault(inside, {})
            part.setdefault("auto_map", {})[auto] = value

        (folder / "evil.py").write_text(code(marker) + "class Evil:\n    pass\n")
        edit(name, change)(folder)

    return plant


def _says(name: str, key: str, value: Any) -> Plant:
    return lambda folder, _: edit(name, lambda data: data.update({key: value}))(folder)


def _first_line(folder: Path, marker: Path) -> None:
    path = folder / MODELING
    path.write_text(path.read_text().replace("import torch\n", f"import torch\n{code(marker)}", 1))


def liar(folder: Path, marker: Path) -> None:
    """Clamps while it is being verified, and nowhere else."""
    path = folder / MODELING
    old = "        if self.sae_clamp is None:\n"
    text = path.read_text()
    assert old in text
    lie = "        import sys\n        if not any('worker' in name for name in sys.argv):\n"
    path.write_text(text.replace(old, f"{lie}            return h\n{old}") + code(marker))


def _escaped(folder: Path, marker: Path) -> None:
    """A key that no search of the file's bytes finds."""
    _mapped("tokenizer_config.json", "AutoTokenizer", ["evil.Evil", None])(folder, marker)
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace("auto_map", "auto\\u005fmap"))


def _linked(folder: Path, marker: Path) -> None:
    aside = folder.with_name(f"{folder.name}-aside")
    aside.mkdir()
    (aside / "generate.py").write_text(code(marker))
    (folder / "custom_generate").symlink_to(aside)


def _imported(folder: Path, marker: Path) -> None:
    _file("evil_library.py")(folder, marker)
    mapping = {"base_model_class": "Evil", "parent_library": "evil_library"}
    edit("adapter_config.json", lambda data: data.update(auto_mapping=mapping))(folder)


def _adapter_beside(folder: Path, marker: Path) -> None:
    stated = {"peft_type": "LORA", "base_model_name_or_path": "x", "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    _pickled("adapter_model.bin")(folder, marker)


def _weights_pickled(*names: str) -> Plant:
    """In place of the safetensors."""

    def plant(folder: Path, marker: Path) -> None:
        for path in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")):
            path.unlink()
        _pickled(*names)(folder, marker)

    return plant


_ANYWHERE: dict[str, Plant] = {
    "a file beside": _file("evil.py"),
    "a package": _file("__init__.py"),
    "names of the standard library": _file("json.py", "re.py", "torch.py"),
    "sitecustomize": _file("sitecustomize.py", "usercustomize.py"),
    "a path file": _file("evil.pth"),
    "conftest": _file("conftest.py"),
    "byte code": _file("__pycache__/config.cpython-311.pyc"),
    "a shared library": _file("torch.so", "libevil.so.1"),
    "upper case": _file("EVIL.PY"),
    "custom generation": _file("custom_generate/generate.py"),
    "custom generation, linked": _linked,
    "a generation config that names some": _says("generation_config.json", "custom_generate", "."),
    "tokenizer code": _mapped("tokenizer_config.json", "AutoTokenizer", ["evil.Evil", "evil.Evil"]),
    "tokenizer code, escaped": _escaped,
    "processor code": _mapped("processor_config.json", "AutoProcessor"),
    "image processor code": _mapped("preprocessor_config.json", "AutoImageProcessor"),
    "a library of operators": _says("genai_config.json", "custom_ops_library", "evil.so"),
    "optimizer state": _pickled("optimizer.pt", "rng.pkl"),
}
_MODELS: dict[str, Plant] = {
    "code on the hub": lambda folder, _: edit(
        "config.json", lambda data: data.update(auto_map={"AutoConfig": "evil/evil--evil.Evil"})
    )(folder),
    "AutoConfig": _mapped("config.json", "AutoConfig"),
    "AutoModel": _mapped("config.json", "AutoModel"),
    "AutoModelForCausalLM": _mapped("config.json", "AutoModelForCausalLM"),
    "AutoTokenizer in the config": _mapped("config.json", "AutoTokenizer", ["evil.Evil", None]),
    "code of a part": _mapped("config.json", "AutoModel", inside="vision_config"),
    "a quantizer": _says("config.json", "quantization_config", {"quant_method": "hqq"}),
    "a fusion": _says("config.json", "fusion_config", {"patch_embeddings": True}),
    "kernels": _says("config.json", "attn_implementation", "evil/kernels"),
    "another config": _says("config.json", "configuration_files", ["config.4.0.0.json"]),
    "other weights": _says("config.json", "transformers_weights", "adapter_model.bin"),
    "pickled weights": _pickled("pytorch_model.bin"),
    "pickled weights alone": _weights_pickled("pytorch_model.bin"),
    "an adapter beside": _adapter_beside,
}
WAYS: dict[str, dict[str, Plant]] = {
    "checkpoint": {
        "a line in the modeling file": _first_line,
        "a modeling file that lies": liar,
        **_MODELS,
        **_ANYWHERE,
    },
    "compiled": {
        "a modeling file": _file(MODELING),
        "another architecture": _says("config.json", "model_type", "rag"),
        **_MODELS,
    },
    "adapter": {
        "a modeling file": _file(MODELING),
        "a library that peft imports": _imported,
        "another method of peft": _says("adapter_config.json", "peft_type", "LORA"),
        "a pickled adapter": _weights_pickled("adapter_model.bin"),
        "tokenizer code": _ANYWHERE["tokenizer code"],
    },
}
"""By carrier's folder, then by name."""


def plant(folder: Path, marker: Path, *ways: Plant) -> Path:
    """Plant code in a folder, whose manifest then lists it."""
    for way in ways:
        way(folder, marker)
    rehash(folder)
    return folder
