from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import Gemma2ForCausalLM

from bake.questions.prompts import Prompt, left_padded
from bake.recipe import Recipe
from bake.stock import load_base
from tests.engines import PlainOnly
from tests.worlds import KINDS, save_sae_lens, tiny_base, tiny_sae
from verify.engines.runners import HookedRunner, Runner, TorchRunner
from verify.engines.token_tree import TokenTree, TreeRunner, merge
from verify.reference.oracle import Oracle
from verify.reference.whole_sae import load_sites

# Longer than the tiny models' sliding window of 8, and of unequal parts.
PARTS = ((10, 11, 12), (20,), (30, 31, 32, 33, 34), (40, 41))
SEQUENCES = [
    (2, 5, 6, 7, *itertools.chain(*order), 8, 9) for order in itertools.permutations(PARTS)
]


def test_sequences_come_back_out_of_the_tree() -> None:
    sequences = [*SEQUENCES, (2, 5), SEQUENCES[3], (9,)]
    tree = merge(sequences)
    for sequence, node in zip(sequences, tree.ends, strict=True):
        path: list[int] = []
        while node >= 0:
            path.insert(0, tree.ids[node])
            node = tree.parents[node]
        assert tuple(path) == sequence
    prefixes = {sequence[:n] for sequence in sequences for n in range(1, len(sequence) + 1)}
    assert len(tree.ids) == len(prefixes)


@pytest.fixture(params=["parted", "one row"])
def one_row(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "parted":
        tensors = TokenTree.tensors
        monkeypatch.setattr("verify.engines.token_tree.ONE_ROW", 0)
        monkeypatch.setattr(TokenTree, "tensors", lambda self, _: tensors(self, 0))


def test_a_token_sees_its_own_sequence_only(monkeypatch: pytest.MonkeyPatch) -> None:
    small = merge([(1, 2, 3), (1, 4)]).tensors(0)
    assert small["trunk"].shape == (1, 0) and small["input_ids"].tolist() == [[1, 2, 3, 4]]
    monkeypatch.setattr("verify.engines.token_tree.ONE_ROW", 0)
    tree = merge([(1, 2, 3), (1, 4), (1, 2, 5), (1, 2, 5)])
    tensors = {name: tensor.tolist() for name, tensor in tree.tensors(0).items()}
    assert tensors["trunk"] == [[1]]
    assert tensors["input_ids"] == [[2, 3, 5], [0, 0, 4]]
    assert tensors["attention_mask"] == [[1, 1, 1], [0, 0, 1]]
    assert tensors["position_ids"] == [[1, 2, 2], [0, 0, 1]]
    assert tensors["ends"] == [[0, 1], [1, 2], [0, 2], [0, 2]]
    seen = [[[1, 0, 0], [1, 1, 0], [1, 0, 1]], [[1, 0, 0], [0, 1, 0], [0, 0, 1]]]
    assert tensors["visible"] == [[[bool(x) for x in row] for row in rows] for rows in seen]
    with pytest.raises(ValueError, match="empty sequence"):
        merge([(1, 2), ()])


@pytest.mark.parametrize(
    ("sequences", "trunk", "branches"),
    [
        ([(1, 2), (1, 2, 3), (1, 2, 4)], 1, 1),  # what a sequence ends in is no trunk
        ([(1, 2, 3)], 2, 1),
        ([(1,), (1,)], 0, 1),
        ([(1, 2), (3, 4)], 0, 2),
    ],
)
def test_the_trunk_ends_where_a_sequence_does(
    sequences: list[tuple[int, ...]],
    trunk: int,
    branches: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("verify.engines.token_tree.ONE_ROW", 0)
    tensors = merge(sequences).tensors(0)
    assert (tensors["trunk"].shape[1], len(tensors["input_ids"])) == (trunk, branches)
    for sequence, (row, node) in zip(sequences, tensors["ends"].tolist(), strict=True):
        seen = tensors["visible"][row, node]
        order = tensors["position_ids"][row][seen].argsort()
        own = tensors["input_ids"][row][seen][order].tolist()
        ids = [*tensors["trunk"][0].tolist(), *own]
        assert tuple(ids) == sequence


@pytest.fixture(params=KINDS)
def oracle(
    request: pytest.FixtureRequest, tmp_path: Path, write_recipe: Callable[..., Path]
) -> Iterator[Oracle]:
    tiny_base(tmp_path / "base", request.param)
    save_sae_lens(tmp_path / "sae", tiny_sae())
    table = {"sae": {"path": "sae"}, "method": "clamp", "features": [0, 1, 2, 3], "value": -5.0}
    recipe = Recipe.load(write_recipe(table))
    yield Oracle(load_base(recipe), load_sites(recipe))


@pytest.mark.parametrize(
    "sequences", [[(2, 5, 6), (2, 5, 6, 7, 8), (2, 5, 9)], [(5, 6, 7)], [(5, 6), (7, 8, 9, 10)]]
)
@pytest.mark.usefixtures("one_row")
def test_trees_of_any_shape(sequences: list[tuple[int, ...]], oracle: Oracle) -> None:
    for runner in (HookedRunner("base", oracle.model), HookedRunner("x", oracle.model, oracle)):
        expected = torch.stack([alone(runner, ids) for ids in sequences])
        found = runner.tree_logits(merge(sequences))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def alone(runner: Runner, ids: tuple[int, ...]) -> torch.Tensor:
    batch = left_padded([Prompt("x", "x", 1, ids, False)], pad_id=0, last_only=True)
    return runner.logits(batch.input_ids, batch.attention_mask)[0]


@pytest.mark.usefixtures("one_row")
def test_the_tree_gives_the_logits_of_every_sequence_alone(oracle: Oracle) -> None:
    base = HookedRunner("base", oracle.model)
    reference = HookedRunner("reference", oracle.model, oracle)
    tree = merge(SEQUENCES)
    found = {runner.name: runner.tree_logits(tree) for runner in (base, reference)}
    for runner in (base, reference):
        expected = torch.stack([alone(runner, ids) for ids in SEQUENCES])
        assert found[runner.name].dtype == torch.float32
        torch.testing.assert_close(found[runner.name], expected, rtol=0, atol=2e-5)
    assert oracle.tokens_fired > 0
    assert not torch.allclose(found["base"], found["reference"], atol=1e-2)
    # The sequences differ from one another, and the tree left nothing on the model.
    assert float(found["base"].std(dim=0).max()) > 0.1
    assert not oracle.model._forward_pre_hooks


def test_a_worker_process_reads_trees_alike(tmp_path: Path) -> None:
    tiny_base(tmp_path / "base", "gemma2")
    model = Gemma2ForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    with TorchRunner(tmp_path / "base") as worker:
        worker.load("float32")
        found = worker.tree_logits(merge(SEQUENCES))
    expected = HookedRunner("base", model).tree_logits(merge(SEQUENCES))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_which_engines_read_trees() -> None:
    base = HookedRunner("base", None)
    assert isinstance(base, TreeRunner)
    assert not isinstance(PlainOnly(base), TreeRunner)
