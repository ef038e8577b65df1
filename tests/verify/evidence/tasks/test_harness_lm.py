from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Gemma2ForCausalLM

from tests.worlds import tiny_base, tiny_tokenizer
from verify.engines.runners import HookedRunner, Reading
from verify.evidence.tasks.harness_lm import RunnerLM, continuation_score
from verify.evidence.tasks.harness_tasks import HarnessError


class World:
    def __init__(self, folder: Path) -> None:
        tiny_tokenizer(tiny_base(folder))
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = Gemma2ForCausalLM.from_pretrained(folder, attn_implementation="eager")
        self.model.eval()

    def lm(self, **options: Any) -> RunnerLM:
        return RunnerLM(HookedRunner("base", self.model), self.tokenizer, **options)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.no_grad()
    def naive(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Token after token, each with a forward pass of its own."""
        total, greedy = 0.0, True
        for n, token in enumerate(continuation):
            ids = torch.tensor([[*context, *continuation[:n]]])
            likelihoods = self.model(ids).logits[0, -1].double().softmax(-1).log()
            total += float(likelihoods[token])
            greedy &= int(likelihoods.argmax()) == token
        return total, greedy


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("model"))


def asked(*pairs: tuple[str, ...]) -> list[Any]:
    return [SimpleNamespace(args=pair, task_name="some_task") for pair in pairs]


PAIRS = [
    ("which is it?\nanswer:", " A"),
    ("which is it?\nanswer:", " B"),
    ("which is it?\nanswer:", " a long one"),
    ("short", "er"),
    ("short", " C"),
    ("a context that ends in a space ", "so"),
    ("", "nothing before"),
]


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_likelihoods_are_those_of_one_token_after_another(
    world: World, batch_size: int | None
) -> None:
    found = world.lm(batch_size=batch_size).loglikelihood(asked(*PAIRS))
    for (context, continuation), (likelihood, greedy) in zip(PAIRS, found, strict=True):
        whole = [2, *world.ids(context + continuation)]
        n_context = 1 + len(world.ids(context.rstrip(" ")))
        expected = world.naive(whole[:n_context], whole[n_context:])
        assert likelihood == pytest.approx(expected[0], abs=1e-4)
        assert greedy is expected[1]


def test_the_greedy_continuation_is_named(world: World) -> None:
    context = world.ids("abc")
    ids = [2, *context]
    for _ in range(3):
        with torch.no_grad():
            ids.append(int(world.model(torch.tensor([ids])).logits[0, -1].argmax()))
    tail = ids[1 + len(context) :]
    assert world.lm()._loglikelihood_tokens([(None, ids[:-3], tail)])[0][1] is True
    tail[-1] = (tail[-1] + 1) % 90
    assert world.lm()._loglikelihood_tokens([(None, ids[:-3], tail)])[0][1] is False


def test_requests_of_one_context_are_one_forward_pass(world: World) -> None:
    lm = world.lm()
    rows: list[tuple[int, int]] = []
    read = lm._runner.read

    def watched(ids: Any, mask: Any, wanted: Any, scored: Any) -> Reading:
        rows.append((len(ids), int((wanted | scored).sum())))
        return read(ids, mask, wanted, scored)

    lm._runner.read = watched  # type: ignore[method-assign]
    lm.loglikelihood(asked(*[("one context:", f" {letter}") for letter in "ABCD"]))
    assert rows == [(1, 1)]  # and one token's logits


def test_bos_stands_in_front_once(world: World) -> None:
    lm = world.lm()
    assert lm.tok_encode("ab") == [2, *world.ids("ab")]
    assert lm.tok_encode("<bos>ab") == [2, *world.ids("ab")]
    assert lm.tok_encode("ab", add_special_tokens=False) == world.ids("ab")
    assert lm.tok_encode("ab", add_special_tokens=True) == [2, *world.ids("ab")]


def test_long_prompts_lose_their_beginning(world: World) -> None:
    found = world.lm(max_length=10).loglikelihood(asked(("a rather long context", " A")))
    context = [2, *world.ids("a rather long context")][-10:]
    assert found[0][0] == pytest.approx(world.naive(context, world.ids(" A"))[0], abs=1e-4)


@pytest.mark.parametrize("max_length", [None, 50, 6])
def test_rolling_predicts_every_token_once(world: World, max_length: int | None) -> None:
    texts = ["the bell that tolls", "x", "kites and ferries, bells and kites"]
    found = world.lm(max_length=max_length).loglikelihood_rolling(asked(*[(t,) for t in texts]))
    for text, likelihood in zip(texts, found, strict=True):
        ids, width, expected = world.ids(text), max_length or 1000, 0.0
        for start in range(0, len(ids), width):
            part = ids[start : start + width]
            # The last window is filled up with what came before.
            first = max(0, start + len(part) - width) if start else 0
            before = [2] if not start else ids[first - 1 : start]
            expected += world.naive(before, part)[0]
        assert likelihood == pytest.approx(expected, abs=1e-3)


def test_generation_is_refused(world: World) -> None:
    with pytest.raises(HarnessError, match="some_task: generates text; expected a task"):
        world.lm().generate_until(asked(("context", "{}")))


def test_a_score_by_hand() -> None:
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 5.0, 0.0]])
    likelihood, greedy = continuation_score(logits, [2, 1])
    rest = torch.tensor([0.0, 5.0, 0.0]).double().softmax(0)[1].log()
    assert likelihood == pytest.approx(float(rest) - 1.0986122886681098)
    assert greedy is False
    assert continuation_score(logits, [1])[1] is True
