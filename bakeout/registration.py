"""Registers clamped classes with transformers, vLLM and SGLang, and adapters with peft; late."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_CONFIGS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"
_CLAMPED = "bake.modeling_clamped_gemma"
_VLLM = "export.carriers.vllm_gemma"
_SGLANG = "export.carriers.sglang_gemma"


def register() -> None:
    """Register every clamped config and model class with transformers' Auto classes."""
    import transformers

    import bake.modeling_clamped_gemma as clamped
    from bake.families import FAMILIES

    for family in FAMILIES.values():
        config = getattr(clamped, family.config)
        transformers.AutoConfig.register(family.model_type, config, exist_ok=True)
        backbone = getattr(clamped, family.clamped_model)
        transformers.AutoModel.register(config, backbone, exist_ok=True)
        for name in family.auto_classes:
            auto = getattr(transformers, name)
            auto.register(config, getattr(clamped, family.clamped), exist_ok=True)


def register_adapter() -> None:
    """Make the clamp a method of peft."""
    importlib.import_module("export.carriers.peft_clamp")


def register_vllm() -> None:
    """Tell vLLM which classes run clamped checkpoints. It calls this at the start of each process,
    by the entry point `vllm.general_plugins`.
    """
    from vllm import ModelRegistry

    from bake.families import FAMILIES

    for family in FAMILIES.values():
        if not (family.images or family.scaled):
            ModelRegistry.register_model(family.clamped, f"{_VLLM}:{family.clamped}")


def register_sglang() -> None:
    """Tell SGLang which classes run clamped checkpoints."""
    from sglang.srt.models.registry import ModelRegistry

    clamped = importlib.import_module(_SGLANG)
    ModelRegistry.models |= {of.__name__: of for of in clamped.EntryClass}


def register_when_imported() -> None:
    """Register what there is to register with now, and the rest once it has been imported.

    SGLang calls this at the start of each process, by the entry point `sglang.srt.plugins`. Its
    registry imports every model it knows: nobody who does without it is to wait for that.
    """
    if _MODELS in sys.modules:
        register()
    elif not any(type(finder) is _Watcher for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
    for name, tell in (("peft", register_adapter), ("sglang.srt.models.registry", register_sglang)):
        if name in sys.modules:
            tell()
        elif not any(getattr(finder, "waits_for", None) == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _ModuleWatcher(name, tell))


class _Watcher(MetaPathFinder):
    """Registers once transformers' Auto classes are there and no import of it is under way.

    Not earlier: its modules import each other in circles, and ours needs whole ones. Ours counts
    as one of them, since it imports them.
    """

    def __init__(self) -> None:
        self.depth = 0

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not self.watches(name):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Watched(spec.loader, self)
                return spec
        return None

    def watches(self, name: str) -> bool:
        """Whether a module belongs to what is waited for."""
        return name.startswith("transformers.") or name == _CLAMPED

    def look(self) -> None:
        """After an import of transformers: register if this was the outermost."""
        if self.depth == 0 and _CONFIGS in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            register()


class _ModuleWatcher(_Watcher):
    """Registers once one module is there as a whole."""

    def __init__(self, name: str, tell: Callable[[], None]) -> None:
        super().__init__()
        self.waits_for, self.tell = name, tell

    def watches(self, name: str) -> bool:
        """Whether it is this module."""
        return name == self.waits_for

    def look(self) -> None:
        """After its import."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            self.tell()


class _Watched(Loader):
    """Runs a module by its own loader, counting how deep imports are nested."""

    def __init__(self, loader: Loader, watcher: _Watcher) -> None:
        self.loader, self.watcher = loader, watcher

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.watcher.depth += 1
        try:
            self.loader.exec_module(module)
        finally:
            self.watcher.depth -= 1
        self.watcher.look()
