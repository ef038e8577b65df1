"""How far a suffix is from bringing an answer back, and in which direction it should change; or a
prefix, which is a suffix of what little stands before the question.

What stands before the suffix is the same whatever the suffix is: it is read once, and kept as keys
and values; but where a clamp asks what came before, it is read again with every suffix.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bake.questions.forms import Form
from bake.questions.multiple_choice import Question
from bake.questions.prompts import Batch, Prompt, batches, bos_id, encoded

if TYPE_CHECKING:
    from torch import Tensor

    from verify.reference.oracle import Oracle

CACHED_TOKENS = 8192
"""Most tokens of keys and values that suffixes are tried after at once."""
EMBEDDED_AT_ONCE = 8192
"""Rows of the embedding that are looked at together."""


@dataclass(frozen=True)
class Slotted:
    """A question as tokens, with a place for a suffix."""

    before: tuple[int, ...]
    """BOS first."""
    after: tuple[int, ...]
    """The answer is the next token. Questions that share it are read together."""
    answer: int
    """Index of the right letter."""

    def filled(self, suffix: Sequence[int]) -> tuple[int, ...]:
        """The whole prompt."""
        return (*self.before, *suffix, *self.after)


def slotted(question: Question, form: Form, tokenizer: Any) -> Slotted:
    """A question in a prompt form, cut open after its choices."""
    before, tail, rest = form.text(question).rpartition(form.tail)
    head, after = encoded([before, tail + rest], tokenizer)
    return Slotted((bos_id(tokenizer), *head), tuple(after), question.answer)


def slotted_before(question: Question, form: Form, tokenizer: Any) -> Slotted:
    """A question in a prompt form, cut open where its turn begins."""
    texts = [form.turn, "\n" + form.text(question).removeprefix(form.turn)]
    head, after = encoded(texts, tokenizer)
    return Slotted((bos_id(tokenizer), *head), tuple(after), question.answer)


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


@dataclass(frozen=True)
class _Beginning:
    """What stands before the suffix, of several prompts, padded on the left."""

    cache: Any
    """Where it is read already; else None."""
    ids: Tensor
    """[prompts, seq] what is still to be read; [prompts, 0] where nothing is."""
    mask: Tensor
    """[prompts, seq]."""
    answers: tuple[int, ...]
    after: Tensor
    """[after] token ids: what stands after the suffix."""


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
        self._oracle = oracle
        self._letters = letters
        alike: dict[tuple[int, ...], list[Prompt]] = {}
        for item, prompt in enumerate(prompts):
            whole = Prompt("forget", "suffix", 0, prompt.before, every_token=False, item=item)
            alike.setdefault(prompt.after, []).append(whole)
        vocab_size = oracle.model.get_input_embeddings().weight.shape[0]
        self._beginnings = [
            self._read(batch, tuple(prompts[p.item].answer for p in batch.prompts), after)
            for after, whole in alike.items()
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
                some = torch.tensor(suffixes[start : start + at_once], dtype=torch.long)
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
        found = [self._embedding_gradient(one, suffix) for one in self._beginnings]
        per_place = torch.stack(found).sum(dim=0) / self._n_prompts
        rows = torch.arange(embedding.weight.shape[0], device=per_place.device)
        with torch.inference_mode():
            parts = [
                embedding(some).float() @ per_place.T
                for some in torch.split(rows, EMBEDDED_AT_ONCE)
            ]
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
                rows, at = embedded.shape[0], beginning.ids.shape[1]
                head, own, rest = embedded.tensor_split([at, at + len(suffix)], dim=1)
                moved = own + added.expand(rows, -1, -1).to(embedded.dtype)
                return torch.cat([head, moved, rest], dim=1)

            hook = embedding.register_forward_hook(add)
            try:
                loss = self._losses(beginning, torch.tensor([suffix])).sum()
            finally:
                hook.remove()
            (gradient,) = torch.autograd.grad(loss, added)
        return gradient

    def _read(self, batch: Batch, answers: tuple[int, ...], after: tuple[int, ...]) -> _Beginning:
        import torch

        model = self._oracle.model
        ids, mask = batch.input_ids.to(model.device), batch.attention_mask.to(model.device)
        tail = torch.tensor(after, device=model.device)
        if self._oracle.gated:
            return _Beginning(None, ids, mask, answers, tail)
        with torch.inference_mode(False), torch.no_grad(), self._oracle.applied():
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                use_cache=True,
                logits_to_keep=1,
            )
        return _Beginning(output.past_key_values, ids[:, :0], mask, answers, tail)

    def _losses(self, beginning: _Beginning, suffixes: Tensor) -> Tensor:
        """Suffixes [suffixes, n] after every prompt -> [prompts, suffixes] float32, nats."""
        import torch

        model = self._oracle.model
        n = len(suffixes)
        tails = torch.cat([suffixes.to(model.device), beginning.after.expand(n, -1)], dim=1)
        tails = tails.repeat(len(beginning.answers), 1)
        before, ids = (of.repeat_interleave(n, dim=0) for of in (beginning.mask, beginning.ids))
        mask, ids = torch.cat([before, torch.ones_like(tails)], dim=1), torch.cat([ids, tails], 1)
        cache = copy.deepcopy(beginning.cache)  # reading on changes it
        if cache is not None:
            cache.batch_repeat_interleave(n)
        with self._oracle.applied():
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :],
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=1,
            )
        answers = [answer for answer in beginning.answers for _ in range(n)]
        logits = output.logits[:, -1].float()
        return letter_losses(logits, self._letters, answers).view(-1, n)
