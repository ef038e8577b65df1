"""Multiple choice: 24 orders as one tree against 24 prompts; each question once, in trees or
batches as `last_logits` chooses, against either; plain form against lm-eval's HF model.

Each on the shipped miniature with its own questions, and on a random Gemma 2 of gemma-2-2b's
proportions (depth, width and vocabulary each smaller, the head's share of the work the same) with
questions of the miniature's words at given lengths. Variants run in turn within each round, so that
a ratio compares neighbours in time. Ends with exit code 1 where two ways do not say the same.

    python benchmarks/choices.py [--rounds 5] [--width 768] [--layers 8] [--only plain]
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bake.questions.answers import letter_log_likelihoods, letter_tokens
from bake.questions.forms import chat_text, plain_text
from bake.questions.multiple_choice import Question, load_questions
from bake.questions.orders import ORDERS, in_order
from bake.questions.prompts import encoded
from bake.recipe import Recipe
from bake.sources import QuestionSource
from bake.stock import load_base, load_tokenizer
from verify.engines.runners import HookedRunner
from verify.engines.scoring import last_logits, token_ids
from verify.engines.token_tree import merge
from verify.evidence.known import order_ids, score_orders
from verify.material import Material

MINIATURE = Path(sys.path[0]) / "bakeout" / "miniature" / "recipe.toml"
BATCH_SIZE = 8
HEAD_SHARE = 0.29
"""Of gemma-2-2b: the head's work per token over that of its layers."""


@dataclass
class Case:
    """A model and what it is asked."""

    name: str
    model: Any
    tokenizer: Any
    questions: list[Question]


def proportioned(width: int, layers: int, least_vocab: int) -> Any:
    """A random Gemma 2 whose head has gemma-2-2b's share of the work."""
    per_layer = 3 * 4 * width**2 + 24 * width * (width // 9)  # MLP; 8 query and 4 key/value heads
    vocab = max(least_vocab, int(HEAD_SHARE * layers * per_layer / width))
    torch.manual_seed(0)
    config = tf.Gemma2Config(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=width // 9 // 2 * 2,
        query_pre_attn_scalar=width // 9,
        sliding_window=4096,
        attn_implementation="eager",
    )
    return tf.Gemma2ForCausalLM(config).eval()


def made_up(source: Sequence[Question], words: int, choice_words: int, n: int) -> list[Question]:
    """Questions of so many of the miniature's words."""
    draws = random.Random(0)
    known = [word for question in source for word in question.question.rstrip("?").split()]

    def some(count: int) -> str:
        return " ".join(draws.choices(known, k=count))

    return [
        Question(
            question=f"{some(words)}?",
            choices=(
                some(choice_words),
                some(choice_words),
                some(choice_words),
                some(choice_words),
            ),
            answer=item % 4,
            topic="bells",
            row=item + 1,
        )
        for item in range(n)
    ]


def cases(options: argparse.Namespace) -> Iterator[Case]:
    recipe = Recipe.load(MINIATURE)
    tokenizer = load_tokenizer(recipe)
    path = QuestionSource(path="questions/forget_test.jsonl")
    own = load_questions(path, recipe)
    yield Case(
        "miniature, its questions", load_base(recipe), tokenizer, own[: 6 * options.questions]
    )
    model = proportioned(options.width, options.layers, len(tokenizer))
    shape = f"{options.layers} layers of {options.width}, vocabulary {model.config.vocab_size}"
    for words, choice_words in ((15, 2), (30, 4), (80, 6)):
        asked = made_up(own, words, choice_words, options.questions)
        name = f"{shape}; questions of {words} words, choices of {choice_words}"
        yield Case(name, model, tokenizer, asked)


# --------------------------------------------------------------------------- the two comparisons


def orders(case: Case, rounds: int) -> None:
    """24 orders as a tree against separate prompts."""
    runner, letters = HookedRunner("base", case.model), letter_tokens(case.tokenizer)

    def prompts(question: Question) -> list[list[int]]:
        texts = [chat_text(in_order(question, order)) for order in ORDERS]
        encoded = [case.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return [[2, *ids] for ids in encoded]

    def separately(every_logit: bool) -> Callable[[], np.ndarray]:
        def run() -> np.ndarray:
            found = []
            for question in case.questions:
                for ids in prompts(question):
                    row = torch.tensor([ids])
                    mask = torch.ones_like(row)
                    logits = runner.logits(row, mask, mask.bool() if every_logit else None)
                    found.append(letter_log_likelihoods(logits[-1:], letters))
            return np.concatenate(found).reshape(len(case.questions), len(ORDERS), 4, 2)

        return run

    def tree() -> np.ndarray:
        material = Material({}, [], letters, case.tokenizer)
        scored = [
            score_orders(runner, question, order_ids(question, material), material)
            for question in case.questions
        ]
        return np.stack([scores.log_likelihoods for scores in scored])

    tokens = [prompts(question) for question in case.questions]
    whole = sum(len(ids) for question in tokens for ids in question)
    merged = sum(len(merge(question).ids) for question in tokens)
    each = f"{whole / len(tokens):.0f} tokens a question, as a tree {merged / len(tokens):.0f}"
    print(f"  24 orders: {each}")
    compared(
        "tree",
        tree,
        {
            "24 prompts, every logit": separately(every_logit=True),
            "24 prompts, last logits": separately(every_logit=False),
        },
        rounds,
    )


def once(case: Case, rounds: int) -> None:
    """Each question in one order."""
    runner, letters = HookedRunner("base", case.model), letter_tokens(case.tokenizer)
    batches = HookedRunner("base", case.model)
    batches.reads_trees = False
    prompts = [chat_text(question) for question in case.questions]
    asked = [[2, *ids] for ids in encoded(prompts, case.tokenizer)]

    def by(engine: HookedRunner) -> Callable[[], np.ndarray]:
        def run() -> np.ndarray:
            return letter_log_likelihoods(last_logits(engine, asked, case.tokenizer), letters)

        return run

    def one_tree() -> np.ndarray:
        return letter_log_likelihoods(runner.tree_logits(merge(asked)), letters)

    print(f"  each once: {sum(map(len, asked))} tokens, as one tree {len(merge(asked).ids)}")
    compared("as chosen", by(runner), {"batches": by(batches), "one tree": one_tree}, rounds)


def plain(case: Case, rounds: int) -> None:
    """Plain form against lm-eval's HF model, at the same batch size."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    runner, letters = HookedRunner("base", case.model), letter_tokens(case.tokenizer)
    lm = HFLM(pretrained=case.model, tokenizer=case.tokenizer, batch_size=BATCH_SIZE)

    def ours() -> np.ndarray:
        found = []
        for start in range(0, len(case.questions), BATCH_SIZE):
            texts = [plain_text(q) for q in case.questions[start : start + BATCH_SIZE]]
            logits = last_logits(runner, token_ids(texts, case.tokenizer), case.tokenizer)
            found.append(letter_log_likelihoods(logits, letters)[..., 1])
        return np.concatenate(found)

    def theirs() -> np.ndarray:
        requests = [
            Instance(
                request_type="loglikelihood",
                doc={},
                arguments=(plain_text(question), f" {letter}"),
                idx=letter_index,
            )
            for question in case.questions
            for letter_index, letter in enumerate("ABCD")
        ]
        with torch.inference_mode():
            scores = lm.loglikelihood(requests, disable_tqdm=True)
        return np.array([score for score, _ in scores]).reshape(-1, 4)

    print(f"  plain form, {BATCH_SIZE} questions at once")
    compared("ours", ours, {"lm-eval's HF model": theirs}, rounds)


def compared(
    name: str,
    fast: Callable[[], np.ndarray],
    others: dict[str, Callable[[], np.ndarray]],
    rounds: int,
) -> None:
    """Print how much faster one way is than others, and hold their log-likelihoods together."""
    ratios: dict[str, list[float]] = {other: [] for other in others}
    for _ in range(rounds + 1):
        for other, run in others.items():
            start = time.perf_counter()
            found = fast()
            middle = time.perf_counter()
            expected = run()
            ratios[other].append((time.perf_counter() - middle) / (middle - start))
            apart = float(np.abs(found - expected).max())
            if apart > 1e-4 or (best(found) != best(expected)).any():
                sys.exit(f"  {name} against {other}: log-likelihoods {apart:.1e} apart")
    for other, measured in ratios.items():
        warm = measured[1:]
        low, high = min(warm), max(warm)
        print(
            f"    {name} is {statistics.median(warm):.2f} × as fast as {other} "
            f"({low:.2f} to {high:.2f}); log-likelihoods within {apart:.0e} nats, same answers"
        )


def best(scores: np.ndarray) -> np.ndarray:
    """The letter chosen: [..., 4] or [..., 4, 2] to [...]."""
    if scores.shape[-1] == 2:
        scores = scores.max(axis=-1)
    return scores.argmax(axis=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("orders", "once", "plain"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"float32, {options.threads} threads, torch {torch.__version__}")
    for case in cases(options):
        print(f"{case.name}; {len(case.questions)} questions")
        for name, run in (("orders", orders), ("once", once), ("plain", plain)):
            if options.only in (None, name):
                run(case, options.rounds)


if __name__ == "__main__":
    main()
