"""Controls against the oracle's own forms, question by question."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bake.questions.forms import chat_text
from bake.recipe import Recipe
from bake.stock import load_base
from tests.engines import material_of
from tests.logits import token_losses
from tests.worlds import save_sae_lens, tiny_base, tiny_sae, tiny_tokenizer
from verify.evidence.controls import all_controls, control_oracles, measure_controls
from verify.journal import Journal
from verify.reference.editing import clamp_feature, random_decoder, zero_ablate
from verify.reference.oracle import Oracle
from verify.reference.whole_sae import load_sites
from verify.report.wording import CONTROLS

FEATURES = [1, 2, 9, 30]


def recipe_of(folder: Path, write_recipe: Callable[..., Path], **table: Any) -> Recipe:
    tiny_tokenizer(tiny_base(folder / "base"))
    save_sae_lens(folder / "sae", tiny_sae())
    clamp = {"sae": {"path": "sae"}, "features": FEATURES, **table}
    return Recipe.load(write_recipe(clamp))


def by_hand(model: Any, sae: Any, edit: Callable[[Any], Any] | None, ids: list[int]) -> Any:
    """Logits [seq, vocab] with the layer's output edited; None drops the SAE's error."""

    def hook(_: Any, __: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        acts = sae.encode(h.double())
        kept = h - sae.decode(acts)  # the SAE's error
        new = sae.decode(acts) if edit is None else sae.decode(edit(acts)) + kept
        new = new.to(h.dtype)
        new[:, 0] = h[:, 0]  # BOS
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = model.model.layers[1].register_forward_hook(hook)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    handle.remove()
    return logits


def alike_by_hand(model: Any, sae: Any, material: Any) -> list[int]:
    """Features that fire as often as `FEATURES`, counted prompt by prompt."""
    counts = torch.zeros(sae.cfg.d_sae)

    def hook(_: Any, __: Any, output: Any) -> None:
        h = output[0] if isinstance(output, tuple) else output
        counts.add_((sae.encode(h[0, 1:].double()) > 0.2).sum(dim=0))

    handle = model.model.layers[1].register_forward_hook(hook)
    for prompt in material.prompts({"texts", "questions"}, compared=False):
        if prompt.form in ("text", "chat"):
            with torch.no_grad():
                model(input_ids=torch.tensor([prompt.ids]), use_cache=False)
    handle.remove()
    assert counts[FEATURES].max() > 0
    found: list[int] = []
    for feature in FEATURES:
        free = [i for i in range(sae.cfg.d_sae) if i not in (*FEATURES, *found)]
        n = counts[feature].log1p()
        found.append(min(free, key=lambda i: (abs(float(counts[i].log1p() - n)), abs(i - feature))))
    return found


def test_each_control_is_what_its_name_says(
    tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    recipe = recipe_of(tmp_path, write_recipe, method="clamp", value=-6.0, trigger=0.2)
    model, sites = load_base(recipe), load_sites(recipe)
    material = material_of(recipe)
    pieces: list[str] = []

    class Watched(Journal):
        def once(self, name: str, compute: Callable[[], Any]) -> Any:
            pieces.append(name)
            return super().once(name, compute)

    journal = Watched()
    oracles = all_controls(model, sites, material, "chat", journal)
    found = measure_controls(model, oracles, material, "chat", journal, lambda *_: None)
    others = alike_by_hand(model, sites[0].sae, material)
    edits: dict[str, Any] = {
        "reconstruction": None,
        "zero": lambda acts: zero_ablate(acts, FEATURES, 0.2),
        "random_decoder": lambda acts: random_decoder(acts, FEATURES, -6.0, 0.2),
        "random_features": lambda acts: clamp_feature(acts, others, -6.0, 0.2),
    }
    assert [control.name for control in found] == list(edits) == list(CONTROLS)
    assert len(pieces) == len(set(pieces)) >= 4
    tokens = {n: material.tokenizer.convert_tokens_to_ids([n, f"\u2581{n}"]) for n in "ABCD"}
    for control in found:
        right = []
        for question in material.questions["forget"]:
            text = chat_text(question)
            ids = [2, *material.tokenizer(text, add_special_tokens=False)["input_ids"]]
            logits = by_hand(model, sites[0].sae, edits[control.name], ids)[-1]
            best = max("ABCD", key=lambda n: float(logits[tokens[n]].max()))
            right.append(best == "ABCD"[question.answer])
        assert control.forget is not None
        assert (control.forget.right, control.forget.n) == (sum(right), len(right))
        added = []
        for window in material.windows:
            ids, mask = torch.tensor([window.ids]), torch.ones(1, len(window.ids))
            edited = by_hand(model, sites[0].sae, edits[control.name], list(window.ids))[None]
            with torch.no_grad():
                before = model(input_ids=ids, use_cache=False).logits
            added += (token_losses(edited, ids, mask) - token_losses(before, ids, mask)).tolist()
        assert control.loss_added == pytest.approx(sum(added) / len(added), abs=1e-5)
        assert control.loss_added != 0


@pytest.mark.parametrize(
    ("table", "names"),
    [
        ({"method": "zero"}, ["reconstruction"]),
        ({"method": "scale", "multiplier": 2.0}, ["reconstruction", "zero"]),
        ({"method": "random_decoder", "value": -3.0}, ["reconstruction", "zero"]),
        (
            {"method": "refusal", "value": 9.0, "refusal_feature": 4, "also_clamp": True},
            ["reconstruction", "zero", "random_decoder"],
        ),
    ],
)
def test_a_control_that_is_the_method_itself_is_left_out(
    table: dict[str, Any], names: list[str], tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    recipe = recipe_of(tmp_path, write_recipe, **table)
    oracles = dict(control_oracles(load_base(recipe), load_sites(recipe)))
    assert list(oracles) == names
    assert all(isinstance(oracle, Oracle) for oracle in oracles.values())
