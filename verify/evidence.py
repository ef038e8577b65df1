"""All engines over the same prompts, and what that shows about each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.recipe import Recipe
from verify.choices import Answers, LetterTokens, letter_tokens
from verify.clamped_folder import check_layers, check_shape, read_config
from verify.engines import Engines
from verify.firing import FiredExamples
from verify.loss import LossSum
from verify.parity import ParitySum, answer_flips
from verify.prompts import (
    QUESTION_FORMS,
    Batch,
    Prompt,
    batches,
    left_padded,
    question_prompts,
    text_prompts,
)
from verify.questions import Question, load_questions, load_texts
from verify.report import EngineReport, FiredText, Items, Parity
from verify.runners import DecodingRunner, HookedRunner, Runner

if TYPE_CHECKING:
    from torch import Tensor

    from verify.reference import Oracle

BASE, REFERENCE = "base", "reference"
REFERENCE_32 = "reference-float32"
"""The reference of engines that compute in float32, where the recipe's dtype is another."""
DECODED_PROMPTS, DECODED_TOKENS = 4, 64
"""How many forget prompts of each form, the shortest, are read token by token, and how many of
their last tokens."""
REFERENCES = (BASE, REFERENCE, REFERENCE_32)
"""Engines that are no part of a folder."""
Progress = Callable[[str, float], None]
"""Called with what is being done, and the share of it that is done, 0 to 1."""


@dataclass(frozen=True)
class Material:
    """What the engines are shown."""

    questions: Mapping[str, Sequence[Question]]
    """Of `forget` and of `retain`. Empty where no question is asked."""
    prompts: Sequence[Prompt]
    """Questions in both forms, and windows of text."""
    letters: LetterTokens
    tokenizer: Any


@dataclass(frozen=True)
class Evidence:
    """What was found."""

    engines: tuple[EngineReport, ...]
    """base, where it was asked for; reference; then the others."""
    fired_by_layer: tuple[tuple[int, int], ...]
    """(layer, tokens on which its clamp fired)."""
    never_active: tuple[tuple[int, int], ...]
    """(layer, feature) of every feature that was active nowhere in the forget questions, nor in
    the forget corpus where the recipe names one."""
    dtype: str
    """float32, bfloat16 or float16."""
    items: Items
    examples: tuple[FiredText, ...]
    """Of every source, the sequences on which the clamp fired most."""


def gather(
    folder: Path, recipe: Recipe, kinds: frozenset[str], progress: Progress, engines: Engines
) -> Evidence:
    """Run base, reference and the folder's engines side by side.

    Args:
        folder: what bakeout wrote.
        recipe: what to rebuild the reference from, with features named.
        kinds: parity, choices, loss, or several of them.
        progress: told how far it is.
        engines: of the folder; the checkpoint's code is executed in a process of its own.

    Raises:
        BakeoutError: anything that is named cannot be loaded or does not fit.
    """
    config = read_config(folder, engines.carrier)
    progress("load", 0.0)
    assert recipe.verify is not None
    asks = kinds & {"parity", "choices"}
    questions = {
        "forget": load_questions(recipe.verify.forget_questions, recipe) if asks else [],
        "retain": load_questions(recipe.verify.retain_questions, recipe) if asks else [],
    }
    texts = load_texts(recipe.verify.text, recipe) if kinds & {"parity", "loss"} else []

    from verify.reference import Oracle
    from verify.stock import load_base, load_tokenizer, location
    from verify.whole_sae import load_sites

    sites = load_sites(recipe)
    check_layers([site.layer for site in sites], folder, config)
    progress("load", 0.4)
    model = load_base(recipe, engines.device)
    check_shape(model.config, folder, config)
    oracle = Oracle(model, sites)
    tokenizer = load_tokenizer(recipe)
    prompts = text_prompts(texts, tokenizer)
    for source, asked in questions.items():
        prompts += question_prompts(source, asked, tokenizer, compared="parity" in kinds)
    material = Material(questions, prompts, letter_tokens(tokenizer), tokenizer)
    progress("load", 0.7)
    dtype = str(model.dtype).removeprefix("torch.")
    reference = HookedRunner(REFERENCE, model, oracle)
    here: list[Runner] = [HookedRunner(BASE, model)] if kinds & {"choices", "loss"} else []
    here.append(reference)
    against: dict[str, str] = {}
    oracles = {REFERENCE: oracle}
    if engines.graphs and dtype != "float32":
        model_32 = load_base(recipe, engines.device, dtype="float32")
        oracles[REFERENCE_32] = Oracle(model_32, sites)
        here.append(HookedRunner(REFERENCE_32, model_32, oracles[REFERENCE_32]))
        against = dict.fromkeys((graph.name for graph in engines.graphs), REFERENCE_32)
    with _half_the_threads() as threads, ExitStack() as stack:
        elsewhere: list[DecodingRunner] = []
        if engines.torch is not None:
            base = location(recipe) if engines.carrier == "adapter" else None
            engines.torch.load(dtype, device=engines.device, threads=threads, base=base)
            elsewhere.append(engines.torch)
        for graph in engines.graphs:
            elsewhere.append(stack.enter_context(engines.open(graph, threads=threads)))
        progress("load", 1.0)
        watch = FeatureWatch(oracle)
        examples = FiredExamples(oracle, recipe.verify.prompt)

        def look(batch: Batch) -> None:
            watch(batch)
            examples(batch)

        found = compare(
            here, elsewhere, material, progress, look, parity="parity" in kinds, against=against
        )
        fired = {name: oracle.tokens_fired for name, oracle in oracles.items()}
        reports = tuple(found.reports(kinds, fired))
        fired_by_layer = tuple(sorted(oracle.fired_by_layer.items()))
        if recipe.select is not None and any(watch.never_active()):
            corpus = text_prompts(load_texts(recipe.select.forget, recipe), tokenizer)
            watch.look(reference, [replace(p, source="forget") for p in corpus], tokenizer)
    return Evidence(
        engines=reports,
        fired_by_layer=fired_by_layer,
        never_active=tuple(watch.never_active()) if asks else (),
        dtype=dtype,
        items=Items(
            forget_questions=len(questions["forget"]),
            retain_questions=len(questions["retain"]),
            text_tokens=found.losses[REFERENCE].n_tokens,
        ),
        examples=examples.result(tokenizer),
    )


@contextmanager
def _half_the_threads() -> Iterator[int]:
    """Two processes compute at the same time: torch here gets half of its threads."""
    import torch

    before = torch.get_num_threads()
    half = max(1, before // 2)
    torch.set_num_threads(half)
    try:
        yield half
    finally:
        torch.set_num_threads(before)


class FeatureWatch:
    """Which features of an oracle were active on what is to be forgotten, batch by batch."""

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self._seen: dict[int, Tensor] = {}

    def __call__(self, batch: Batch) -> None:
        """Look at the oracle's last forward, which was of this batch."""
        rows = [row for row, prompt in enumerate(batch.prompts) if prompt.source == "forget"]
        for layer, active in self._oracle.last_active.items():
            now = active[rows].any(dim=0)
            self._seen[layer] = now | self._seen.get(layer, now)

    def look(self, reference: Runner, prompts: Sequence[Prompt], tokenizer: Any) -> None:
        """Show the reference more prompts, and look at each batch."""
        pad_id = tokenizer.pad_token_id or 0
        for batch in batches(prompts, pad_id=pad_id, vocab_size=len(tokenizer)):
            reference.logits(batch.input_ids, batch.attention_mask, last_only=True)
            self(batch)

    def never_active(self) -> Iterator[tuple[int, int]]:
        """(layer, feature) of those that never were."""
        for site in self._oracle.sites:
            if site.layer not in self._seen:
                continue
            for feature, seen in zip(site.features, self._seen[site.layer], strict=True):
                if not seen:
                    yield site.layer, feature


# --------------------------------------------------------------------------- side by side


@dataclass
class Comparison:
    """What every engine showed, collected batch by batch."""

    material: Material
    names: tuple[str, ...]
    """Of the engines."""
    parity: bool
    """Whether logits are compared."""
    against: Mapping[str, str]
    """The engines that are compared with another reference than `REFERENCE`, and with which."""
    answers: dict[str, Answers] = field(init=False)
    losses: dict[str, LossSum] = field(init=False)
    parities: dict[str, ParitySum] = field(init=False)

    def __post_init__(self) -> None:
        self.answers = {name: Answers(self.material.letters) for name in self.names}
        self.losses = {name: LossSum() for name in self.names}
        self.parities = {name: ParitySum() for name in self.names if not self._refers(name)}

    def _refers(self, name: str) -> bool:
        """Whether others are compared with this one."""
        return name == REFERENCE or name in self.against.values()

    def reference_of(self, name: str) -> str:
        """What an engine is compared with; a reference with itself."""
        return name if self._refers(name) else self.against.get(name, REFERENCE)

    def add(self, batch: Batch, logits: Mapping[str, Tensor]) -> None:
        """Take in every engine's logits of a batch."""
        for name in self.names:
            self.answers[name].add(batch, logits[name])
            self.losses[name].add(batch, logits[name])
            if self.parity and name in self.parities:
                self.parities[name].add(batch, logits[self.reference_of(name)], logits[name])

    def reports(
        self, kinds: frozenset[str], tokens_fired: Mapping[str, int]
    ) -> Iterator[EngineReport]:
        """What was asked for, engine by engine.

        Args:
            kinds: of evidence.
            tokens_fired: per reference, on how many tokens its clamps fired.
        """
        for name in self.names:
            accuracies = {
                source: self.answers[name].accuracy(source, questions)
                for source, questions in self.material.questions.items()
                if "choices" in kinds
            }
            loss = self.losses[name].mean if "loss" in kinds else None
            added = None if loss is None else loss - self.losses[BASE].mean
            yield EngineReport(
                name=name,
                forget=accuracies.get("forget"),
                retain=accuracies.get("retain"),
                loss=loss,
                loss_added=added,
                parity=self._parity(name, tokens_fired) if self.parity else None,
            )

    def _parity(self, name: str, tokens_fired: Mapping[str, int]) -> Parity:
        if self._refers(name):
            some = next(iter(self.parities.values()))
            return Parity(
                max_abs_logit=0.0,
                largest_logit=some.largest_logit,
                mean_kl=0.0,
                top1_agreement=1.0,
                tokens_compared=some.n_tokens,
                tokens_fired=tokens_fired[name],
                worst=None,
                flips=(),
            )
        return self.parities[name].result(
            tokens_fired=0 if name == BASE else tokens_fired[self.reference_of(name)],
            flips=answer_flips(
                self.answers[self.reference_of(name)], self.answers[name], self.material.questions
            ),
            tokenizer=self.material.tokenizer,
        )


def compare(
    here: Sequence[Runner],
    elsewhere: Sequence[DecodingRunner],
    material: Material,
    progress: Progress,
    watch: Callable[[Batch], None],
    *,
    parity: bool,
    against: Mapping[str, str] | None = None,
) -> Comparison:
    """Show every engine the same batches.

    Args:
        here: engines that share this process's models, run one after another.
        elsewhere: engines that compute meanwhile, one thread each.
        material: what to show.
        progress: told how far it is.
        watch: called with every batch after its last engine.
        parity: whether to compare logits.
        against: engines that are compared with another reference, and with which.
    """
    names = tuple(runner.name for runner in (*here, *elsewhere))
    comparison = Comparison(material, names, parity, against or {})
    vocab_size = len(material.tokenizer)
    pad_id = material.tokenizer.pad_token_id or 0
    total = sum(len(prompt.ids) for prompt in material.prompts)
    done = 0
    with ThreadPoolExecutor(len(elsewhere) + 1) as pool:
        counting: Future[None] | None = None  # of the batch before, while this one is run
        for batch in batches(material.prompts, pad_id=pad_id, vocab_size=vocab_size):
            inputs = (batch.input_ids, batch.attention_mask, batch.last_only)
            pending = {runner.name: pool.submit(runner.logits, *inputs) for runner in elsewhere}
            logits = {runner.name: runner.logits(*inputs) for runner in here}
            logits |= {name: answer.result() for name, answer in pending.items()}
            watch(batch)
            if counting is not None:
                counting.result()
            counting = pool.submit(comparison.add, batch, logits)
            done += sum(len(prompt.ids) for prompt in batch.prompts)
            progress("compare", done / total)
        if counting is not None:
            counting.result()
        if parity:
            _compare_decoding(comparison, here, elsewhere, pad_id)
    return comparison


def _compare_decoding(
    comparison: Comparison,
    here: Sequence[Runner],
    elsewhere: Sequence[DecodingRunner],
    pad_id: int,
) -> None:
    """Let the folder's engines read some forget prompts token by token, from a cache.

    The references read them at once: what a token's logits are does not depend on that. Changes
    `comparison`.
    """
    asked = [p for p in comparison.material.prompts if p.source == "forget" and p.every_token]
    asked.sort(key=lambda prompt: len(prompt.ids))
    chosen = [
        prompt
        for form in QUESTION_FORMS
        for prompt in [p for p in asked if p.form == form][:DECODED_PROMPTS]
    ]
    if not chosen:
        return
    batch = left_padded(chosen, pad_id=pad_id, last_only=False)
    n_last = min(DECODED_TOKENS, batch.input_ids.shape[1] - 1)
    whole = {
        runner.name: runner.logits(batch.input_ids, batch.attention_mask, last_only=False)
        for runner in here
        if runner.name != BASE
    }
    tail = replace(
        batch,
        input_ids=batch.input_ids[:, -n_last:],
        attention_mask=batch.attention_mask[:, -n_last:],
    )
    for runner in elsewhere:
        logits = runner.decoded(batch.input_ids, batch.attention_mask, n_last)
        reference = whole[comparison.reference_of(runner.name)][:, -n_last:]
        comparison.parities[runner.name].add(tail, reference, logits)
