"""Feature statistics: how often, how strongly and where each feature of an SAE fires on a corpus.

The model runs up to the hook layer and no further. Codes are formed block by block, so memory
grows neither with the corpus nor with tokens × d_sae.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bake.errors import SAEError
from bake.files.halving import in_halves, joined
from bake.files.memory import available_memory
from bake.questions.corpora import Windows
from bake.sae.folding import SAEEncoder

BATCH_TOKENS = 2048
"""Tokens of one forward, about; the same on every device, since sums are rounded by it."""
BLOCK_BYTES = 32 << 20
"""Bytes of one block of feature activations, about."""
CONTEXTS = 12
"""Top activating windows that are kept of every feature."""
BINS = 32
"""Bins of the histogram of activations: half octaves from 2⁻⁶ to 2¹⁰, open at both ends."""
LOWEST_BIN, BINS_PER_OCTAVE = -6, 2
NEAR = 1e-6
"""An activation this near to its threshold is listed: another rounding may decide otherwise."""
_ROUNDING = 2e-6
"""float32 is trusted beyond this share of |h|·|W_enc|; nearer to the threshold, float64 decides."""
_EXACT_AT_ONCE = 8192
_STATE = ("fired", "total", "squares", "near", "histogram", "top_values", "top_places")


@dataclass(frozen=True)
class FeatureStatistics:
    """What every feature of one SAE did on one corpus."""

    n_tokens: int
    """Tokens counted: all but BOS, EOS and PAD."""
    fired: NDArray[np.int64] = field(repr=False)
    """[d_sae]: tokens on which the activation was greater than 0."""
    total: NDArray[np.float64] = field(repr=False)
    """[d_sae]: sum of activations."""
    squares: NDArray[np.float64] = field(repr=False)
    """[d_sae]: sum of squared activations."""
    maximum: NDArray[np.float32] = field(repr=False)
    """[d_sae]: largest activation."""
    near: NDArray[np.int64] = field(repr=False)
    """[d_sae]: tokens on which the pre-activation was within `NEAR` of the threshold."""
    histogram: NDArray[np.int64] = field(repr=False)
    """[d_sae, BINS]: activations by size, see `bin_edges`."""
    top_values: NDArray[np.float32] = field(repr=False)
    """[CONTEXTS, d_sae]: largest activation in a window, the windows in descending order."""
    top_places: NDArray[np.int64] = field(repr=False)
    """[CONTEXTS, d_sae]: where that is, as window · seq + position; -1 where nothing fired."""

    @property
    def share(self) -> NDArray[np.float64]:
        """[d_sae]: share of counted tokens on which each feature fired."""
        return self.fired / self.n_tokens

    @property
    def mean(self) -> NDArray[np.float64]:
        """[d_sae]: mean activation over counted tokens."""
        return self.total / self.n_tokens

    @property
    def mean_square(self) -> NDArray[np.float64]:
        """[d_sae]: mean squared activation over counted tokens."""
        return self.squares / self.n_tokens


@dataclass(frozen=True)
class FeatureSite:
    """An SAE's encoder and the decoder layer whose output it reads."""

    layer: int
    encoder: SAEEncoder


def bin_edges() -> NDArray[np.float64]:
    """[BINS + 1] edges of the histogram; the first stands for 0 and the last for infinity."""
    return np.exp2(LOWEST_BIN + np.arange(BINS + 1) / BINS_PER_OCTAVE)


def count_windows(
    model: Any,
    counters: Sequence[Counter],
    windows: Windows,
    start: int = 0,
    told: Callable[[int], None] = lambda _: None,
) -> dict[str, Tensor]:
    """Run windows through the model up to the last hook layer, and count.

    Args:
        model: a stock Gemma.
        counters: of SAEs of its residual stream, which begin anew; the same pass serves all.
        windows: a corpus, or a part of one.
        start: index of the first window in the corpus.
        told: called with how many windows are done.

    Returns:
        What the counters added up, by their place and the name in `FeatureStatistics`.

    Raises:
        RanOutError: memory runs out at one window, or at one feature.
    """
    for counter in counters:
        counter.clear()
    layers = sorted({counter.layer for counter in counters})
    n_windows, seq = windows.ids.shape
    step = batch_windows(seq)
    for first in range(0, n_windows, step):
        ids = windows.ids[first : first + step]
        at = layer_outputs_of(model, layers, ids)
        counted = torch.from_numpy(windows.counts(ids)).to(model.device)
        for counter in counters:
            counter.add(at[counter.layer], counted, start + first)
        told(first + len(ids))
    return {f"{i}.{k}": v.cpu() for i, c in enumerate(counters) for k, v in c.state.items()}


def layer_outputs_of(
    model: Any, layers: Sequence[int], ids: NDArray[np.int32]
) -> dict[int, Tensor]:
    """What `residuals` gives on windows [n, seq], all of them at once where memory allows.

    Raises:
        RanOutError: memory runs out at one window.
    """

    def run(rows: slice) -> dict[int, Tensor]:
        tokens = torch.from_numpy(ids[rows].astype(np.int64))
        return residuals(model, layers, tokens.to(model.device))

    return joined(in_halves(model, "reading windows", run, *ids.shape))


def batch_windows(seq: int) -> int:
    """How many windows of a length go through the model at once."""
    return max(1, BATCH_TOKENS // seq)


def finished(state: dict[str, Tensor], site: int, n_tokens: int) -> FeatureStatistics:
    """The statistics of one site.

    Args:
        state: of the whole corpus, as `count_windows` gives it.
        site: its place among the sites.
        n_tokens: how many tokens were counted.
    """
    arrays = {name: state[f"{site}.{name}"].numpy() for name in _STATE}
    return FeatureStatistics(n_tokens=n_tokens, maximum=arrays["top_values"][0].copy(), **arrays)


def strongest(values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """(values, places) of the `CONTEXTS` greatest values, [rows, features] each; of equal ones,
    those that stand first.
    """
    # The bits of floats from 0 are in their order; the row decides between equal ones.
    rows = torch.arange(len(values) - 1, -1, -1, device=values.device)[:, None]
    order = (values.view(torch.int32).long() << 32 | rows).topk(CONTEXTS, dim=0).indices
    return values.gather(0, order), places.gather(0, order)


class _Reached(Exception):  # noqa: N818
    """The last hook layer has run: the rest of the forward is not needed."""


@torch.inference_mode()
def residuals(
    model: Any, layers: Sequence[int], ids: Tensor, attention_mask: Tensor | None = None
) -> dict[int, Tensor]:
    """The outputs of some decoder layers; nothing above the highest of them is run.

    Args:
        model: a stock Gemma.
        layers: from 0.
        ids: [batch, seq].
        attention_mask: [batch, seq], 1 at real tokens; without one, all are.

    Returns:
        layer → [batch, seq, d_in], in the model's dtype.
    """
    decoder = model.get_decoder()
    seen: dict[int, Tensor] = {}

    def take(layer: int) -> Callable[[Any, Any, Any], None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            seen[layer] = output[0] if isinstance(output, tuple) else output
            if layer == max(layers):
                raise _Reached

        return hook

    handles = [decoder.layers[layer].register_forward_hook(take(layer)) for layer in layers]
    positions = None
    if attention_mask is not None:
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    try:
        decoder(
            input_ids=ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
        )
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen


class Counter:
    """Counts one SAE's features, batch by batch.

    Raises:
        SAEError: the SAE does not fit the model.
    """

    def __init__(self, site: FeatureSite, model: Any) -> None:
        W_enc = site.encoder.W_enc
        d_in, self.d_sae = W_enc.shape
        if d_in != (width := model.config.get_text_config().hidden_size):
            raise SAEError(
                f"SAE at layer {site.layer}: d_in is {d_in}, the model's hidden size is {width}; "
                "take an SAE of this model"
            )
        self.layer = site.layer
        device = model.device
        self._W_enc = torch.from_numpy(W_enc).to(device)
        self._b_enc = torch.from_numpy(site.encoder.b_enc).to(device)
        self._theta = torch.from_numpy(site.encoder.theta).to(device)
        self._longest = float(torch.linalg.vector_norm(self._W_enc, dim=0).max())
        self.clear()

    def clear(self) -> None:
        """Begin anew."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self._b_enc.device)

        self.state = {
            "fired": zeros(self.d_sae),
            "total": zeros(self.d_sae, dtype=torch.float64),
            "squares": zeros(self.d_sae, dtype=torch.float64),
            "near": zeros(self.d_sae),
            "histogram": zeros(self.d_sae, BINS),
            "top_values": zeros(CONTEXTS, self.d_sae, dtype=torch.float32),
            "top_places": zeros(CONTEXTS, self.d_sae) - 1,
        }
        """`_STATE`: what is added up over a corpus, named as in `FeatureStatistics`."""

    @torch.inference_mode()
    def add(self, h: Tensor, counted: Tensor, start: int) -> None:
        """Take in a batch of windows.

        Args:
            h: [windows, seq, d_in].
            counted: [windows, seq] bool.
            start: index of the first window in the corpus.
        """
        x = h.flatten(0, 1).float()
        left_out = ~counted.flatten()
        step = max(1, BLOCK_BYTES // (4 * len(x)))

        def count(part: slice) -> None:
            acts, fired, near = self._activations(x, left_out, part)
            added = {"near": near, **_sums(acts, fired)}
            top = self._contexts(acts.view(*counted.shape, -1), start, part)
            # All memory that this takes is taken by now.
            for name, numbers in added.items():
                self.state[name][part] += numbers
            self.state["top_values"][:, part], self.state["top_places"][:, part] = top

        in_halves(self, "counting features", count, self.d_sae, len(x), step)

    def _activations(self, x: Tensor, left_out: Tensor, part: slice) -> tuple[Tensor, ...]:
        """(activations [tokens, features], whether each is above 0, exact at the threshold, and how
        often each feature is near it).
        """
        W, b, theta = self._W_enc[:, part], self._b_enc[part], self._theta[part]
        pre = torch.addmm(b, x, W)
        pre[left_out] = -torch.inf
        fired = pre > theta
        slack = NEAR + _ROUNDING * self._longest * torch.linalg.vector_norm(x, dim=1, keepdim=True)
        places = ((pre - theta).abs_() <= slack).nonzero()
        near = torch.zeros(len(b), dtype=torch.int64, device=b.device)
        for rows, columns in (some.unbind(1) for some in places.split(_EXACT_AT_ONCE)):
            exact = (x[rows].double() * W.T[columns].double()).sum(1) + b[columns].double()
            above = exact - theta[columns].double()
            fired[rows, columns] = above > 0
            near += torch.bincount(columns[above.abs() <= NEAR], minlength=len(b))
        return pre.masked_fill_(~fired, 0.0), fired, near

    def _contexts(self, acts: Tensor, start: int, part: slice) -> tuple[Tensor, Tensor]:
        """The strongest places so far, those of each window of this batch among them."""
        n_windows, seq = acts.shape[:2]
        best, at = acts.max(dim=1)  # [windows, features]
        windows = torch.arange(start, start + n_windows, device=acts.device)[:, None]
        places = torch.where(best > 0, windows * seq + at, -1)
        values = torch.cat([self.state["top_values"][:, part], best])
        places = torch.cat([self.state["top_places"][:, part], places])
        return strongest(values, places)


def _sums(acts: Tensor, fired: Tensor) -> dict[str, Tensor]:
    """Counts, sums and histogram of a block [tokens, features]; most of it is zero."""
    n_features = acts.shape[1]
    features = fired.nonzero()[:, 1]
    values = acts[fired].double()
    bins = ((values.log2() - LOWEST_BIN) * BINS_PER_OCTAVE).floor().clamp(0, BINS - 1).long()
    counts = torch.bincount(features * BINS + bins, minlength=n_features * BINS)
    histogram = counts.view(n_features, BINS)
    return {
        "histogram": histogram,
        "fired": histogram.sum(1),
        "total": torch.bincount(features, values, n_features),
        "squares": torch.bincount(features, values.square(), n_features),
    }


def memory_of(d_in: int, d_sae: int, *, decoder: bool = False) -> int:
    """Bytes that counting an SAE's features takes, about."""
    weights, sums = 4 * d_in * (2 if decoder else 1), 8 * (4 + BINS) + 12 * CONTEXTS * 2
    return d_sae * (weights + 3 * sums) + 8 * BLOCK_BYTES


def check_memory(
    name: str, d_in: int, d_sae: int, device: Any = "cpu", *, decoder: bool = False
) -> None:
    """Refuse an SAE before it is read, when it cannot fit into memory, or onto a device.

    Raises:
        SAEError: says how much it needs and how much there is.
    """
    needed = memory_of(d_in, d_sae, decoder=decoder)
    if needed > (free := min(available_memory(), available_memory(device))):
        raise SAEError(
            f"SAE {name}: d_sae {d_sae:,} × d_in {d_in:,} needs {needed / 1e9:,.1f} GB of memory, "
            f"{free / 1e9:,.1f} GB are free; take a narrower SAE, or a machine with more"
        )
