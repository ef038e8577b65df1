"""Leak: how much of a clamp's push do a Gemma 4's per-layer embeddings take back?

Every layer behind the clamp is given each token's own embedding again, which no clamp of the
residual stream touches. With P onto the decoder directions that the clamps write, at the tokens on
which one fired, h the base's residual stream and h' the hooked one's:

    push = sqrt(Σ |P (h' - h)|² / Σ |h|²)              the share of the residual stream's length
    back = 1 - push(last layer) / push(last layer, without per-layer inputs behind the clamp)

Without them both streams are computed with zeros in their place in every layer behind the last
clamp; what is behind that clamp itself is the same in both. Measured on the base and the hooks that
make the reference, so that it holds for every engine that is held to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from bake.errors import BakeoutError
from bake.files.halving import in_halves, joined
from bake.questions.prompts import Batch, prompts_of
from verify.engines.forward import run
from verify.report.findings import VerifyReport

if TYPE_CHECKING:
    from torch import Tensor

    from verify.reference.oracle import Oracle
    from verify.reference.whole_sae import Site
    from verify.work import Work


@dataclass(frozen=True)
class Leak:
    """How far the clamps push the residual stream, as shares of its length."""

    layer: int
    """The last that is clamped."""
    tokens: int
    """On which a clamp fired."""
    behind: float
    """Right behind that clamp."""
    last: float
    """Behind the last layer."""
    without: float
    """There, with no per-layer inputs behind the clamp."""

    @property
    def back(self) -> float | None:
        """Share of the push that per-layer inputs take back; None where there is none."""
        return 1 - self.last / self.without if self.without else None


def gather(work: Work, report: VerifyReport) -> VerifyReport:
    """Add the leak of a base that has per-layer embeddings, and layers behind its last clamp."""
    from bake.stock import decoder_layers

    hooked = work.hooked
    fed = getattr(hooked.model.config.get_text_config(), "hidden_size_per_layer_input", 0)
    if not fed or hooked.sites[-1].layer + 1 == len(decoder_layers(hooked.model)):
        return report
    material = hooked.material
    asked = prompts_of(material.questions, material.tokenizer, [work.form])
    batches = list(material.batches([*material.windows, *asked]))
    name = f"leak {' '.join(batch.digest for batch in batches)}"
    found = work.journal.once(name, lambda: _found(hooked.model, hooked.sites, batches))
    return replace(report, more={**report.more, "leak": found})


def _found(model: Any, sites: Sequence[Site], batches: Sequence[Batch]) -> dict[str, Any]:
    from verify.reference.oracle import Oracle

    return asdict(measure_leak(Oracle(model, sites), batches))


def measure_leak(oracle: Oracle, batches: Sequence[Batch]) -> Leak:
    """The leak on some prompts.

    Args:
        oracle: over a base with per-layer embeddings; whose counts of firings nobody else reads.
        batches: of prompts.
    """
    import torch

    layer, last = oracle.sites[-1].layer, len(oracle.layers) - 1
    along = written_directions(oracle.sites)
    n_tokens, pushed, length = 0, dict.fromkeys((0, 1, 2), 0.0), dict.fromkeys((0, 1, 2), 0.0)

    def both(batch: Batch, rows: slice) -> tuple[Tensor, Tensor]:
        """The streams on the tokens that fire, without the clamps and with them."""
        part = batch.part(rows)
        with oracle.applied():
            after = _streams(oracle, part, (layer, last))
        assert oracle.last_fired is not None
        fired = oracle.last_fired
        before = _streams(oracle, part, (layer, last))
        with without_inputs(oracle, behind=layer):
            with oracle.applied():
                after += _streams(oracle, part, (last,))
            before += _streams(oracle, part, (last,))
        found = [torch.stack([h[fired] for h in of], dim=1).double() for of in (before, after)]
        return found[0], found[1]

    for batch in batches:
        shape = batch.input_ids.shape
        parts = in_halves(oracle.model, "reading prompts", partial(both, batch), *shape)
        before, after = joined(parts)
        n_tokens += len(before)
        for place in pushed:
            push = (after[:, place] - before[:, place]) @ along.T
            pushed[place] += float(push.square().sum())
            length[place] += float(before[:, place].square().sum())
    shares = [(pushed[n] / length[n]) ** 0.5 if length[n] else 0.0 for n in pushed]
    return Leak(layer, n_tokens, *shares)


def written_directions(sites: Sequence[Site]) -> Tensor:
    """[k, d_in] float64, orthonormal: what the clamps can write."""
    import torch

    rows = []
    for site in sites:
        features = [*site.features]
        if site.clamp.refusal_feature is not None:
            features.append(site.clamp.refusal_feature)
        if site.clamp.method == "random_decoder":
            features = [(feature + 1) % site.sae.cfg.d_sae for feature in features]
        rows.append(site.sae.W_dec[features].double())
    every = torch.cat(rows)
    _, sizes, directions = torch.linalg.svd(every, full_matrices=False)
    kept: Tensor = directions[sizes > 1e-9 * sizes.max()]
    return kept


def _streams(oracle: Oracle, batch: Batch, layers: Sequence[int]) -> list[Tensor]:
    """The residual stream behind some layers, hooks on them included: [batch, seq, d_in] each."""
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            seen[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    with ExitStack() as undo:
        for layer in layers:
            undo.callback(oracle.layers[layer].register_forward_hook(keep(layer)).remove)
        run(oracle.model, batch.input_ids, batch.attention_mask)
    return [seen[layer] for layer in layers]


@contextmanager
def without_inputs(oracle: Oracle, *, behind: int) -> Iterator[None]:
    """Within the block layers behind one are given zeros for their per-layer inputs."""

    def blank(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        h, given, *rest = args
        return (h, given * 0, *rest)

    with ExitStack() as undo:
        for layer in oracle.layers[behind + 1 :]:
            undo.callback(layer.register_forward_pre_hook(blank).remove)
        yield


def lines(report: VerifyReport) -> Iterator[str]:
    """What was found, in a line."""
    if "leak" not in report.more:
        return
    try:
        found = TypeAdapter(Leak).validate_python(report.more["leak"])
    except ValidationError as error:
        first = error.errors()[0]
        raise BakeoutError(
            f"report: leak.{'.'.join(map(str, first['loc']))}: {first['msg']}; write "
            "it again with `bakeout verify FOLDER --recipe RECIPE --json FILE`"
        ) from error
    if found.back is None:
        yield f"leak       the clamps pushed nothing on {found.tokens} tokens"
        return
    took = f"take back {found.back:.0%} of"
    if found.back < 0:
        took = f"add {-found.back:.0%} to"
    yield (
        f"leak       per-layer embeddings {took} the clamp's push: {found.behind:.3g} of the "
        f"residual stream's length behind layer {found.layer}, {found.last:.3g} behind the last "
        f"layer, {found.without:.3g} there without them ({found.tokens} tokens)"
    )
