"""The search for one suffix that brings back what was forgotten, whatever the question.

Greedy coordinate gradient: the gradient with respect to each place's token says which tokens look
promising there; a few swaps of one token are drawn among those and tried; the best one stays where
it lowers the loss. The clamp is a step, of which a gradient knows nothing, so it is the trial that
decides.

Source: Zou et al., arXiv 2307.15043.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from verify.choices import LetterTokens
from verify.journal import Journal
from verify.prompts import Batch, Prompt, batches, bos_id, chat_text, plain_text
from verify.questions import Question

if TYPE_CHECKING:
    from torch import Tensor

    from verify.reference import Oracle

LENGTH = 12
"""Tokens of the suffix."""
TOP_K = 64
"""At each place, how many tokens a swap is drawn from."""
CANDIDATES = 8
"""Swaps that are tried in a step."""
SOLVED = 0.01
"""Nats: a mean loss at which there is nothing left to gain."""
SEED = 0
CACHED_TOKENS = 8192
"""Most tokens of beginnings that candidates are tried after at once."""
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
        self._asked = AskedUpTo(oracle, prompts, letters, tokenizer.pad_token_id or 0)
        self._allowed = allowed_tokens(oracle.model, tokenizer)

    def start(self) -> dict[str, Any]:
        """Any tokens, as JSON data."""
        ids = np.random.default_rng(SEED).choice(self._allowed, LENGTH)
        suffix = tuple(int(token) for token in ids)
        return asdict(Suffix(suffix, float(self._asked.losses([suffix])[0]), 0))

    def step(self, found: Suffix) -> dict[str, Any]:
        """The best of a few swaps, or what there was, as JSON data."""
        tried = [found.ids, *self._swaps(found)]  # together, so that all are rounded alike
        losses = self._asked.losses(tried)
        best = int(losses.argmin())
        return asdict(Suffix(tried[best], float(losses[best]), found.steps + 1))

    def _swaps(self, found: Suffix) -> list[tuple[int, ...]]:
        """The suffix with one token changed, several times, none twice."""
        import torch

        allowed = torch.from_numpy(self._allowed)
        gradient = self._asked.gradient(found.ids)[:, allowed]
        k = min(TOP_K, len(allowed))
        promising = allowed[gradient.topk(k, largest=False).indices]
        draw = np.random.default_rng([SEED, found.steps])
        swaps: dict[tuple[int, ...], None] = {}
        for place, rank in draw.integers((LENGTH, k), size=(CANDIDATES, 2)).tolist():
            token = int(promising[place, rank])
            swaps[(*found.ids[:place], token, *found.ids[place + 1 :])] = None
        swaps.pop(found.ids, None)
        return list(swaps)


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


# --------------------------------------------------------------------------- the model's part


@dataclass(frozen=True)
class _Beginning:
    """What stands before the suffix, of several prompts, padded on the left and read already."""

    cache: Any
    mask: Tensor
    """[prompts, seq]."""
    answers: tuple[int, ...]


class AskedUpTo:
    """Questions that a reference has read up to where a suffix begins.

    Args:
        oracle: the reference.
        prompts: with a place for the suffix.
        letters: the tokens of A to D.
        pad_id: stands in front of shorter prompts, masked out.
    """

    def __init__(
        self,
        oracle: Oracle,
        prompts: Sequence[Slotted],
        letters: Sequence[Sequence[int]],
        pad_id: int,
    ) -> None:
        import torch

        self._oracle = oracle
        self._letters = letters
        self._after = torch.tensor(prompts[0].after, device=oracle.model.device)
        whole = [
            Prompt("forget", "suffix", 0, prompt.before, every_token=False, item=item)
            for item, prompt in enumerate(prompts)
        ]
        vocab_size = oracle.model.get_input_embeddings().weight.shape[0]
        self._beginnings = [
            self._read(batch, tuple(prompts[p.item].answer for p in batch.prompts))
            for batch in batches(whole, pad_id=pad_id, vocab_size=vocab_size)
        ]
        self._n_prompts = len(prompts)

    def losses(self, suffixes: Sequence[Sequence[int]]) -> np.ndarray:
        """Each suffix's mean loss over the questions: [suffixes] float64, nats."""
        import torch

        total = np.zeros(len(suffixes))
        for beginning in self._beginnings:
            at_once = max(1, CACHED_TOKENS // beginning.mask.numel())
            for start in range(0, len(suffixes), at_once):
                some = torch.tensor(suffixes[start : start + at_once])
                with torch.inference_mode():
                    found = self._losses(beginning, some)
                total[start : start + at_once] += found.double().sum(dim=0).cpu().numpy()
        return total / self._n_prompts

    def gradient(self, suffix: Sequence[int]) -> Tensor:
        """How the mean loss grows with each token's share of each place of the suffix.

        A place holds one token; as a mixture of tokens it holds the same mixture of their
        embeddings, and this is the gradient with respect to the weights of that mixture.

        Args:
            suffix: [n] token ids.

        Returns:
            [n, vocab] float32 on the CPU, nats.
        """
        import torch

        embedding = self._oracle.model.get_input_embeddings()
        per_place = sum(self._embedding_gradient(one, suffix) for one in self._beginnings)
        per_place = per_place / self._n_prompts
        with torch.inference_mode():
            rows = torch.arange(embedding.weight.shape[0], device=embedding.weight.device)
            parts = [embedding(some).float() @ per_place.T for some in rows.split(EMBEDDED_AT_ONCE)]
            return torch.cat(parts).T.cpu()

    def _embedding_gradient(self, beginning: _Beginning, suffix: Sequence[int]) -> Tensor:
        """The gradient of the summed loss with respect to the embeddings: [n, d_in] float32.

        Whatever is added to them is added in every prompt; the model's weights get no gradient.
        """
        import torch

        embedding = self._oracle.model.get_input_embeddings()
        with torch.inference_mode(False), torch.enable_grad():
            added = torch.zeros(
                len(suffix), embedding.weight.shape[1], device=embedding.weight.device
            ).requires_grad_()

            def add(_: Any, __: Any, embedded: Tensor) -> Tensor:
                rows, rest = embedded.shape[0], embedded[:, len(suffix) :]
                moved = embedded[:, : len(suffix)] + added.expand(rows, -1, -1).to(embedded.dtype)
                return torch.cat([moved, rest], dim=1)

            hook = embedding.register_forward_hook(add)
            try:
                loss = self._losses(beginning, torch.tensor([suffix])).sum()
            finally:
                hook.remove()
            (gradient,) = torch.autograd.grad(loss, added)
        return gradient

    def _read(self, batch: Batch, answers: tuple[int, ...]) -> _Beginning:
        import torch

        model = self._oracle.model
        mask = batch.attention_mask.to(model.device)
        with torch.inference_mode(False), torch.no_grad(), self._oracle.applied():
            output = model(
                input_ids=batch.input_ids.to(model.device),
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                use_cache=True,
                logits_to_keep=1,
            )
        return _Beginning(output.past_key_values, mask, answers)

    def _losses(self, beginning: _Beginning, suffixes: Tensor) -> Tensor:
        """Suffixes [suffixes, n] after every prompt -> [prompts, suffixes] float32, nats."""
        import torch

        model = self._oracle.model
        n = len(suffixes)
        tails = torch.cat([suffixes.to(model.device), self._after.expand(n, -1)], dim=1)
        ids = tails.repeat(len(beginning.answers), 1)
        mask = torch.cat([beginning.mask.repeat_interleave(n, dim=0), torch.ones_like(ids)], dim=1)
        cache = copy.deepcopy(beginning.cache)  # reading on changes it
        cache.batch_repeat_interleave(n)
        with self._oracle.applied():
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1)[:, -ids.shape[1] :],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        answers = [answer for answer in beginning.answers for _ in range(n)]
        logits = output.logits[:, -1].float()
        return letter_losses(logits, self._letters, answers).view(-1, n)
