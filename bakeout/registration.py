"""Registers the clamped classes with transformers' Auto classes, as late as can be."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_CONFIGS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"


def register() -> None:
    """Register every clamped config and model class with transformers' Auto classes."""
    import transformers

    import bake.modeling_clamped_gemma as clamped
    from bake.base import FAMILIES

    for family in FAMILIES.values():
        config = getattr(clamped, family.config)
        transformers.AutoConfig.register(family.model_type, config, exist_ok=True)
        for name in family.auto_classes:
            auto = getattr(transformers, name)
            auto.register(config, getattr(clamped, family.clamped), exist_ok=True)


def register_when_imported() -> None:
    """Register now if transformers' Auto classes are there, else once they have been imported."""
    if _MODELS in sys.modules:
        register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _Watcher(MetaPathFinder):
    """Finds nothing itself; calls back after transformers' Auto modules have run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in (_CONFIGS, _MODELS):
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, self)
        return spec


class _ThenRegister(Loader):
    """Runs a module by its own loader, then registers."""

    def __init__(self, loader: Loader, watcher: _Watcher) -> None:
        self.loader, self.watcher = loader, watcher

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if module.__name__ == _MODELS:
            if self.watcher in sys.meta_path:
                sys.meta_path.remove(self.watcher)
            register()
        elif _MODELS not in sys.modules:
            importlib.import_module(_MODELS)
