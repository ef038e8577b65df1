"""The search for one suffix that brings back what was forgotten, whatever the question.

Greedy coordinate gradient: the gradient with respect to each place's token says which tokens look
promising there; a few swaps of one token are drawn among those and tried; the best one stays where
it lowers the loss. The clamp is a step, of which a gradient knows nothing, so it is the trial that
decides.

Source: Zou et al., arXiv 2307.15043.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from verify.choices import LetterTokens
from verify.journal import Journal
from verify.prompts import Prompt, batches, bos_id, chat_text, plain_text
from verify.questions import Question
from verify.runners import HookedRunner
from verify.scoring import last_logits

if TYPE_CHECKING:
    from torch import Tensor

    from verify.reference import Oracle

LENGTH = 12
"""Tokens of the suffix."""
TOP_K = 64
"""At each place, how many tokens a swap is drawn from."""
CANDIDATES = 32
"""Swaps that are tried in a step."""
SOLVED = 0.01
"""Nats: a mean loss at which there is nothing left to gain."""
SEED = 0
EMBEDDED_AT_ONCE = 8192
"""Rows of the embedding that are looked at together."""
TAILS = {"chat": "<end_of_turn>", "plain": "\nAnswer:"}
"""Per prompt form, where what follows a suffix begins: the end of the user's turn, or the word that
asks for the letter."""


@dataclass(frozen=True)
class Slotted:
    """A question as tokens, with a place for a suffix."""

    before: tuple[int, ...]
    """BOS first."""
    after: tuple[int, ...]
    """The same for every question of a form. The answer is the next token."""
    answer: int
    """Index of the right letter."""

    def filled(self, suffix: Sequence[int]) -> tuple[int, ...]:
        """The whole prompt."""
        return (*self.before, *suffix, *self.after)


@dataclass(frozen=True)
class Suffix:
    """What the search has come to."""

    ids: tuple[int, ...]
    """Token ids: text that decodes from them need not encode to them again."""
    loss: float
    """Nats: mean of -log p(right letter), p over the four letters, over the questions that the
    search looks at."""
    steps: int
    """How many it took."""


def slotted(question: Question, form: str, tokenizer: Any) -> Slotted:
    """A question in a prompt form, cut open after its choices."""
    text = chat_text(question) if form == "chat" else plain_text(question)
    before, tail, rest = text.rpartition(TAILS[form])
    head, after = tokenizer([before, tail + rest], add_special_tokens=False)["input_ids"]
    return Slotted((bos_id(tokenizer), *head), tuple(after), question.answer)


def find_suffix(
    oracle: Oracle,
    prompts: Sequence[Slotted],
    tokenizer: Any,
    letters: Sequence[Sequence[int]],
    *,
    budget: int,
    journal: Journal,
    name: str,
    progress: Callable[[float], None] | None = None,
) -> Suffix:
    """The suffix that makes the right letters likeliest, in so many steps.

    Args:
        oracle: the reference; its counts of firings go on.
        prompts: questions that the search may look at, at least one.
        tokenizer: the base model's.
        letters: the tokens of A to D in the form of the prompts.
        budget: most steps.
        journal: keeps every step, so that an interrupted search ends where a whole one does.
        name: of this search in the journal.
        progress: called with the share done, 0 to 1.
    """
    search = _Search(oracle, prompts, tokenizer, letters)
    found = _suffix(journal.once(f"{name}: start", search.start))
    while found.steps < budget and found.loss > SOLVED:
        found = _next(search, found, journal, f"{name}: step {found.steps + 1}")
        if progress is not None:
            progress(found.steps / budget)
    return found


def _next(search: _Search, found: Suffix, journal: Journal, name: str) -> Suffix:
    return _suffix(journal.once(name, lambda: search.step(found)))


def _suffix(kept: dict[str, Any]) -> Suffix:
    return Suffix(tuple(kept["ids"]), kept["loss"], kept["steps"])


class _Search:
    """Steps, each of which depends on nothing but the suffix that it starts from."""

    def __init__(
        self,
        oracle: Oracle,
        prompts: Sequence[Slotted],
        tokenizer: Any,
        letters: Sequence[Sequence[int]],
    ) -> None:
        self._oracle = oracle
        self._runner = HookedRunner("suffix search", oracle.model, oracle)
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._letters = letters
        self._allowed = allowed_tokens(oracle.model, tokenizer)

    def start(self) -> dict[str, Any]:
        """Any tokens, as JSON data."""
        ids = np.random.default_rng(SEED).choice(self._allowed, LENGTH)
        suffix = tuple(int(token) for token in ids)
        return asdict(Suffix(suffix, float(self._losses([suffix])[0]), 0))

    def step(self, found: Suffix) -> dict[str, Any]:
        """The best of a few swaps, or what there was, as JSON data."""
        tried = [found.ids, *self._swaps(found)]  # together, so that all are rounded alike
        losses = self._losses(tried)
        best = int(losses.argmin())
        return asdict(Suffix(tried[best], float(losses[best]), found.steps + 1))

    def _swaps(self, found: Suffix) -> list[tuple[int, ...]]:
        """The suffix with one token changed, several times, none twice."""
        import torch

        gradient = suffix_gradient(
            self._oracle, self._prompts, found.ids, self._tokenizer, self._letters
        )
        allowed = torch.from_numpy(self._allowed)
        k = min(TOP_K, len(allowed))
        promising = allowed[gradient[:, allowed].topk(k, largest=False).indices]
        draw = np.random.default_rng([SEED, found.steps])
        swaps: dict[tuple[int, ...], None] = {}
        for place, rank in draw.integers((LENGTH, k), size=(CANDIDATES, 2)).tolist():
            token = int(promising[place, rank])
            swaps[(*found.ids[:place], token, *found.ids[place + 1 :])] = None
        swaps.pop(found.ids, None)
        return list(swaps)

    def _losses(self, suffixes: Sequence[tuple[int, ...]]) -> np.ndarray:
        """Each suffix's mean loss over the questions: [suffixes] float64, nats."""
        total = np.zeros(len(suffixes))
        for prompt in self._prompts:  # what a prompt's fillings share is computed once
            logits = last_logits(
                self._runner, [prompt.filled(ids) for ids in suffixes], self._tokenizer
            )
            answers = [prompt.answer] * len(suffixes)
            total += letter_losses(logits.double(), self._letters, answers).numpy()
        mean: np.ndarray = total / len(self._prompts)
        return mean


def allowed_tokens(model: Any, tokenizer: Any) -> np.ndarray:
    """Ids that a suffix may be made of: ordinary ones, none that was added to the vocabulary."""
    rows = model.get_input_embeddings().weight.shape[0]
    barred = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ids = {*tokenizer.get_vocab().values()} - barred
    return np.array(sorted(token for token in ids if token < rows))


def letter_losses(
    logits: Tensor, letters: Sequence[Sequence[int]], answers: Sequence[int]
) -> Tensor:
    """-log p(right letter), p over the four letters, each as likely as the best of its tokens.

    Args:
        logits: [n, vocab].
        letters: the tokens of A to D.
        answers: [n] indices of the right ones.

    Returns:
        [n], nats.
    """
    import torch

    per_letter = torch.stack([logits[:, list(ids)].amax(dim=-1) for ids in letters], dim=-1)
    target = torch.tensor(answers, device=logits.device)
    return torch.nn.functional.cross_entropy(per_letter, target, reduction="none")


def suffix_gradient(
    oracle: Oracle,
    prompts: Sequence[Slotted],
    suffix: Sequence[int],
    tokenizer: Any,
    letters: Sequence[Sequence[int]],
) -> Tensor:
    """How the loss grows with each token's share of each place of the suffix.

    A place holds one token; as a mixture it holds the same mixture of their embeddings, and this is
    the gradient with respect to the weights of that mixture.

    Args:
        oracle: the reference.
        prompts: with a place for the suffix.
        suffix: [n] token ids.
        tokenizer: the base model's.
        letters: the tokens of A to D.

    Returns:
        [n, vocab] float32 on the CPU, nats; of the loss summed over the prompts.
    """
    import torch

    embedding = oracle.model.get_input_embeddings()
    whole = [
        Prompt("forget", "suffix", 0, prompt.filled(suffix), every_token=False, item=item)
        for item, prompt in enumerate(prompts)
    ]
    pad_id = tokenizer.pad_token_id or 0
    per_place = torch.zeros(len(suffix), embedding.weight.shape[1], device=oracle.model.device)
    for batch in batches(whole, pad_id=pad_id, vocab_size=embedding.weight.shape[0]):
        some = [prompts[prompt.item] for prompt in batch.prompts]
        per_place += _embedding_gradient(
            oracle, batch.input_ids, batch.attention_mask, some, len(suffix), letters
        )
    with torch.no_grad():
        ids = torch.arange(embedding.weight.shape[0], device=per_place.device)
        parts = [per_place @ embedding(some).float().T for some in ids.split(EMBEDDED_AT_ONCE)]
    return torch.cat(parts, dim=1).cpu()


def _embedding_gradient(
    oracle: Oracle,
    input_ids: Tensor,
    attention_mask: Tensor,
    prompts: Sequence[Slotted],
    n_suffix: int,
    letters: Sequence[Sequence[int]],
) -> Tensor:
    """The gradient with respect to the suffix's embeddings: [n_suffix, d_in] float32.

    Whatever is added to them is added in every row; the model's weights get no gradient.
    """
    import torch

    model = oracle.model
    embedding = model.get_input_embeddings()
    mask = attention_mask.to(model.device)
    stop = input_ids.shape[1] - len(prompts[0].after)
    with torch.inference_mode(False), torch.enable_grad():
        added = torch.zeros(n_suffix, embedding.weight.shape[1], device=model.device)
        added.requires_grad_()

        def add(_: Any, __: Any, embedded: Tensor) -> Tensor:
            moved = embedded[:, stop - n_suffix : stop] + added.to(embedded.dtype)
            return torch.cat(
                [embedded[:, : stop - n_suffix], moved, embedded[:, stop:]], dim=1
            )

        hook = embedding.register_forward_hook(add)
        try:
            with oracle.applied():
                output = model(
                    input_ids=input_ids.to(model.device),
                    attention_mask=mask,
                    position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                    use_cache=False,
                    logits_to_keep=1,
                )
        finally:
            hook.remove()
        answers = [prompt.answer for prompt in prompts]
        loss = letter_losses(output.logits[:, -1].float(), letters, answers).sum()
        (gradient,) = torch.autograd.grad(loss, added)
    return gradient
