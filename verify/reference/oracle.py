"""The oracle: a stock model, a forward hook, and the whole SAE.

Every method is written in its paper's own form: encode, edit the code, decode, add the SAE's
error back. It shares no arithmetic with what it checks. All of that is computed in float64 and
rounded once, to the residual stream's dtype: in float32, adding the error back would itself be
further from the truth than what is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, nn

from bake.errors import SAEError
from bake.files.halving import in_halves, joined
from bake.rounding import disturbed_part, rounding_parts
from bake.stock import decoder_layers
from verify.reference.editing import edit_code, open_gate
from verify.reference.gates import Gates, gates_of
from verify.reference.whole_sae import Site

T = TypeVar("T")
CODE_BYTES = 64 << 20
"""Most bytes of one code [tokens, d_sae] in float64; longer inputs are edited in parts."""


# --------------------------------------------------------------------------- the residual stream


@dataclass(frozen=True)
class Edited:
    """A residual stream after its code was edited."""

    h: Tensor
    """[batch, seq, d_in], in the dtype it came in. Where the code was not changed, bit for bit
    what came in."""
    changed: Tensor
    """[batch, seq] bool: the code was changed."""
    active: Tensor
    """[batch, seq, k] bool: each of the recipe's features was above the trigger, and not exempt."""


def edit_residual(h: Tensor, site: Site, exempt: Tensor) -> Edited:
    """Encode, edit, decode, and add the SAE's error back, in float64.

    Args:
        h: [batch, seq, d_in], any floating dtype.
        site: the SAE, and what happens to its features.
        exempt: [batch, seq] bool, positions that stay as they are.
    """
    features = list(site.features)
    tokens, spared = h.reshape(-1, h.shape[-1]), exempt.reshape(-1)
    out = tokens.clone()
    changed = torch.zeros_like(spared)
    active = torch.zeros(len(tokens), len(features), dtype=torch.bool, device=h.device)
    for rows in _parts(len(tokens), site):
        x = tokens[rows].double()
        acts = site.sae.encode(x)
        edited = edit_code(acts, site.clamp)
        touched = (edited != acts).any(dim=-1) & ~spared[rows]
        if touched.any():
            error = x[touched] - site.sae.decode(acts[touched])
            out[rows][touched] = (site.sae.decode(edited[touched]) + error).to(h.dtype)
        changed[rows] = touched
        active[rows] = (acts[:, features] > site.clamp.trigger) & ~spared[rows, None]
    shape = h.shape[:-1]
    return Edited(out.reshape(h.shape), changed.reshape(shape), active.reshape(*shape, -1))


def _parts(n_tokens: int, site: Site) -> Iterator[slice]:
    """All tokens in parts whose codes fit `CODE_BYTES`."""
    part = max(1, CODE_BYTES // (8 * site.sae.cfg.d_sae))
    for start in range(0, n_tokens, part):
        yield slice(start, start + part)


def reconstruct_residual(h: Tensor, site: Site, exempt: Tensor) -> Edited:
    """Encode and decode, nothing edited and the error dropped: what the SAE alone costs.

    Arguments and result as in `edit_residual`; every position that is not exempt is changed.
    Source: Farrell et al., arXiv 2410.19278.
    """
    edited = edit_residual(h, site, exempt)
    tokens, spared = h.reshape(-1, h.shape[-1]), exempt.reshape(-1)
    out = tokens.clone()
    for rows in _parts(len(tokens), site):
        out[rows] = site.sae.decode(site.sae.encode(tokens[rows].double())).to(h.dtype)
    out[spared] = tokens[spared]
    return Edited(out.reshape(h.shape), ~exempt, edited.active)


def _where_open(edited: Edited, h: Tensor, real: Tensor, tau: float) -> Edited:
    """The same where a sequence gate is open, and elsewhere what came in.

    Args:
        edited: of whole sequences.
        h: what came in.
        real: [batch, seq] bool: no padding.
        tau: of the gate.
    """
    acts = open_gate(edited.active.any(dim=-1), real.to(h.device), tau)
    return Edited(
        torch.where(acts[..., None], edited.h, h),
        edited.changed & acts,
        edited.active & acts[..., None],
    )


class Oracle:
    """A stock model, and the hooks that make it the reference.

    Within `applied()` the model is the reference, outside it is the base.

    Args:
        model: a stock Gemma, as `bake.stock.load_model` gives it: all its layers see all tokens.
        sites: one per clamp.
        edit: what the hooks make of the residual stream; `reconstruct_residual` is a control.

    Raises:
        SAEError: an SAE does not fit the model.
    """

    def __init__(
        self,
        model: Any,
        sites: Sequence[Site],
        edit: Callable[[Tensor, Site, Tensor], Edited] = edit_residual,
    ) -> None:
        self.model = model
        self.sites = tuple(sites)
        self._edit_residual = edit
        self.layers = decoder_layers(model)
        text_config = model.config.get_text_config()
        self.bos_id: int | None = text_config.bos_token_id
        for site in self.sites:
            if site.layer >= len(self.layers):
                raise SAEError(
                    f"clamp at layer {site.layer}: the model has {len(self.layers)} layers; "
                    f"expected 0 to {len(self.layers) - 1}"
                )
            if site.sae.cfg.d_in != text_config.hidden_size:
                raise SAEError(
                    f"clamp at layer {site.layer}: the SAE's d_in is {site.sae.cfg.d_in}, the "
                    f"model's hidden size is {text_config.hidden_size}; take an SAE of this model"
                )
            site.sae.to(device=model.device)
        self.tokens_fired = 0
        """Tokens on which any clamp changed the code, over all forwards so far."""
        self.fired_by_layer = {site.layer: 0 for site in self.sites}
        """The same, for each layer."""
        self.last_active: dict[int, Tensor] = {}
        """[batch, k] bool for each layer: which of its features were active anywhere in which
        sequence of the last forward, padding left out."""
        self.last_fired: Tensor | None = None
        """[batch, seq] bool: the tokens of the last forward on which any clamp changed the code,
        padding left out."""
        self.last_gates: dict[int, Gates] = {}
        """[batch, seq, g] for each layer: how close the gates of the last forward were to the
        other side, padding included."""
        self._noise: tuple[Generator, float] | None = None
        self._input_ids: Tensor | None = None
        self._real: Tensor | None = None

    @property
    def gated(self) -> bool:
        """Whether a clamp asks what came before: then it is right on whole sequences only, from
        their first token on.
        """
        return any(site.clamp.tau is not None for site in self.sites)

    @contextmanager
    def disturbed(self, seed: int, epsilon: float) -> Iterator[None]:
        """Within the block what a matrix, a norm or a layer gives is off by one rounding,
        at random, before a clamp reads it: what that moves is the reference's own sensitivity.

        Args:
            seed: of the signs.
            epsilon: the relative size of the rounding.
        """
        self._noise = Generator().manual_seed(seed), epsilon
        try:
            yield
        finally:
            self._noise = None

    def in_halves(self, run: Callable[[slice], T], n: int, each: int) -> T:
        """A forward over some rows, or as many as memory needs: what is known of the last forward
        is of all rows then. Arguments as in `bake.files.halving.in_halves`.
        """
        parts = in_halves(
            self.model, "reading prompts", lambda rows: (run(rows), self._last), n, each
        )
        found, self._last = joined(parts)
        return found

    @property
    def _last(self) -> tuple[Tensor | None, dict[int, Tensor], dict[int, Gates]]:
        """What is known of the last forward."""
        return self.last_fired, dict(self.last_active), dict(self.last_gates)

    @_last.setter
    def _last(self, known: tuple[Tensor | None, dict[int, Tensor], dict[int, Gates]]) -> None:
        self.last_fired, self.last_active, self.last_gates = known

    @contextmanager
    def applied(self) -> Iterator[Any]:
        """Change the model's forward for the length of the block; gives the model. Where the block
        fails, nothing was counted in it, and no noise drawn.
        """
        before = self.tokens_fired, dict(self.fired_by_layer)
        drawn = None if self._noise is None else self._noise[0].get_state()
        with ExitStack() as hooks:
            remember = self.model.register_forward_pre_hook(self._remember, with_kwargs=True)
            hooks.callback(remember.remove)
            for layer in self.layers if self._noise is not None else ():
                for part in rounding_parts(layer):
                    hooks.callback(part.register_forward_hook(self._disturb).remove)
            for site in self.sites:
                hook = self.layers[site.layer].register_forward_hook(self._edit(site))
                hooks.callback(hook.remove)
            hooks.callback(self.model.register_forward_hook(self._count).remove)
            try:
                yield self.model
            except BaseException:
                self.tokens_fired, self.fired_by_layer = before
                if self._noise is not None and drawn is not None:
                    self._noise[0].set_state(drawn)
                raise

    def _remember(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what the layers do not see: token ids, and which of them are padding."""
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            raise ValueError("the reference needs input_ids: BOS is exempt by token id")
        mask = kwargs.get("attention_mask")
        if self.gated and mask is not None and mask.shape != ids.shape:
            raise ValueError("the reference needs whole sequences: a clamp asks what came before")
        self._input_ids = ids
        self._real = (
            torch.ones_like(ids).bool() if mask is None else mask[:, -ids.shape[1] :].bool()
        )
        self.last_fired = torch.zeros_like(ids).bool()

    def _disturb(self, part: nn.Module, given: Any, output: Any) -> Any:
        """The hook of any part of a layer while the reference is disturbed."""
        assert self._noise is not None
        if isinstance(output, tuple):
            return (disturbed_part(part, given[0], output[0], *self._noise), *output[1:])
        return disturbed_part(part, given[0], output, *self._noise)

    def _edit(self, site: Site) -> Callable[[nn.Module, Any, Any], Any]:
        """The hook of one layer."""

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            assert self._input_ids is not None and self._real is not None
            h = output[0] if isinstance(output, tuple) else output
            exempt = torch.zeros_like(self._real)
            if site.clamp.exempt_bos and self.bos_id is not None:
                exempt = self._input_ids == self.bos_id
            edited = self._edit_residual(h, site, exempt)
            if site.clamp.tau is not None and self._edit_residual is edit_residual:
                edited = _where_open(edited, h, self._real, site.clamp.tau)
            fired = edited.changed & self._real
            self.fired_by_layer[site.layer] += int(fired.sum())
            self.last_fired = fired if self.last_fired is None else self.last_fired | fired
            self.last_active[site.layer] = (edited.active & self._real[..., None]).any(dim=1)
            self.last_gates[site.layer] = gates_of(h, site, exempt)
            return (edited.h, *output[1:]) if isinstance(output, tuple) else edited.h

        return hook

    def _count(self, *_: Any) -> None:
        """After the whole forward: a token on which two clamps fired counts once."""
        assert self.last_fired is not None
        self.tokens_fired += int(self.last_fired.sum())
