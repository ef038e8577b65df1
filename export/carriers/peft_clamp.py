"""The clamp as a PEFT method, `SAE_CLAMP`: what `PeftModel.from_pretrained` builds from an adapter.

PEFT takes only methods that are members of its own enum, so `register` adds one; importing this
calls it. `import bakeout` imports this as soon as peft is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar, NoReturn

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, register_peft_method
from torch import nn

from bake.modeling_clamped_gemma import SAEClamp, SoFar, exempt_positions, gate_place
from bake.reading.model_config import wrong_clamp
from export.carriers.adapter import fingerprint, first_row
from export.code_check import PEFT_TYPE

NAME = "SAE_CLAMP"
PREFIX = "sae_clamp_"
LORA = ".lora_"
"""In the names of what a LoRA adds, which may lie beside a clamp."""
SITE = f"{PREFIX}site"
"""Child of a clamped decoder layer: its clamp."""


def register() -> None:
    """Make `SAE_CLAMP` a PEFT method. Changes peft's enum and mappings; twice is as once."""
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_ = member._value_ = NAME
        PeftType._member_map_[NAME] = PeftType._value2member_map_[NAME] = member
        PeftType._member_names_.append(NAME)
        type.__setattr__(PeftType, NAME, member)
    if PeftType(NAME) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=NAME.lower(), config_cls=SAEClampConfig, model_cls=SAEClampModel, prefix=PREFIX
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = SAEClampConfig


@dataclass
class SAEClampConfig(PeftConfig):  # type: ignore[misc]
    """`adapter_config.json`."""

    sae_clamp: dict[str, Any] = field(default_factory=dict)
    """Where the clamps sit, and which tokens they leave alone; as in a clamped checkpoint."""
    base_fingerprint: str = ""
    """`fingerprint` of the base that the adapter belongs to."""
    base_sha256: list[str] = field(default_factory=list)
    """sha256 of the base's weight files."""
    hidden_size: int = 0
    num_hidden_layers: int = 0
    vocab_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(NAME)

    def to_dict(self) -> dict[str, Any]:
        """What is saved: as `export` writes it, with a name that says what is needed."""
        return {**super().to_dict(), "peft_type": PEFT_TYPE}


class ClampSite(SAEClamp, BaseTunerLayer):  # type: ignore[misc]
    """The clamp as PEFT counts and switches it; it wraps no layer and has nothing to train."""

    _active_adapter: str
    _disable_adapters: bool = False


class SAEClampModel(BaseTuner):  # type: ignore[misc]
    """Hooks clamps onto the decoder layers of a stock Gemma. The base's modules stay in place."""

    model: Any
    active_adapter: Any
    checked: bool
    prefix = PREFIX
    tuner_layer_cls = ClampSite
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(
        self,
        model: Any,
        adapter_name: str,
        *_: Any,
        low_cpu_mem_usage: bool = False,
        **__: Any,
    ) -> None:
        """Add an adapter's clamps to the model's layers. Changes `model`.

        Raises:
            ValueError: the model is not the base that the adapter belongs to, or has an adapter.
        """
        config: SAEClampConfig = self.peft_config[adapter_name]
        if any(hasattr(layer, SITE) for layer in model.get_decoder().layers):
            raise ValueError("this model has a clamp adapter already; unload it first")
        self._mark_only_adapters_as_trainable(model)
        text = model.config.get_text_config()
        sizes = {"n_layers": len(model.get_decoder().layers), "vocab_size": text.vocab_size}
        if (wrong := wrong_clamp(config.sae_clamp, **sizes)) is not None:
            raise ValueError(f"adapter_config.json: {wrong}; this adapter is damaged")
        # What another adapter of peft's adds beside the base's weights is not the base's.
        own = (tensor for name, tensor in model.state_dict().items() if LORA not in name)
        rows = [first_row(parameter) for parameter in own]
        if not all(row.is_floating_point() and not row.is_meta for row in rows):
            raise ValueError(
                "the base is quantised or not loaded; a clamp adapter needs it as it is"
            )
        if fingerprint(rows) != config.base_fingerprint:
            raise ValueError(
                f"this model is not the base that the adapter belongs to "
                f"({config.base_model_name_or_path}, by hash of its weights); load that one"
            )
        self.section = SimpleNamespace(sae_clamp=config.sae_clamp)
        self.checked = False
        self.sites: list[ClampSite] = []
        self.exempt: torch.Tensor | None = None
        self.mask: Any = None
        self.hooks = [model.model.register_forward_pre_hook(self._remember, with_kwargs=True)]
        device = "meta" if low_cpu_mem_usage else next(model.parameters()).device
        for site in config.sae_clamp["sites"]:
            layer = model.get_decoder().layers[site["layer"]]
            with torch.device(device):
                clamp: ClampSite = ClampSite.at(config.hidden_size, site)
            setattr(layer, SITE, clamp)
            clamp._active_adapter = adapter_name
            self.sites.append(clamp)
            place = gate_place(config.sae_clamp, site["layer"], config.num_hidden_layers)
            hook = self._clamp(bool(site["exempt_bos"]), place)
            self.hooks.append(layer.register_forward_hook(hook, with_kwargs=True))
        if any(clamp.tau is not None for clamp in self.sites):
            see_all = model.get_decoder().register_forward_pre_hook(_see_all, with_kwargs=True)
            self.hooks.append(see_all)
        self.targeted_module_names = [f"layers.{s['layer']}" for s in config.sae_clamp["sites"]]
        self.active_adapter = adapter_name

    def _remember(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward: which positions are exempt, and which are padding; and once, whether
        the clamp was loaded.
        """
        if not self.checked:
            self._refuse_unloaded()
        given = {"input_ids": args[0] if args else None, **kwargs}
        self.exempt = exempt_positions(self.section, **given)
        self.mask = given.get("attention_mask", args[1] if len(args) > 1 else None)

    def _refuse_unloaded(self) -> None:
        for name, buffer in self.model.named_buffers():
            if f".{SITE}." in name and (buffer.is_meta or not buffer.isfinite().all()):
                raise ValueError(
                    f"clamp tensor {name} was not loaded, or is not finite; expected it from "
                    "adapter_model.safetensors. Load the adapter with peft "
                    "(PeftModel.from_pretrained(base, folder)): transformers' model.load_adapter "
                    "does not fill it. If peft did load it, the adapter is damaged"
                )
        for site in self.sites:
            site.settle()
        self.checked = True

    def _clamp(self, exempt_bos: bool, place: dict[str, int]) -> Any:
        def hook(layer: nn.Module, _: Any, kwargs: dict[str, Any], output: Any) -> Any:
            clamp: ClampSite = getattr(layer, SITE)
            if clamp.disable_adapters:
                return output
            h = output[0] if isinstance(output, tuple) else output
            exempt = self.exempt if exempt_bos else None
            if exempt is not None:  # some layers may be given the last tokens alone
                exempt = exempt[:, exempt.shape[1] - h.shape[1] :]
            gated = clamp.tau is not None
            h = clamp(h, exempt, SoFar.at(place, layer, self.mask, **kwargs) if gated else None)
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return hook

    def enable_adapter_layers(self) -> None:
        """Clamp again."""
        for site in self.sites:
            site._disable_adapters = False

    def disable_adapter_layers(self) -> None:
        """Be the base until enabled again."""
        for site in self.sites:
            site._disable_adapters = True

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """There is one adapter, and it is the active one."""
        if adapter_name not in (self.active_adapter, [self.active_adapter]):
            raise ValueError(f"no adapter {adapter_name!r}; expected {self.active_adapter!r}")

    def unload(self) -> Any:
        """Take the clamps off and give the base back. Changes the model."""
        for hook in self.hooks:
            hook.remove()
        for layer in self.model.get_decoder().layers:
            if hasattr(layer, SITE):
                delattr(layer, SITE)
        return self.model

    def merge_and_unload(self, *_: Any, **__: Any) -> NoReturn:
        """Raise: there is nothing to add to."""
        raise NotImplementedError(
            "a clamp adapter cannot be merged: it is a step of the activations, which no change of "
            "the base's matrices computes. `bakeout export compiled` writes stock weights instead"
        )

    merge_adapter = merge_and_unload

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, *_: Any, state_dict: dict[str, torch.Tensor], **__: Any
    ) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in state_dict.items() if f".{SITE}." in name}

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:
        return False

    def _create_and_replace(self, *_: Any, **__: Any) -> None:
        """Nothing is replaced."""

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        model.requires_grad_(False)


def _see_all(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a forward: a Gemma 4's last layers are given all tokens, not only the last ones."""
    return args, {name: of for name, of in kwargs.items() if name != "logits_to_keep"}


register()
