"""A 16-bit folder and its reference in float32, where every fault of the clamp shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from bake.questions.prompts import Batch, Prompt
from bake.recipe import Recipe
from bake.rounding import EPSILON
from verify.compare.comparison import REFERENCE
from verify.compare.distances import Distances
from verify.compare.parity_sum import ParitySum
from verify.compare.sensitivity import Sensitivity, sample
from verify.engines.engines import Engines
from verify.engines.runners import HookedRunner
from verify.hooked import REFERENCE_32, Hooked
from verify.journal import Journal
from verify.report.findings import Rounding

if TYPE_CHECKING:
    from verify.reference.oracle import Oracle

FIRST = 16
"""How many forget prompts are read beside a sample of all."""


def compare_in_float32(
    recipe: Recipe,
    hooked: Hooked,
    engines: Engines,
    prompts: Sequence[Prompt],
    journal: Journal,
) -> Rounding | None:
    """Some prompts with both sides in float32, which holds what is stored in 16 bits exactly.

    The folder's engine is loaded, and has to be loaded anew afterwards.

    Args:
        recipe: names the base.
        hooked: the base; it is as it was when this returns.
        engines: of the folder.
        prompts: that all engines are shown.
        journal: of a run that was interrupted, or empty.

    Returns:
        None where the folder has ONNX files only: those compute in float32 anyway.
    """
    runner = engines.torch
    if runner is None:
        return None
    chosen = list(dict.fromkeys([*sample(prompts), *_forget(prompts)]))
    with _oracle_in_float32(recipe, hooked, engines.device) as oracle:
        reference = HookedRunner(REFERENCE_32, oracle.model, oracle)
        sensitivity = Sensitivity(
            "float32", oracle, EPSILON["float32"], hooked.material, journal, prompts
        )
        parity = ParitySum(distances=Distances(sensitivity))
        batches = list(hooked.material.batches(chosen))
        names = [f"float32 {number}" for number in range(len(batches))]
        if not all(journal.has(name) for name in names):
            engines.load_torch(recipe, "float32", engines.threads)

        def compare(batch: Batch) -> Any:
            inputs = (batch.input_ids, batch.attention_mask)
            expected = reference.logits(*inputs, batch.wanted)
            nearby = sensitivity.nearby(batch)
            found = runner.logits(*inputs, batch.wanted)
            return parity.found(batch, batch.wanted, expected, found, nearby)

        journal.ahead(
            {name: partial(compare, batch) for name, batch in zip(names, batches, strict=True)}
        )
        for name, batch in zip(names, batches, strict=True):
            parity.take(batch, journal.once(name, partial(compare, batch)))
        assert parity.distances is not None
        fired = [prompt for prompt in chosen if prompt.source == "forget"][:FIRST]
        return parity.distances.result([], {}, fired, hooked.material.tokenizer)


def _forget(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Some prompts on what is to be forgotten."""
    return [of for of in prompts if of.source == "forget" and of.every_token][:FIRST]


@contextmanager
def _oracle_in_float32(recipe: Recipe, hooked: Hooked, device: str) -> Iterator[Oracle]:
    """The reference with the base's weights as they are stored, in float32.

    Where the base was loaded as it is stored, its tensors are cast, and cast back afterwards: that
    takes no second model.
    """
    from bake.stock import load_base
    from verify.reference.oracle import Oracle

    if REFERENCE_32 in hooked.oracles:
        yield hooked.oracles[REFERENCE_32]
        return
    if recipe.base.dtype != "auto":
        yield Oracle(load_base(recipe, device, dtype="float32"), hooked.sites)
        return
    tensors = [*hooked.model.parameters(), *hooked.model.buffers()]
    before = [(tensor, tensor.dtype) for tensor in tensors if tensor.is_floating_point()]
    try:
        for tensor, _ in before:
            tensor.data = tensor.data.float()
        for module in hooked.model.modules():  # the one number that is no weight
            if isinstance(getattr(module, "scalar_embed_scale", None), float):
                module.embed_scale.data.fill_(module.scalar_embed_scale)
        yield hooked.oracles[REFERENCE]
    finally:
        for tensor, dtype in before:
            tensor.data = tensor.data.to(dtype)
