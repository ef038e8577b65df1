"""Gemma, Gemma 2, Gemma 3 and Gemma 4 with an SAE clamp on the residual stream.

This file travels inside every clamped checkpoint and needs torch and transformers only.

An `SAEClamp` hangs below the decoder layer whose output it edits, as
`model.layers.L.sae_clamp.*`; every other tensor keeps the name it has in the base model.
Where none of the clamp's features is active, the layer's output is returned unchanged.

It fails closed. `config.json` stores the activation's name behind `GUARD`, which only the
config classes below take off again, so a stock Gemma class refuses the checkpoint instead of
dropping the clamp. `from_pretrained` raises when a clamp tensor is missing, surplus, of the
wrong shape, or not finite; a clamp that was never loaded answers NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma2Model,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3Model,
    Gemma3TextConfig,
    Gemma3TextModel,
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4Model,
    Gemma4TextConfig,
    Gemma4TextModel,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForCausalLM,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedModel,
    Gemma4UnifiedTextConfig,
    Gemma4UnifiedTextModel,
    GemmaConfig,
    GemmaForCausalLM,
    GemmaModel,
)
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3DecoderLayer,
    Gemma3MultiModalProjector,
)
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextDecoderLayer
from transformers.models.gemma4_unified.modeling_gemma4_unified import (
    Gemma4UnifiedTextDecoderLayer,
)

GUARD = "clamped, load with trust_remote_code=True: "
"""Stands before the activation's name in `config.json`, so that stock classes refuse it."""

ACTIVATION_FIELDS = ("hidden_activation", "hidden_act")
"""Gemma reads the second, all later ones the first."""

ATTENTIONS = (None, "eager", "sdpa", *(f"flash_attention_{n}" for n in (2, 3, 4)))
"""By which a sequence gate sees what came before: transformers' own."""

SCHEMAS = (1, 2)
"""Versions of `config.sae_clamp` that this file reads; those with a sequence gate are 2."""


# --------------------------------------------------------------------------- the clamp


class SAEClamp(nn.Module):
    """Sets a few SAE features of the residual stream, and leaves everything else alone.

        pre   = h @ W_enc + b_enc                                   [batch, seq, k]
        a     = where(pre > theta, relu(pre), 0)                    JumpReLU; theta = 0 is ReLU
        gate_j = any over i with route[j, i] of a_i > trigger_i
        a'_j  = where(gate_j, value_j + scale_j * a_j, a_j)
        h'    = h + (a' - a) @ W_dec

    This equals decoding the edited code of the whole SAE and adding its error back. All tensors
    are float32 buffers and stay float32 whatever the model is cast to.

    Of a TopK SAE the encoder is there whole, as the SAE stores it, the k features in front:

        pre   = (h @ W_enc) * gain + b_enc                          [batch, seq, d_sae]
        a     = relu(pre) of the first k, where pre is not below the topk-th largest, else 0

    With `tau` it acts only where the sequence so far is about what the features stand for:

        fired = any over i of a_i > trigger_i, at tokens that are not exempt        [batch, seq]
        h'    = h unless (fired tokens so far) / (tokens so far) > tau, the token itself counted

    Args:
        d_in: width of the residual stream.
        k: number of features that are read or set.
        topk: of a TopK SAE, how many features are active at a position.
        d_sae: of a TopK SAE, how many features there are.
        dtype: of a TopK SAE, what `W_enc` is stored in.
        tau: of a sequence gate, the share of tokens that must have fired; None has no such gate.
    """

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    gain: torch.Tensor
    theta: torch.Tensor
    W_dec: torch.Tensor
    trigger: torch.Tensor
    route: torch.Tensor
    value: torch.Tensor
    scale: torch.Tensor

    SHAPES = (
        ("W_enc", "d_in", "k"),
        ("b_enc", "k"),
        ("theta", "k"),
        ("W_dec", "k", "d_in"),
        ("trigger", "k"),
        ("route", "k", "k"),
        ("value", "k"),
        ("scale", "k"),
    )
    TOPK_SHAPES = (
        ("W_enc", "d_in", "d_sae"),
        ("b_enc", "d_sae"),
        ("gain", "d_sae"),
        *SHAPES[3:],
    )
    AT_ONCE = 1 << 11
    """Features of a TopK SAE whose pre-activations are formed together; four times as many on a
    GPU, where more kernels cost more than more memory.
    """

    def __init__(
        self,
        d_in: int,
        k: int,
        topk: int = 0,
        d_sae: int = 0,
        dtype: str = "float32",
        tau: float | None = None,
    ) -> None:
        super().__init__()
        self.k, self.topk, self.tau = k, topk, tau
        self.whole = False
        """Every tensor is known to be there."""
        self.each_alone = False
        """Every feature is set where it is active itself, and by nothing else: `settle` finds out
        once the clamp is loaded, and forward takes half the kernels."""
        size = {"d_in": d_in, "k": k, "d_sae": d_sae}
        kinds = {"route": torch.bool, "W_enc": getattr(torch, dtype)}
        for name, *axes in self.TOPK_SHAPES if topk else self.SHAPES:
            shape = [size[axis] for axis in axes]
            self.register_buffer(name, torch.zeros(shape, dtype=kinds.get(name, torch.float32)))
        self.reset()

    @classmethod
    def at(cls, d_in: int, site: dict[str, Any]) -> Any:
        """The empty clamp of one of the config's sites."""
        sizes = {name: site[name] for name in ("topk", "d_sae", "dtype", "tau") if name in site}
        return cls(d_in, site["k"], **sizes)

    @torch.no_grad()
    def reset(self) -> None:
        """Fill every buffer that was not loaded with NaN: a clamp without weights answers NaN."""
        self.whole = False
        for buffer in self.buffers():
            if buffer.is_floating_point() and not getattr(buffer, "_is_hf_initialized", False):
                buffer.fill_(float("nan"))

    def settle(self) -> None:
        """Find out, of the loaded tensors, what forward may leave out."""
        self.whole = True
        alone = torch.eye(self.k, dtype=torch.bool, device=self.route.device)
        self.each_alone = not self.topk and self.tau is None and torch.equal(self.route, alone)

    def look(self) -> bool:
        """Whether every tensor is there, of a clamp that nobody settled: comparisons with NaN, and
        an empty route, would leave the stream as it is without a word.
        """
        if self.route.is_meta:
            return True
        numbers = (buffer for buffer in self.buffers() if buffer.is_floating_point())
        self.whole = bool(self.route.any()) and all(bool(of.isfinite().all()) for of in numbers)
        return self.whole

    def load_weights(self, weights: Any) -> set[str]:
        """Load (name, tensor) pairs, as vLLM's loader gives a module its own; gives the names.

        Raises:
            ValueError: a tensor is surplus, of another shape, or not finite.
        """
        own, loaded = dict(self.named_buffers()), set()
        for name, tensor in weights:
            if name not in own or tensor.shape != own[name].shape:
                raise ValueError(
                    f"clamp tensor {name} has another shape than config.json says, or no place "
                    "there; this folder is damaged, do not use it"
                )
            if not tensor.isfinite().all():
                raise ValueError(
                    f"clamp tensor {name} is not finite; this folder is damaged, do not use it"
                )
            own[name].copy_(tensor)
            loaded.add(name)
        self.look()
        return loaded

    def _apply(self, fn: Any, recurse: bool = True) -> SAEClamp:
        """Follow the model to another device, but never to another dtype."""

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved: torch.Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]

    def forward(
        self, h: torch.Tensor, exempt: torch.Tensor | None = None, so_far: SoFar | None = None
    ) -> torch.Tensor:
        """Clamp a residual stream.

        Args:
            h: [batch, seq, d_in], any floating dtype.
            exempt: [batch, seq] bool, positions that are left as they are.
            so_far: of a sequence gate, what came before each token; None: whole sequences, none of
                whose tokens is padding.

        Returns:
            [batch, seq, d_in], in h's dtype.
        """
        if not self.whole and not self.look():
            return torch.full_like(h, float("nan"))
        if h.device.type != "meta" and torch.is_autocast_enabled(h.device.type):
            with torch.autocast(h.device.type, enabled=False):  # float32 whatever it asks for
                return self.forward(h, exempt, so_far)
        if self.each_alone:
            return self._each_alone(h, exempt)
        a = self.feature_acts(h)
        delta = (self.edited(a) - a) @ self.W_dec
        if self.tau is not None:
            exempt = self.shut(a, exempt, so_far or SoFar())
        if exempt is not None:
            delta = delta.masked_fill(exempt.unsqueeze(-1), 0.0)
        return (h + delta).to(h.dtype)  # added in float32 and rounded once

    def _each_alone(self, h: torch.Tensor, exempt: torch.Tensor | None) -> torch.Tensor:
        """The same where every feature gates itself: a is pre there, and a' - a one sum."""
        x = h.float().flatten(0, -2)
        pre = torch.addmm(self.b_enc, x, self.W_enc)
        on = pre > torch.maximum(self.theta, self.trigger)
        change = torch.where(on, torch.addcmul(self.value, pre, self.scale - 1), 0.0)
        if exempt is not None:
            change.masked_fill_(exempt.reshape(-1, 1), 0.0)
        return torch.addmm(x, change, self.W_dec).view_as(h).to(h.dtype)

    def shut(self, a: torch.Tensor, exempt: torch.Tensor | None, so_far: SoFar) -> torch.Tensor:
        """Where a sequence gate keeps the clamp from acting, or a position is exempt: [batch, seq]
        bool.

        Args:
            a: [batch, seq, k], as `feature_acts` gives them.
            exempt: [batch, seq] bool, or None.
            so_far: what came before.
        """
        fired = (a > self.trigger).any(dim=-1)
        fired = fired if exempt is None else fired & ~exempt
        shut = so_far.share(fired) <= (self.tau or 0.0)
        return shut if exempt is None else exempt | shut

    def feature_acts(self, h: torch.Tensor) -> torch.Tensor:
        """h: [batch, seq, d_in] -> activations of the k features: [batch, seq, k], float32."""
        if self.topk:
            pre, least = self.topk_pre(h, self.topk)
            return torch.where(pre >= least, pre.relu(), 0.0)
        pre = h.float() @ self.W_enc + self.b_enc
        return torch.where(pre > self.theta, pre.relu(), 0.0)

    def topk_pre(self, h: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """h: [batch, seq, d_in] -> the k features' pre-activations [batch, seq, k] and the n-th
        largest of all features' [batch, seq, 1], float32. What equals the topk-th is active too.
        """
        best: list[torch.Tensor] = []
        read: list[torch.Tensor] = []
        at_once = self.AT_ONCE * (4 if h.is_cuda else 1)
        parts = (torch.split(of, at_once, -1) for of in (self.W_enc, self.gain, self.b_enc))
        for W, gain, b in zip(*parts, strict=True):
            pre = _product(h, W) * gain + b
            read.append(pre[..., : max(0, self.k - at_once * len(read))])
            best.append(pre.topk(min(n, pre.shape[-1]), sorted=False).values)
        least = torch.cat(best, -1).topk(n, sorted=False).values.amin(-1, keepdim=True)
        return torch.cat(read, -1), least

    def edited(self, a: torch.Tensor) -> torch.Tensor:
        """a: [batch, seq, k] -> what the features become: [batch, seq, k]."""
        on = (a > self.trigger).float()
        gate = (on @ self.route.float().T) > 0
        return torch.where(gate, self.value + self.scale * a, a)


class SoFar(NamedTuple):
    """What a sequence gate counts: the tokens up to each one, and how many of them fired.

    What fired is kept in the cache, as if it were the keys and values of one more layer, so that
    it is reordered, repeated, cropped and offloaded with it.
    """

    mask: Any = None
    """As the model is given it: [batch, past + seq], 1 at real tokens; or what each token sees,
    [batch, 1, seq, past + seq] bool or added to scores; None where none is padding."""
    position_ids: torch.Tensor | None = None
    """[batch, seq]; a sequence begins where one is 0."""
    cache: Any = None
    """The model's."""
    n_layers: int = 0
    """Of the model."""
    order: int = 0
    """Of the clamp among those with a sequence gate."""

    @classmethod
    def at(
        cls,
        place: dict[str, int],
        layer: Any,
        mask: Any,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        **_: Any,
    ) -> SoFar:
        """What came before the tokens that a decoder layer is given.

        Args:
            place: what `gate_place` gives.
            layer: that decoder layer.
            mask: as the model was given it.
            position_ids: as the layer is given them, like the following.
            past_key_values: the cache.
            cache: of continuous batching.

        Raises:
            ValueError: by continuous batching, or by attention that keeps a cache of its own.
        """
        attention = layer.self_attn.config._attn_implementation
        if cache is not None or attention not in ATTENTIONS:
            raise ValueError(
                f"a clamp with a sequence gate cannot be served by continuous batching, nor with the "
                f"attention of vLLM and others ({attention}), whose cache has no place for what "
                "fired; use generate, with attn_implementation sdpa or eager"
            )
        return cls(mask, position_ids, past_key_values, **place)

    def share(self, fired: torch.Tensor) -> torch.Tensor:
        """fired: [batch, seq] bool -> of the tokens up to each one the share that fired, float32.

        Raises:
            ValueError: the cache was filled without this clamp.
        """
        seq = fired.shape[1]
        mask = self.mask
        if isinstance(mask, dict):
            mask = mask.get("full_attention", mask)
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim in (2, 4)):
            raise ValueError(
                f"a sequence gate cannot read an attention mask of type {type(mask).__name__}; "
                "load the model with attn_implementation sdpa or eager"
            )
        record, past = self._record(seq)
        if mask is not None and mask.ndim == 4:
            return self._share_of_seen(mask[:, 0], fired, record, past)
        real = torch.ones_like(fired) if mask is None else mask[:, -seq:].bool()
        fired = fired & real
        if record is None:
            n_fired, n = (self._counted(of) for of in (fired, real))
        else:
            kept = self._keep(record, fired, real)
            n_fired, n = (of.sum(1, keepdim=True) for of in kept)
            if seq > 1:
                n_fired, n = (
                    of - here.sum(1, keepdim=True) + here.cumsum(1)
                    for of, here in ((n_fired, fired), (n, real))
                )
        return n_fired.float() / n.clamp(min=1).float()

    def _counted(self, flags: torch.Tensor) -> torch.Tensor:
        """flags: [batch, seq] bool -> how many up to each token: of sequences in one row each counts
        for itself.
        """
        n = flags.cumsum(1)
        if self.position_ids is None:
            return n
        before = torch.where(self.position_ids == 0, n - flags.long(), 0)
        return n - before.cummax(1).values

    def _share_of_seen(
        self, mask: torch.Tensor, fired: torch.Tensor, record: Any, past: Any
    ) -> torch.Tensor:
        """The same among the tokens that each one sees; of two that see each other, as within an
        image, only the later one counts the other.
        """
        sees = mask if mask.dtype == torch.bool else mask == 0
        places = torch.arange(fired.shape[1], device=fired.device) + past
        here = sees.index_select(-1, places)
        real = here.diagonal(dim1=-2, dim2=-1).expand_as(fired)
        fired = fired & real
        of_all = fired if record is None else self._keep(record, fired, real)[0]
        early = (here & here.mT).triu(1)
        n_fired = (sees & of_all[:, None]).sum(-1) - (early & fired[:, None]).sum(-1)
        return n_fired.float() / (sees.sum(-1) - early.sum(-1)).clamp(min=1).float()

    def _record(self, seq: int) -> tuple[int | None, Any]:
        """(this clamp's layer of the cache, how many tokens it holds)."""
        if self.cache is None:
            return None, 0
        layers, index = self.cache.layers, self.n_layers + self.order
        while len(layers) < self.n_layers:  # made without a config, or for an early exit
            layers.append((self.cache.layer_class_to_replicate or DynamicLayer)())
        while len(layers) <= index:
            static = isinstance(layers[0], StaticLayer)
            layers.append(StaticLayer(self.cache.get_max_length()) if static else DynamicLayer())
        past, known = layers[index].get_seq_length(), layers[0].get_seq_length()
        # A static layer's own count is a tensor once it is filled: asking it would wait for a GPU.
        asks = isinstance(past, int) or past.device.type == "cpu"
        if asks and not torch.compiler.is_compiling() and int(known) != int(past) + seq:
            raise ValueError(
                f"the cache holds {int(known) - seq} tokens, of which the sequence gate saw "
                f"{int(past)}; use a cache that this model alone has filled"
            )
        return index, past

    def _keep(self, record: int, *flags: torch.Tensor) -> list[torch.Tensor]:
        """Two flags of these tokens -> of all so far, [batch, past + seq] bool; a static cache
        holds none of those to come.
        """
        kept = self.cache.update(*(of[:, None, :, None].contiguous() for of in flags), record)
        return [of[:, 0, :, 0] for of in kept]


_WIDENS = hasattr(torch.ops.aten.mm, "dtype")
"""Whether this torch sums up in a wider type than it is given."""


def _product(h: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """H @ W, summed up in float32 whatever either is stored in."""
    if _WIDENS and h.is_cuda and h.dtype == W.dtype != torch.float32:  # no copy in float32
        rows = torch.mm(h.flatten(0, -2), W, out_dtype=torch.float32)
        return rows.view(*h.shape[:-1], W.shape[1])
    return h.float() @ W.float()


# --------------------------------------------------------------------------- configs


class _ClampedConfig:
    """Mixed in before a Gemma config: takes the guard off on reading, puts it on on writing."""

    _auto_class = "AutoConfig"

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ACTIVATION_FIELDS:
            if isinstance(kwargs.get(name), str):
                kwargs[name] = kwargs[name].removeprefix(GUARD)
            elif isinstance(getattr(self, name, None), str):
                setattr(self, name, getattr(self, name).removeprefix(GUARD))
        super().__post_init__(**kwargs)  # type: ignore[misc]
        clamp = getattr(self, "sae_clamp", None)
        if clamp is not None and clamp.get("schema") not in SCHEMAS:
            raise ValueError(
                f"config.sae_clamp.schema: got {clamp.get('schema')!r}, expected "
                f"{' or '.join(map(str, SCHEMAS))}; load the checkpoint with the modeling file "
                "that came with it"
            )

    def to_dict(self) -> dict[str, Any]:
        return _guarded(super().to_dict())  # type: ignore[misc]

    def to_diff_dict(self) -> dict[str, Any]:
        return _guarded(super().to_diff_dict())  # type: ignore[misc]


def _guarded(config: dict[str, Any]) -> dict[str, Any]:
    """The config as it is written: the activation behind the guard, in every field that a
    stock class of any Gemma family reads it from.
    """
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if isinstance(activation, str):
        for name in ACTIVATION_FIELDS:
            config[name] = GUARD + activation.removeprefix(GUARD)
    return config


class ClampedGemmaConfig(_ClampedConfig, GemmaConfig):
    """`GemmaConfig` and where the clamps sit."""

    model_type = "clamped_gemma"
    sae_clamp: dict[str, Any] | None = None


class ClampedGemma2Config(_ClampedConfig, Gemma2Config):
    """`Gemma2Config` and where the clamps sit."""

    model_type = "clamped_gemma2"
    sae_clamp: dict[str, Any] | None = None


class ClampedGemma3TextConfig(_ClampedConfig, Gemma3TextConfig):
    """`Gemma3TextConfig` and where the clamps sit."""

    model_type = "clamped_gemma3_text"
    sae_clamp: dict[str, Any] | None = None


class _ClampedOuterConfig(_ClampedConfig):
    """Mixed in before the config of a Gemma that takes more than text: its language model's config
    knows where the clamps sit, and holds the guard.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.text_config.sae_clamp = self.sae_clamp  # type: ignore[attr-defined]

    def to_diff_dict(self) -> dict[str, Any]:
        written = super().to_diff_dict()
        # transformers leaves out what equals a default, which the guarded activation may.
        activation = self.text_config.hidden_activation  # type: ignore[attr-defined]
        text = written["text_config"] | {"hidden_activation": activation}
        text.pop("sae_clamp", None)
        return written | {"text_config": _guarded(text)}


class ClampedGemma3Config(_ClampedOuterConfig, Gemma3Config):
    """`Gemma3Config` and where the clamps sit in the language model."""

    model_type = "clamped_gemma3"
    sub_configs_defaults = {  # text models need none, in an older transformers as vLLM wants it
        **getattr(Gemma3Config, "sub_configs_defaults", {}),
        "text_config": ClampedGemma3TextConfig,
    }
    sae_clamp: dict[str, Any] | None = None


class ClampedGemma4TextConfig(_ClampedConfig, Gemma4TextConfig):
    """`Gemma4TextConfig` and where the clamps sit."""

    model_type = "clamped_gemma4_text"
    sae_clamp: dict[str, Any] | None = None


class ClampedGemma4Config(_ClampedOuterConfig, Gemma4Config):
    """`Gemma4Config` and where the clamps sit in the language model."""

    model_type = "clamped_gemma4"
    sub_configs_defaults = {
        **getattr(Gemma4Config, "sub_configs_defaults", {}),
        "text_config": ClampedGemma4TextConfig,
    }
    sae_clamp: dict[str, Any] | None = None


class ClampedGemma4UnifiedTextConfig(_ClampedConfig, Gemma4UnifiedTextConfig):
    """`Gemma4UnifiedTextConfig` and where the clamps sit."""

    model_type = "clamped_gemma4_unified_text"
    sae_clamp: dict[str, Any] | None = None


class ClampedGemma4UnifiedConfig(_ClampedOuterConfig, Gemma4UnifiedConfig):
    """`Gemma4UnifiedConfig` and where the clamps sit in the language model."""

    model_type = "clamped_gemma4_unified"
    sub_configs_defaults = {
        **getattr(Gemma4UnifiedConfig, "sub_configs_defaults", {}),
        "text_config": ClampedGemma4UnifiedTextConfig,
    }
    sae_clamp: dict[str, Any] | None = None


# --------------------------------------------------------------------------- layers and models


class _ClampedLayer:
    """Mixed in before a decoder layer: clamps its output where the config places a site."""

    sae_clamp: SAEClamp | None

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        site = next((s for s in _sites(config) if s["layer"] == layer_idx), None)
        self.sae_clamp = SAEClamp.at(config.hidden_size, site) if site else None
        self.exempt_bos = bool(site and site["exempt_bos"])
        self.sae_place = gate_place(config.sae_clamp, layer_idx, config.num_hidden_layers)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        sae_exempt: torch.Tensor | None = None,
        sae_mask: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        h: torch.Tensor = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        if self.sae_clamp is None:
            return h
        if sae_exempt is None or not self.exempt_bos:
            exempt = None
        else:  # layers of a Gemma 4 that share keys and values may be given the last tokens alone
            exempt = sae_exempt[:, sae_exempt.shape[1] - h.shape[1] :]
        if self.sae_clamp.tau is None:
            return self.sae_clamp(h, exempt)
        return self.sae_clamp(h, exempt, SoFar.at(self.sae_place, self, sae_mask, **kwargs))


class ClampedGemmaDecoderLayer(_ClampedLayer, GemmaDecoderLayer):
    """Gemma's decoder layer, its output clamped."""


class ClampedGemma2DecoderLayer(_ClampedLayer, Gemma2DecoderLayer):
    """Gemma 2's decoder layer, its output clamped."""


class ClampedGemma3DecoderLayer(_ClampedLayer, Gemma3DecoderLayer):
    """Gemma 3's decoder layer, its output clamped."""


class ClampedGemma4DecoderLayer(_ClampedLayer, Gemma4TextDecoderLayer):
    """Gemma 4's decoder layer, its output clamped: what `layer_scalar` has multiplied."""


class ClampedGemma4UnifiedDecoderLayer(_ClampedLayer, Gemma4UnifiedTextDecoderLayer):
    """Gemma 4 unified's decoder layer, its output clamped."""


class _Clamped:
    """Mixed in before any Gemma model class: the clamp stays float32, and must be there."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, SAEClamp):
            module.reset()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    @classmethod
    def from_pretrained(
        cls,
        path: Any,
        *args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a clamped checkpoint, as `PreTrainedModel.from_pretrained` does.

        Raises:
            ValueError: a clamp tensor is missing, surplus, of the wrong shape, or not finite;
                the message names it.
        """
        model, info = super().from_pretrained(  # type: ignore[misc]
            path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        refuse_broken_clamp(model, info)
        if info["mismatched_keys"] and not ignore_mismatched_sizes:
            raise ValueError(f"tensors of another shape than expected: {info['mismatched_keys']}")
        return (model, info) if output_loading_info else model


class _ClampedTextModel(_Clamped):
    """Mixed in before a text backbone: clamped layers, and the exempt positions for them."""

    _layer_class: type

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.layers = nn.ModuleList(
            self._layer_class(config, i) for i in range(config.num_hidden_layers)
        )
        self.post_init()  # type: ignore[attr-defined]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
        }
        if "sae_exempt" not in kwargs:
            kwargs["sae_exempt"] = exempt_positions(self.config, **inputs)  # type: ignore[attr-defined]
        kwargs["sae_mask"] = attention_mask
        if any("tau" in site for site in _sites(self.config)):  # type: ignore[attr-defined]
            kwargs.pop("logits_to_keep", None)  # else a Gemma 4's last layers see the last tokens
        return super().forward(**inputs, **kwargs)  # type: ignore[misc]


class ClampedGemmaModel(_ClampedTextModel, GemmaModel):
    """`GemmaModel` with clamped decoder layers."""

    config_class = ClampedGemmaConfig
    _layer_class = ClampedGemmaDecoderLayer
    _no_split_modules = ["ClampedGemmaDecoderLayer"]


class ClampedGemma2Model(_ClampedTextModel, Gemma2Model):
    """`Gemma2Model` with clamped decoder layers."""

    config_class = ClampedGemma2Config
    _layer_class = ClampedGemma2DecoderLayer
    _no_split_modules = ["ClampedGemma2DecoderLayer"]


class ClampedGemma3TextModel(_ClampedTextModel, Gemma3TextModel):
    """`Gemma3TextModel` with clamped decoder layers."""

    config_class = ClampedGemma3TextConfig
    _layer_class = ClampedGemma3DecoderLayer
    _no_split_modules = ["ClampedGemma3DecoderLayer"]


class ClampedGemma3Model(_Clamped, Gemma3Model):
    """`Gemma3Model` whose language model is clamped; images are untouched."""

    config_class = ClampedGemma3Config
    _no_split_modules = ["ClampedGemma3DecoderLayer"]

    def __init__(self, config: ClampedGemma3Config) -> None:
        super(Gemma3Model, self).__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = Gemma3MultiModalProjector(config)
        self.vocab_size = config.text_config.vocab_size
        self.language_model = ClampedGemma3TextModel(config.text_config)
        self.post_init()

    def forward(self, input_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        kwargs["sae_exempt"] = exempt_positions(self.config, input_ids, **kwargs)
        return super().forward(input_ids=input_ids, **kwargs)


class ClampedGemma4TextModel(_ClampedTextModel, Gemma4TextModel):
    """`Gemma4TextModel` with clamped decoder layers."""

    config_class = ClampedGemma4TextConfig
    _layer_class = ClampedGemma4DecoderLayer
    _no_split_modules = ["ClampedGemma4DecoderLayer"]


class ClampedGemma4Model(_Clamped, Gemma4Model):
    """`Gemma4Model` whose language model is clamped; images and sound are untouched."""

    config_class = ClampedGemma4Config
    _no_split_modules = [*Gemma4Model._no_split_modules, "ClampedGemma4DecoderLayer"]

    def forward(self, input_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        kwargs["sae_exempt"] = exempt_positions(self.config, input_ids, **kwargs)
        return super().forward(input_ids=input_ids, **kwargs)


AutoModel.register(ClampedGemma4TextConfig, ClampedGemma4TextModel, exist_ok=True)
"""Gemma 4's own model classes make their language model by its config."""


class ClampedGemma4UnifiedTextModel(_ClampedTextModel, Gemma4UnifiedTextModel):
    """`Gemma4UnifiedTextModel` with clamped decoder layers."""

    config_class = ClampedGemma4UnifiedTextConfig
    _layer_class = ClampedGemma4UnifiedDecoderLayer
    _no_split_modules = ["ClampedGemma4UnifiedDecoderLayer"]


class ClampedGemma4UnifiedModel(_Clamped, Gemma4UnifiedModel):
    """`Gemma4UnifiedModel` whose language model is clamped; images and sound are untouched."""

    config_class = ClampedGemma4UnifiedConfig
    _no_split_modules = [*Gemma4UnifiedModel._no_split_modules, "ClampedGemma4UnifiedDecoderLayer"]

    def forward(self, input_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        kwargs["sae_exempt"] = exempt_positions(self.config, input_ids, **kwargs)
        return super().forward(input_ids=input_ids, **kwargs)


AutoModel.register(ClampedGemma4UnifiedTextConfig, ClampedGemma4UnifiedTextModel, exist_ok=True)
"""Gemma 4's own model classes make their language model by its config."""


class ClampedGemmaForCausalLM(_Clamped, GemmaForCausalLM):
    """`GemmaForCausalLM` over a clamped backbone."""

    config_class = ClampedGemmaConfig
    _auto_class = "AutoModelForCausalLM"
    _no_split_modules = ["ClampedGemmaDecoderLayer"]

    def __init__(self, config: ClampedGemmaConfig) -> None:
        super(GemmaForCausalLM, self).__init__(config)
        self.model = ClampedGemmaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class ClampedGemma2ForCausalLM(_Clamped, Gemma2ForCausalLM):
    """`Gemma2ForCausalLM` over a clamped backbone."""

    config_class = ClampedGemma2Config
    _auto_class = "AutoModelForCausalLM"
    _no_split_modules = ["ClampedGemma2DecoderLayer"]

    def __init__(self, config: ClampedGemma2Config) -> None:
        super(Gemma2ForCausalLM, self).__init__(config)
        self.model = ClampedGemma2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class ClampedGemma3ForCausalLM(_Clamped, Gemma3ForCausalLM):
    """`Gemma3ForCausalLM` over a clamped backbone."""

    config_class = ClampedGemma3TextConfig
    _auto_class = "AutoModelForCausalLM"
    _no_split_modules = ["ClampedGemma3DecoderLayer"]

    def __init__(self, config: ClampedGemma3TextConfig) -> None:
        super(Gemma3ForCausalLM, self).__init__(config)
        self.model = ClampedGemma3TextModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class ClampedGemma3ForConditionalGeneration(_Clamped, Gemma3ForConditionalGeneration):
    """`Gemma3ForConditionalGeneration` over a clamped language model."""

    config_class = ClampedGemma3Config
    _auto_class = "AutoModelForImageTextToText"
    _no_split_modules = ["ClampedGemma3DecoderLayer"]

    def __init__(self, config: ClampedGemma3Config) -> None:
        super(Gemma3ForConditionalGeneration, self).__init__(config)
        self.model = ClampedGemma3Model(config)
        self.lm_head = nn.Linear(
            config.text_config.hidden_size, config.text_config.vocab_size, bias=False
        )
        self.post_init()


class ClampedGemma4ForCausalLM(_Clamped, Gemma4ForCausalLM):
    """`Gemma4ForCausalLM` over a clamped backbone."""

    config_class = ClampedGemma4TextConfig
    _auto_class = "AutoModelForCausalLM"
    _no_split_modules = ["ClampedGemma4DecoderLayer"]

    def __init__(self, config: ClampedGemma4TextConfig) -> None:
        super(Gemma4ForCausalLM, self).__init__(config)
        self.model = ClampedGemma4TextModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class ClampedGemma4ForConditionalGeneration(_Clamped, Gemma4ForConditionalGeneration):
    """`Gemma4ForConditionalGeneration` over a clamped language model."""

    config_class = ClampedGemma4Config
    _auto_class = "AutoModelForImageTextToText"
    _no_split_modules = ClampedGemma4Model._no_split_modules

    def __init__(self, config: ClampedGemma4Config) -> None:
        super(Gemma4ForConditionalGeneration, self).__init__(config)
        self.model = ClampedGemma4Model(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()


class ClampedGemma4UnifiedForCausalLM(_Clamped, Gemma4UnifiedForCausalLM):
    """`Gemma4UnifiedForCausalLM` over a clamped backbone."""

    config_class = ClampedGemma4UnifiedTextConfig
    _auto_class = "AutoModelForCausalLM"
    _no_split_modules = ["ClampedGemma4UnifiedDecoderLayer"]

    def __init__(self, config: ClampedGemma4UnifiedTextConfig) -> None:
        super(Gemma4UnifiedForCausalLM, self).__init__(config)
        self.model = ClampedGemma4UnifiedTextModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class ClampedGemma4UnifiedForConditionalGeneration(_Clamped, Gemma4UnifiedForConditionalGeneration):
    """`Gemma4UnifiedForConditionalGeneration` over a clamped language model."""

    config_class = ClampedGemma4UnifiedConfig
    _auto_class = "AutoModelForImageTextToText"
    _no_split_modules = ClampedGemma4UnifiedModel._no_split_modules

    def __init__(self, config: ClampedGemma4UnifiedConfig) -> None:
        super(Gemma4UnifiedForConditionalGeneration, self).__init__(config)
        self.model = ClampedGemma4UnifiedModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()


# Gemma 3 checkpoints with images keep the key names of their first release, and so do those of
# Gemma 4 unified; transformers translates them by model type or class name, so the clamped names
# get the same translation.
for _stock, _clamped in (
    ("gemma3", "clamped_gemma3"),
    ("Gemma3Model", "ClampedGemma3Model"),
    ("gemma4_unified", "clamped_gemma4_unified"),
):
    if (_mapping := get_checkpoint_conversion_mapping(_stock)) is not None:
        register_checkpoint_conversion_mapping(_clamped, _mapping, overwrite=True)


# --------------------------------------------------------------------------- where, and whether


def _sites(config: Any) -> list[dict[str, Any]]:
    """The config's sites: `{"layer", "k", "exempt_bos"}` each, of a TopK SAE `topk`, `d_sae` and
    `dtype` too, and with a sequence gate `tau`.
    """
    if not getattr(config, "sae_clamp", None):
        raise ValueError(
            "config.sae_clamp: missing; a clamped model needs its clamp. Load the base model "
            "with its own class, or the checkpoint with its own config.json"
        )
    return list(config.sae_clamp["sites"])


def exempt_positions(
    config: Any,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None = None,
    attention_mask: Any = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    **_: Any,
) -> torch.Tensor | None:
    """The positions that no clamp touches: [batch, seq] bool, or None where there are none.

    By token id where ids are given (with a cache, index 0 is every decoded token; with left
    padding, BOS is not at 0). For embeddings alone: the first position of each sequence that
    the attention mask shows.
    """
    token_ids = config.sae_clamp["exempt_token_ids"]
    if not token_ids:
        return None
    if input_ids is not None:
        exempt = input_ids == token_ids[0]
        for token_id in token_ids[1:]:
            exempt = exempt | (input_ids == token_id)
        return exempt
    if inputs_embeds is None:
        return None
    batch, seq = inputs_embeds.shape[:2]
    if not (isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2):
        if position_ids is not None:
            return (position_ids == 0).expand(batch, seq)
        attention_mask = None
    past = past_key_values.get_seq_length() if past_key_values is not None else 0
    here = torch.arange(seq, device=inputs_embeds.device) + past
    first = here.new_zeros(batch) if attention_mask is None else attention_mask.int().argmax(-1)
    return here.unsqueeze(0) == first.unsqueeze(1)


def gate_place(section: dict[str, Any], layer: int, n_layers: int) -> dict[str, int]:
    """Where the sequence gate at a layer keeps what fired, as `SoFar` takes it.

    Args:
        section: the config's `sae_clamp`.
        layer: of the model.
        n_layers: of the model.
    """
    gated = sorted(site["layer"] for site in section["sites"] if "tau" in site)
    return {"n_layers": n_layers, "order": gated.index(layer) if layer in gated else 0}


def refuse_broken_clamp(model: nn.Module, info: dict[str, Any]) -> None:
    """Raise ValueError unless every clamp tensor was loaded, fits, and is finite; then settle.

    Args:
        model: a clamped model.
        info: `from_pretrained`'s loading info.
    """
    mismatched = {key[0] for key in info["mismatched_keys"]}
    surplus = {key for key in info["unexpected_keys"] if ".sae_clamp." in key}
    for what, keys in (
        ("is missing from the checkpoint", info["missing_keys"]),
        ("has another shape than config.json says", mismatched),
        ("is in the checkpoint, but config.json places no clamp there", surplus),
    ):
        for key in sorted(key for key in keys if ".sae_clamp." in key):
            raise ValueError(f"clamp tensor {key} {what}; this folder is damaged, do not use it")
    for name, buffer in model.named_buffers():
        if ".sae_clamp." in name and not buffer.is_meta and not buffer.isfinite().all():
            raise ValueError(
                f"clamp tensor {name} is not finite; this folder is damaged, do not use it"
            )
    for module in model.modules():
        if isinstance(module, SAEClamp) and not module.route.is_meta:
            module.settle()


__all__ = [
    "ClampedGemma2Config",
    "ClampedGemma2ForCausalLM",
    "ClampedGemma2Model",
    "ClampedGemma3Config",
    "ClampedGemma3ForCausalLM",
    "ClampedGemma3ForConditionalGeneration",
    "ClampedGemma3Model",
    "ClampedGemma3TextConfig",
    "ClampedGemma3TextModel",
    "ClampedGemma4Config",
    "ClampedGemma4ForCausalLM",
    "ClampedGemma4ForConditionalGeneration",
    "ClampedGemma4Model",
    "ClampedGemma4TextConfig",
    "ClampedGemma4TextModel",
    "ClampedGemma4UnifiedConfig",
    "ClampedGemma4UnifiedForCausalLM",
    "ClampedGemma4UnifiedForConditionalGeneration",
    "ClampedGemma4UnifiedModel",
    "ClampedGemma4UnifiedTextConfig",
    "ClampedGemma4UnifiedTextModel",
    "ClampedGemmaConfig",
    "ClampedGemmaForCausalLM",
    "ClampedGemmaModel",
    "SAEClamp",
]
