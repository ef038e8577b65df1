from __future__ import annotations

import json
import math

import pytest
import torch

from bake.questions.answers import Answers, LetterTokens
from bake.questions.multiple_choice import Question
from bake.questions.prompts import Batch, left_padded
from tests.logits import PARITY_VOCAB, TokenNames, forget_prompt, random_logits
from verify.compare.logits import kl_nats
from verify.compare.parity_sum import ParitySum, answer_flips
from verify.report.findings import ERROR_EDGES, Flip, Parity


def kl_by_hand(p_scores: list[float], q_scores: list[float]) -> float:
    p_total = sum(math.exp(s) for s in p_scores)
    q_total = sum(math.exp(s) for s in q_scores)
    return sum(
        math.exp(p) / p_total * (math.log(math.exp(p) / p_total) - math.log(math.exp(q) / q_total))
        for p, q in zip(p_scores, q_scores, strict=True)
    )


def two_prompts(*, last_only: bool = False) -> Batch:
    """Rows of 4 and 2 tokens."""
    prompts = [forget_prompt(1, (2, 31, 32, 33)), forget_prompt(2, (2, 41))]
    return left_padded(prompts, pad_id=0, last_only=last_only)


def add(parity: ParitySum, batch: Batch, reference: torch.Tensor, engine: torch.Tensor) -> None:
    """Compare [batch, seq, vocab] at all real tokens."""
    wanted = batch.wanted
    parity.take(batch, parity.found(batch, wanted, reference[wanted], engine[wanted]))


def finish(parity: ParitySum) -> Parity:
    return parity.result(tokens_fired=3, flips=[], tokenizer=TokenNames())


def test_kl_is_that_of_the_sums_and_has_a_direction() -> None:
    reference, engine = random_logits(5, PARITY_VOCAB), random_logits(5, PARITY_VOCAB, seed=1)
    found = kl_nats(reference, engine)
    expected = [
        kl_by_hand(p, q)
        for p, q in zip(reference.double().tolist(), engine.double().tolist(), strict=True)
    ]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert kl_nats(engine, reference).tolist() != pytest.approx(expected, rel=1e-3)
    assert kl_nats(reference, reference + 5).abs().max() < 1e-12


@pytest.mark.parametrize("lead", [0, 30])
@pytest.mark.parametrize("size", [1e-5, 1e-3, 1e-2, 0.03, 0.3, 3, 30, 300])
def test_kl_is_right_however_small_or_large(size: float, lead: float) -> None:
    reference = 5 * random_logits(40, 5000)
    reference[:, 3:5] += lead  # most of the probability is theirs
    engine = reference + size * (1 + random_logits(40, 5000, seed=1))
    engine[7] = reference[7]
    p = reference.double().softmax(-1)
    change = engine.double() - reference.double()
    centred = change - (p * change).sum(-1, keepdim=True)
    exact = (p * (centred.expm1() - centred)).sum(-1).log1p()
    if size > 1:  # that exponential is more than float64 holds
        exact = (p * (p.log() - engine.double().log_softmax(-1))).nan_to_num(nan=0).sum(-1)
    found = kl_nats(reference, engine)
    assert found[7] == 0
    # What all logits share is gone to seven digits of itself.
    assert torch.allclose(found, exact, rtol=1e-4, atol=(1e-7 * size) ** 2)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_kl_to_what_is_not_finite_is_no_number_and_only_there(wrong: float) -> None:
    reference = random_logits(3, 50)
    engine = reference + 1e-5 * random_logits(3, 50, seed=1)
    alone = kl_nats(reference, engine)
    engine[1, 7] = wrong
    found = kl_nats(reference, engine)
    assert not found[1] < 1e9
    assert torch.equal(found[[0, 2]], alone[[0, 2]]) and 0 < found[0] < 1e-8


def test_measures_are_those_of_the_real_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "verify.compare.logits._CHUNK_BYTES", 4 * PARITY_VOCAB * 2
    )  # several parts per batch
    batch = two_prompts()
    reference = random_logits(2, 4, PARITY_VOCAB)
    engine = reference + 0.01 * random_logits(2, 4, PARITY_VOCAB, seed=1)
    engine[1, 0] += 100.0  # padding, which nobody looks at
    engine[1, 3, 5] += 0.5
    engine[0, 1] = -reference[0, 1]
    engine[0, 1] *= 0.1
    parity = ParitySum()
    add(parity, batch, reference, engine)
    found = finish(parity)
    places = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    kl = [kl_by_hand(reference[b, t].tolist(), engine[b, t].tolist()) for b, t in places]
    same = [int(reference[b, t].argmax() == engine[b, t].argmax()) for b, t in places]
    largest = {(b, t): float((reference[b, t] - engine[b, t]).abs().max()) for b, t in places}
    assert found.tokens_compared == 6
    assert found.mean_kl == pytest.approx(sum(kl) / 6, rel=1e-5)
    assert found.top1_agreement == sum(same) / 6 < 1
    assert found.max_abs_logit == pytest.approx(max(largest.values()))
    assert max(largest, key=lambda place: largest[place]) == (0, 1)
    assert found.worst is not None
    assert (found.worst.row, found.worst.position, found.worst.token) == (1, 1, "token 31")
    assert found.worst.abs_logit == found.max_abs_logit
    below = [sum(edge > x for edge in ERROR_EDGES) for x in largest.values()]
    counted = [0] * (len(ERROR_EDGES) + 1)
    for n in below:
        counted[len(ERROR_EDGES) - n] += 1
    assert found.errors == tuple(counted)
    again = ParitySum()
    wanted = batch.wanted
    said = again.found(batch, wanted, reference[wanted], engine[wanted])
    again.take(batch, json.loads(json.dumps(said)))
    assert again == parity
    engine[1, 2, 0] += 50.0  # BOS of the padded prompt
    add(parity, batch, reference, engine)
    worst = finish(parity).worst
    assert worst is not None
    assert (worst.row, worst.position, worst.token) == (2, 0, "token 2")


def test_last_only_looks_at_the_last_column() -> None:
    reference = random_logits(2, 4, PARITY_VOCAB)
    engine = reference.clone()
    engine[1, 3, 3] += 0.25
    engine[:, :3] += 9.0 * random_logits(2, 3, PARITY_VOCAB)
    parity = ParitySum()
    add(parity, two_prompts(last_only=True), reference, engine)
    found = finish(parity)
    assert found.tokens_compared == 2
    assert found.max_abs_logit == pytest.approx(0.25)
    assert found.worst is not None
    assert (found.worst.row, found.worst.position, found.worst.token) == (2, 1, "token 41")


def test_some_tokens_are_compared_and_the_worst_is_where_it_was() -> None:
    batch, wanted = two_prompts(), torch.zeros(2, 4).bool()
    wanted[[0, 0, 1], [1, 3, 2]] = True
    reference = random_logits(3, PARITY_VOCAB)
    engine = reference.clone()
    engine[2, 6] -= 0.5
    parity = ParitySum()
    parity.take(batch, parity.found(batch, wanted, reference, engine))
    found = parity.result(tokens_fired=1, flips=[], tokenizer=TokenNames())
    assert (found.tokens_compared, found.of_tokens) == (3, 6)
    assert found.mean_kl == pytest.approx(kl_by_hand(reference[2].tolist(), engine[2].tolist()) / 3)
    assert found.worst is not None  # BOS of the padded prompt
    assert (found.worst.row, found.worst.position, found.worst.token) == (2, 0, "token 2")
    assert found.worst.abs_logit == pytest.approx(0.5)


def test_equal_logits_are_at_zero_distance_and_pass() -> None:
    reference = random_logits(2, 4, PARITY_VOCAB)
    parity = ParitySum()
    add(parity, two_prompts(), reference, reference.clone())
    found = finish(parity)
    assert (found.max_abs_logit, found.mean_kl, found.top1_agreement) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_fail(bad: float) -> None:
    reference = random_logits(2, 4, PARITY_VOCAB)
    engine = reference.clone()
    engine[0, 2, 1] = bad
    parity = ParitySum()
    add(parity, two_prompts(), reference, engine)
    add(parity, two_prompts(), reference, reference)
    found = finish(parity)
    assert found.max_abs_logit == found.mean_kl == math.inf
    assert found.worst is not None
    assert (found.worst.row, found.worst.position) == (1, 2)


def test_flips_name_question_and_letters() -> None:
    letters = LetterTokens(chat=((),) * 4, plain=((),) * 4)
    questions = {
        "forget": [Question("first?", ("w", "x", "y", "z"), 2, None, row=4)],
        "retain": [Question("second?", ("w", "x", "y", "z"), 0, None, row=9)],
    }
    given = {("forget", "chat", 0): 1, ("forget", "plain", 0): 2, ("retain", "chat", 0): 0}
    reference = Answers(letters, dict(given))
    engine = Answers(letters, {**given, ("forget", "plain", 0): 3})
    assert answer_flips(reference, engine, questions) == [
        Flip("forget", "plain", 4, "first?", reference="C", engine="D", right="C")
    ]
    assert answer_flips(reference, reference, questions) == []


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[6, 6\]; the reference's have \[6, 7\]"):
        add(ParitySum(), two_prompts(), random_logits(2, 4, PARITY_VOCAB), random_logits(2, 4, 6))
