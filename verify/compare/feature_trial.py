"""Every feature of a compiled clamp, tried: also those that no question and no text makes fire.

Residual streams of the base are pushed along the encoder's columns until one feature alone is on,
and until none is; the two stock layers have to do what the whole SAE does there. Their MLPs are
computed here, in the dtype that they are stored in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.base import find_base
from bake.files.halving import in_halves, joined
from bake.recipe import Recipe
from export.manifest import Manifest, read_json
from verify.engines.forward import run
from verify.expected.clamp_rows import expected_tensors
from verify.expected.weight_files import ADDED_SHARD
from verify.expected.widened_base import Wide
from verify.report.findings import Failure

if TYPE_CHECKING:
    from torch import Tensor

    from bake.questions.prompts import Batch
    from verify.hooked import Hooked
    from verify.reference.whole_sae import Site

TOKENS = 64
"""Of the base, whose residual streams are pushed."""
REACH = 0.05
"""How far above and below its threshold a feature is pushed, against |w|·|x|."""
CLEAR = 0.02
"""How far every feature has to be from its threshold, for the stream to be taken."""
TRIED = 4
"""Streams for each feature and side, at most."""
WITHIN = {"float32": 0.01, "bfloat16": 0.2, "float16": 0.05}
"""Largest error, against the size of the change that is made: in tiny models of three families and
with every method, rounding gave up to 1.2e-5 in float32 and 0.02 in bfloat16."""


@dataclass(frozen=True)
class Block:
    """An added layer as it computes, but for attention, which writes nothing."""

    gate: Tensor
    up: Tensor
    down: Tensor
    before: Tensor
    """What the norm before it multiplies by, float32."""
    after: Tensor | None
    """The same of the norm behind it."""
    eps: float

    def __call__(self, h: Tensor) -> Tensor:
        """[n, D] twice, in the weights' dtype."""
        from torch.nn.functional import gelu, linear

        u = _normed(h, self.before, self.eps)
        m = linear(gelu(linear(u, self.gate), approximate="tanh") * linear(u, self.up), self.down)
        return h + (m if self.after is None else _normed(m, self.after, self.eps))


def _normed(x: Tensor, gains: Tensor, eps: float) -> Tensor:
    """Gemma's RMS norm, in float32."""
    wide = x.float()
    wide = wide * (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    normed: Tensor = wide * gains
    return normed.to(x.dtype)


def trial_failures(folder: Path, recipe: Recipe, hooked: Hooked) -> Iterator[Failure]:
    """What the layers of a compiled folder do not do, feature by feature.

    Args:
        folder: a compiled one.
        recipe: it was made from.
        hooked: the base, and the recipe's sites.
    """
    base, config = find_base(recipe), read_json(folder / "config.json")
    compiled = Manifest.read(folder).compiled
    assert compiled is not None
    spares = tuple(sorted({site.clamp.exempt_bos for site in hooked.sites}))
    wide = Wide(base, config, (), spares, None)
    streams = _streams(hooked)
    for site, entry in zip(hooked.sites, compiled.sites, strict=True):
        prefix = f"{base.layer_prefix}{{}}."
        blocks = [_block(folder, prefix.format(layer), wide) for layer in entry.layers]
        rows = {name: _tensor(of.value) for name, of in expected_tensors(site).items()}
        pushed = _pushed(streams[site.layer], site, rows)
        failing = _disagreeing(pushed, site, rows, blocks, wide)
        if failing:
            names = [" and ".join(map(str, on)) or "none" for on in failing]
            more = f" (and {len(names) - 5} more)" if len(names) > 5 else ""
            what = f"layer {site.layer}: the change where these features alone are on"
            measured = f"another with {', '.join(names[:5])}{more}"
            yield Failure("parity", "compiled", what, measured, "the whole SAE's")


def _tensor(numbers: Any) -> Tensor:
    """Of an array."""
    import torch

    found: Tensor = torch.from_numpy(numbers)
    return found


def _streams(hooked: Hooked) -> dict[int, Tensor]:
    """By layer, residual streams [n, d] in float64 as its clamp reads them; BOS left out."""
    from verify.reference.oracle import Oracle

    found: list[dict[int, Tensor]] = []
    oracle = Oracle(hooked.model, hooked.sites)
    prompts = hooked.material.prompts({"questions"}, compared=False)

    def read(batch: Batch, rows: slice) -> dict[int, Tensor]:
        ids, mask = batch.input_ids[rows], batch.attention_mask[rows]
        real = mask.bool() & (ids != (oracle.bos_id or 0))
        given: dict[int, Tensor] = {}
        with ExitStack() as hooks:
            for site in hooked.sites:
                keep = oracle.layers[site.layer].register_forward_hook(_keep(given, site, real))
                hooks.callback(keep.remove)
            hooks.enter_context(oracle.applied())
            run(hooked.model, ids, mask)
        return given

    for batch in hooked.material.batches(prompts):
        shape = batch.input_ids.shape
        found += in_halves(hooked.model, "reading prompts", partial(read, batch), *shape)
        if sum(len(of[hooked.sites[0].layer]) for of in found) >= TOKENS:
            break
    return {layer: streams[:TOKENS] for layer, streams in joined(found).items()}


def _keep(given: dict[int, Tensor], site: Site, real: Tensor) -> Any:
    def hook(_: Any, __: Any, output: Any) -> None:
        h = output[0] if isinstance(output, tuple) else output
        given[site.layer] = h.detach().cpu()[real].double()

    return hook


def _block(folder: Path, prefix: str, wide: Wide) -> Block:
    from safetensors import safe_open

    with safe_open(folder / ADDED_SHARD, framework="pt") as tensors:

        def read(name: str) -> Tensor:
            found: Tensor = tensors.get_tensor(f"{prefix}{name}.weight")
            return found

        gate, up, down = (read(f"mlp.{name}_proj") for name in ("gate", "up", "down"))
        before = wide.norm_adds + read(wide.norm_before).float()
        normed = wide.base.family.norms_after
        after = wide.norm_adds + read("post_feedforward_layernorm").float() if normed else None
    return Block(gate, up, down, before, after, float(wide.config["rms_norm_eps"]))


def _pushed(
    streams: Tensor, site: Site, rows: Mapping[str, Tensor]
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """(features, streams [m, d] on which they alone are on, and clearly): none, each one, and where
    any of several triggers counts, each two; one after another, for pairs are many.
    """
    import torch

    W, b, n = rows["W_enc"], rows["b_enc"], len(site.features)
    threshold = rows["theta"].clamp(min=max(site.clamp.trigger, 0.0))
    norms, sizes = W.norm(dim=0), streams.norm(dim=-1, keepdim=True)
    shortest = torch.linalg.pinv(W[:, :n].T).T  # [n, d]: the shortest way to move each by so much
    together = range(3 if bool((rows["route"].sum(dim=1) > 1).any()) else 2)
    for places in (of for size in together for of in combinations(range(n), size)):
        sides = -torch.ones(n, dtype=torch.float64)
        sides[list(places)] = 1
        given = streams if len(places) < 2 else streams[sum(places) % len(streams) :][: 2 * TRIED]
        size = given.norm(dim=-1, keepdim=True)
        z = (given @ W + b - threshold)[:, :n]
        x = given + (REACH * norms[:n] * size * sides - z) @ shortest
        clear = ((x @ W + b - threshold).abs() >= CLEAR * norms * size).all(dim=-1)
        near = x.norm(dim=-1) <= 2 * sizes.max()
        chosen = x[clear & near][: TRIED if len(places) < 2 else 1]
        yield tuple(site.features[i] for i in places), chosen


def _disagreeing(
    pushed: Iterable[tuple[tuple[int, ...], Tensor]],
    site: Site,
    rows: Mapping[str, Tensor],
    blocks: Sequence[Block],
    wide: Wide,
) -> list[tuple[int, ...]]:
    """The features on whose streams two layers do not do what the reference does."""
    import torch

    from verify.reference.oracle import edit_residual

    d, D = wide.base.d_in, int(wide.config["hidden_size"])
    dtype = blocks[0].gate.dtype
    scale = wide.c if wide.base.family.norms_after else 1.0
    held = wide.held(site.layer, str(dtype).removeprefix("torch."))
    # A stream that no feature changes has to stay, but for a part of what the weakest would do.
    least = float(rows["W_dec"].norm(dim=-1).min()) * max(1.0, abs(site.clamp.value or 1.0))
    within = WITHIN[str(dtype).removeprefix("torch.")]
    failing = []
    for on, streams in pushed:
        h = torch.zeros(len(streams), D, dtype=torch.float64)
        h[:, :d] = streams * scale
        h[:, d : wide.flags] = held
        h = h.to(dtype)
        x = h[:, :d].double() / scale
        given = x[None].to(site.sae.W_enc.device)
        nobody = torch.zeros(given.shape[:2], dtype=torch.bool, device=given.device)
        wanted = edit_residual(given, site, nobody).h[0].cpu() - x
        with torch.no_grad():
            moved = blocks[1](blocks[0](h))
        got = (moved[:, :d].double() - h[:, :d].double()) / scale
        off = (got - wanted).norm(dim=-1)
        rounding = torch.finfo(dtype).eps * x.norm(dim=-1)
        if not bool((off <= within * wanted.norm(dim=-1).clamp(min=least) + rounding).all()):
            failing.append(on)
    return failing
