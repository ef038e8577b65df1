"""How much of a clamp's push per-layer embeddings take back, against plain arithmetic and against
the same model without them; and what goes past a clamp, in words.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from bake.errors import BakeoutError
from bake.questions.prompts import Batch
from bake.recipe import Recipe
from bake.stock import decoder_layers, load_base
from bakeout.cli import run
from bakeout.verbs.baking import bake_recipe
from export.passing_by import passing_by, ranges
from tests.folders import write_verify_recipe
from tests.worlds import (
    N_LAYERS,
    save_sae_lens,
    tiny_base,
    tiny_config,
    tiny_model,
    tiny_sae,
    tiny_tokenizer,
    write_questions,
    write_texts,
)
from verify.evidence import leak
from verify.evidence.leak import Leak, measure_leak
from verify.reference.oracle import Oracle
from verify.reference.whole_sae import load_sites
from verify.run import verify_folder

KIND = "gemma4_text, per-layer embeddings"
CLAMP = {"sae": {"path": "sae"}, "method": "clamp", "features": [1, 2, 5, 9, 20], "value": -6.0}


def trained(folder: Path) -> tuple[Path, torch.Tensor]:
    """A model that answers every token with one of its own, and which that is: [90]."""
    config = tiny_config(KIND)
    config.initializer_range = 0.1
    model = tiny_model(KIND, config)
    draws = torch.Generator().manual_seed(1)
    answers = torch.randperm(90, generator=draws)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(200):
        ids = torch.randint(3, 90, (32, 12), generator=draws)
        logits = model(input_ids=ids).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), answers[ids].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "base")
    save_sae_lens(folder / "sae", tiny_sae(), layer=1)
    return folder, answers


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Oracle, torch.Tensor]:
    folder, answers = trained(tmp_path_factory.mktemp("trained"))
    recipe = Recipe.load(write_verify_recipe(folder / "recipe.toml", CLAMP))
    return Oracle(load_base(recipe), load_sites(recipe)), answers


def a_batch() -> Batch:
    ids = torch.randint(3, 90, (8, 14), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    ids[0, 4], ids[1:, 0] = 2, 2
    return Batch((), ids, mask, last_only=False)


def without_embeddings(model: Any, behind: int) -> Any:
    """A copy whose layers behind one add nothing of what they are given of each token."""
    bare = copy.deepcopy(model)
    for layer in decoder_layers(bare)[behind + 1 :]:
        layer.per_layer_projection.weight.data.zero_()
    return bare


def plain(oracle: Oracle, batch: Batch) -> list[float]:
    """The three pushes, from hidden states and least squares."""
    site = oracle.sites[0]
    rows = site.sae.W_dec[[1, 2, 5, 9, 20]].double().detach().numpy()
    layers = (site.layer, N_LAYERS - 1)
    found = []
    bare = Oracle(without_embeddings(oracle.model, site.layer), oracle.sites)
    for of, wanted in ((oracle, layers), (bare, layers[1:])):
        streams: dict[bool, dict[int, torch.Tensor]] = {}
        for hooked in (False, True):
            kept = streams[hooked] = {}
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
            with torch.no_grad():
                if hooked:
                    with of.applied() as model:
                        _hidden(model, kept, inputs | {"position_ids": positions})
                else:
                    _hidden(of.model, kept, inputs | {"position_ids": positions})
        assert of.last_fired is not None
        for layer in wanted:
            h = streams[False][layer][of.last_fired].double().numpy()
            moved = streams[True][layer][of.last_fired].double().numpy() - h
            solved = torch.linalg.lstsq(torch.from_numpy(rows.T), torch.from_numpy(moved.T))
            along = solved.solution.numpy().T @ rows
            found.append(float(((along**2).sum() / (h**2).sum()) ** 0.5))
    return found


def _hidden(model: Any, kept: dict[int, torch.Tensor], inputs: dict[str, torch.Tensor]) -> None:
    handles = [
        layer.register_forward_hook(lambda _, __, out, number=number: kept.update({number: out}))
        for number, layer in enumerate(decoder_layers(model))
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()


def test_the_pushes_are_those_of_plain_arithmetic(world: tuple[Oracle, torch.Tensor]) -> None:
    oracle, _ = world
    found = measure_leak(oracle, [a_batch()])
    assert found.layer == 1 and 20 < found.tokens <= int(a_batch().attention_mask.sum()) - 8
    expected = plain(oracle, a_batch())
    assert [found.behind, found.last, found.without] == pytest.approx(expected, rel=1e-4)
    assert found.back == pytest.approx(1 - expected[1] / expected[2], abs=1e-4)
    assert not any(layer._forward_pre_hooks for layer in oracle.layers)

    def full(_: Any, given: tuple[Any, ...]) -> None:
        if len(given[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = oracle.layers[-1].register_forward_pre_hook(full)
    halved = measure_leak(oracle, [a_batch()])
    hook.remove()
    assert vars(halved) == pytest.approx(vars(found), rel=1e-5)


def test_a_trained_model_has_some_of_it_back_and_says_so_and_without_them_nothing(
    world: tuple[Oracle, torch.Tensor],
) -> None:
    oracle, answers = world
    batch = a_batch()

    def right(of: Oracle) -> float:
        with torch.no_grad(), of.applied() as model:
            said = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        assert of.last_fired is not None
        fired = of.last_fired
        return float((said.argmax(-1) == answers[batch.input_ids])[fired].float().mean())

    found = measure_leak(oracle, [batch])
    bare = Oracle(without_embeddings(oracle.model, 1), oracle.sites)
    assert found.back is not None and found.back > 0.05
    assert right(oracle) > right(bare) + 0.05  # of what was clamped, so much is said again
    nothing = measure_leak(bare, [batch])
    assert nothing.back == pytest.approx(0, abs=1e-6)
    assert nothing.without == pytest.approx(found.without, rel=1e-6)


def test_it_is_a_line_of_the_report_where_there_is_something_to_measure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_tokenizer(tiny_base(tmp_path / "base", "gemma4_text, shared keys"))
    for layer in (1, N_LAYERS - 1):
        save_sae_lens(tmp_path / f"sae{layer}", tiny_sae(), layer=layer)
    for side in ("forget", "retain"):
        write_questions(tmp_path / f"{side}.jsonl", 2)
    write_texts(tmp_path / "text.jsonl", 2)
    for layer, there in ((1, True), (N_LAYERS - 1, False)):  # behind the last there is nothing
        file = write_verify_recipe(
            tmp_path / f"{layer}.toml", CLAMP | {"sae": {"path": f"sae{layer}"}}
        )
        out = tmp_path / f"out{layer}"
        assert run(["bake", str(file), "--out", str(out)]) == 0
        said = capsys.readouterr().err
        assert ("layers 2 to 3 attend to keys and values" in said) == there
        assert ("own embedding again" in said) == there
        report = verify_folder(out, Recipe.load(file), frozenset({"integrity", "leak"}))
        assert not report.failures and ("leak" in report.more) == there
        assert run(["show", str(out)]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert ("goes past it" in shown) == there
        card = (out / "README.md").read_text()
        assert card.count("Goes past the clamp by design") == (2 if there else 0)
        if there:
            (line,) = leak.lines(report)
            assert line.startswith("leak       per-layer embeddings ")
            assert set(json.loads(json.dumps(report.to_dict()))["leak"]) == {
                *("layer", "tokens", "behind", "last", "without"),
            }
            damaged = replace(report, more={"leak": {"layer": "x"}})
            with pytest.raises(BakeoutError, match=r"report: leak\."):
                list(leak.lines(damaged))


def test_a_manifest_that_keeps_it_back_is_an_integrity_failure(tmp_path: Path) -> None:
    from tests.folders import rehash

    tiny_tokenizer(tiny_base(tmp_path / "base", KIND))
    save_sae_lens(tmp_path / "sae", tiny_sae(), layer=1)
    for side in ("forget", "retain"):
        write_questions(tmp_path / f"{side}.jsonl", 2)
    write_texts(tmp_path / "text.jsonl", 2)
    file = write_verify_recipe(tmp_path / "recipe.toml", CLAMP)
    bake_recipe(file, tmp_path / "out", force=False)
    path = tmp_path / "out" / "manifest.json"
    data = json.loads(path.read_text())
    assert data["clamps"][0].pop("embedded_again") is True
    path.write_text(json.dumps(data))
    rehash(tmp_path / "out")
    report = verify_folder(tmp_path / "out", Recipe.load(file), frozenset({"integrity"}))
    assert any("embedded_again" in failure.what for failure in report.failures)


def test_signs_and_nothing_in_words() -> None:
    class Report:
        more: dict[str, Any]

    report = Report()
    for found, words in (
        (Leak(6, 10, 0.5, 0.2, 0.4), "take back 50% of the clamp's push"),
        (Leak(6, 10, 0.5, 0.5, 0.4), "add 25% to the clamp's push"),
        (Leak(6, 0, 0.0, 0.0, 0.0), "pushed nothing on 0 tokens"),
    ):
        report.more = {"leak": vars(found)}
        (line,) = leak.lines(report)  # type: ignore[arg-type]
        assert words in line


def test_which_layers_see_keys_of_before() -> None:
    kinds = ["sliding_attention", "full_attention"] * 3
    shared = {"num_hidden_layers": 6, "num_kv_shared_layers": 3, "layer_types": kinds}
    # Layer 1 lends to 3 and 5, layer 2 to 4.
    assert passing_by(shared, 0) == {}
    assert passing_by(shared, 1) == {"old_keys": [3, 5]}
    assert passing_by(shared, 2) == {"old_keys": [3, 4, 5]}
    assert passing_by({"text_config": shared}, 3) == {"old_keys": [4, 5]}
    assert passing_by(shared, 5) == {}
    fed = {"num_hidden_layers": 6, "hidden_size_per_layer_input": 4}
    assert passing_by(fed, 4) == {"embedded_again": True} and passing_by(fed, 5) == {}
    assert passing_by({"num_hidden_layers": 6}, 1) == {}
    assert ranges([3, 5, 6, 7, 9]) == "3, 5 to 7, 9"
