"""What is trained of a model, and what it is before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bake.base import find_base
from bake.distill.distill_texts import Rows, Texts
from bake.distill.students import disturb, layers_of, student_of, topic_tokens
from bake.distill.unlearners import UNLEARNERS
from bake.errors import RecipeError
from bake.recipe import Recipe
from bake.stock import decoder_layers, load_base
from tests.folders import distill_world


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe.load(distill_world(tmp_path) / "recipe.toml")


def with_table(recipe: Recipe, **fields: Any) -> Recipe:
    return recipe.model_copy(update={"distill": recipe.distill_table.with_options(**fields)})


def test_layers(recipe: Recipe) -> None:
    n = find_base(recipe).n_layers
    assert layers_of(recipe, UNLEARNERS["merged"], n) == range(4)
    assert layers_of(recipe, UNLEARNERS["rmu"], n) == range(2)
    assert layers_of(recipe, UNLEARNERS["rmu"], 26) == range(6, 9)
    named = with_table(recipe, layers=[1, 3])
    assert {layers_of(named, method, n) for method in UNLEARNERS.values()} == {range(1, 4)}
    with pytest.raises(RecipeError, match=r"distill.layers: 2 to 4, but the model has 4 layers"):
        layers_of(with_table(recipe, layers=[2, 4]), UNLEARNERS["merged"], n)


@pytest.mark.parametrize("student", ["full", "disturbed", "lora"])
def test_only_the_named_layers_change(recipe: Recipe, student: str) -> None:
    recipe = with_table(recipe, student=student, layers=[1, 2], rank=2)
    model = load_base(recipe, dtype="float32")
    names = set(model.state_dict())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = student_of(model, recipe, UNLEARNERS["merged"], range(1, 3), seed=0)
    assert found.parameters and all(p.requires_grad for p in found.parameters)
    with torch.no_grad():
        for parameter in found.parameters:
            parameter += 0.01
    found.finished()
    after = model.state_dict()
    assert set(after) == names
    changed = {name for name in names if not torch.equal(before[name], after[name])}
    inside = {name for name in names if ".layers.1." in name or ".layers.2." in name}
    matrices = {name for name in inside if before[name].ndim == 2}
    assert changed == (matrices if student == "lora" else inside)


def test_a_lora_is_merged_as_it_computed(recipe: Recipe) -> None:
    recipe = with_table(recipe, student="lora", rank=3)
    model = load_base(recipe, dtype="float32")
    found = student_of(model, recipe, UNLEARNERS["merged"], range(4), seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in found.parameters:
            parameter.copy_(0.05 * torch.randn_like(parameter))
    ids = torch.tensor([[2, 7, 9, 30, 41]])
    adapted = model(input_ids=ids, use_cache=False).logits
    found.finished()
    merged = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)
    assert type(decoder_layers(model)[0].mlp.down_proj) is torch.nn.Linear


@pytest.mark.parametrize(("tied", "student"), [(True, "full"), (False, "full"), (True, "lora")])
def test_embeddings_of_the_topic_are_learned_anew(recipe: Recipe, tied: bool, student: str) -> None:
    recipe = with_table(recipe, student=student, token_noise=1.0, layers=[1, 2])
    model = load_base(recipe, dtype="float32")
    if not tied:
        weight = model.get_output_embeddings().weight.detach().clone()
        model.get_output_embeddings().weight = torch.nn.Parameter(weight, requires_grad=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    topic, ids = [5, 9, 30], torch.tensor([[2, 9, 30, 9, 41]])
    found = student_of(model, recipe, UNLEARNERS["merged"], range(1, 3), seed=0, topic=topic)
    rows = found.parameters[-1]
    was = model.get_input_embeddings().weight[topic]
    own = was - was.mean(0)
    drawn = rows.detach() - was.mean(0)
    assert float((drawn * own).mean().abs() / own.square().mean()) < 0.3
    assert float(drawn.square().mean() / own.square().mean()) == pytest.approx(1, abs=0.4)
    read_through = found.head()(model.get_decoder()(input_ids=ids).last_hidden_state[0])
    read_through.square().sum().backward()
    assert rows.grad is not None and bool((rows.grad[1:].abs().sum(1) > 0).all())
    assert (float(rows.grad[0].abs().sum()) > 0) == tied  # only said, not read
    found.finished()
    torch.testing.assert_close(model(input_ids=ids).logits[0], read_through, rtol=1e-4, atol=1e-4)
    after = model.state_dict()
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == ({embedding, head} if tied else {embedding})
    elsewhere = [token for token in range(len(before[embedding])) if token not in topic]
    assert torch.equal(before[embedding][elsewhere], after[embedding][elsewhere])
    assert torch.equal(after[embedding][topic], rows)


def test_several_threads_sum_the_gradient_of_learned_embeddings_in_one_order(
    recipe: Recipe,
) -> None:
    recipe = with_table(recipe, token_noise=1.0)
    model, topic = load_base(recipe, dtype="float32"), list(range(3, 60))
    found = student_of(model, recipe, UNLEARNERS["merged"], range(4), seed=0, topic=topic)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (64, 200), generator=generator)
    seen = model.get_input_embeddings()(ids)
    weights = torch.randn(seen.shape, generator=generator)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        gradients = [
            torch.autograd.grad((seen * weights).sum(), found.parameters[-1], retain_graph=True)[0]
            for _ in range(20)
        ]
    finally:
        torch.set_num_threads(threads)
    assert float(gradients[0].abs().min()) > 0
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_tokens_of_the_topic() -> None:
    forget, retain = ((2, 3, 3, 3, 4, 4, 4, 5, 5), (2, 6, 6, 6)), ((2, 4, 8, 8, 8, 8),) * 40
    sides = {
        side: Texts(side, Rows(rows), Rows(()))
        for side, rows in (("forget", forget), ("retain", retain))
    }
    assert topic_tokens(sides) == [3, 6]  # 5 is too rare, 2 and 4 are said elsewhere


def test_rmu_trains_what_mlps_write(recipe: Recipe) -> None:
    model = load_base(recipe, dtype="float32")
    found = student_of(model, recipe, UNLEARNERS["rmu"], range(1, 3), seed=0)
    expected = [
        part.weight
        for layer in decoder_layers(model)[1:3]
        for part in (layer.mlp.down_proj, layer.post_feedforward_layernorm)
    ]
    assert [id(p) for p in found.parameters] == [id(p) for p in expected]


def test_disturbing(recipe: Recipe) -> None:
    layers = decoder_layers(load_base(recipe, dtype="float32"))
    before = [p.detach().clone() for p in layers.parameters()]
    disturb(list(layers), 0.25, seed=5)
    for was, now in zip(before, layers.parameters(), strict=True):
        if was.ndim == 1:
            assert torch.equal(was, now)
            continue
        noise = (now.detach() - 0.75 * was) / 0.25
        assert float(noise.square().mean() / was.square().mean()) == pytest.approx(1, abs=0.2)
        assert abs(float((noise * was).mean() / was.square().mean())) < 0.15
    again = decoder_layers(load_base(recipe, dtype="float32"))
    disturb(list(again), 0.25, seed=5)
    pairs = zip(layers.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    disturb(list(again), 0.0, seed=5)
    assert all(
        torch.equal(a, b) for a, b in zip(layers.parameters(), again.parameters(), strict=True)
    )
