"""A model of lm-evaluation-harness over any engine. The only file that subclasses its classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from bake.questions.prompts import Batch, Prompt, batches, bos_id, left_padded
from verify.engines.runners import Runner
from verify.evidence.tasks.harness_tasks import HarnessError

if TYPE_CHECKING:
    from torch import Tensor


class RunnerLM(TemplateLM):
    """Scores what lm-evaluation-harness asks with an engine of ours.

    Contexts begin with BOS once, as Gemma's tokenizer has it. Requests that differ in their last
    token only are one forward pass, and where that token is all that is scored, logits are formed
    at the last column only.

    Args:
        runner: the engine.
        tokenizer: the base model's.
        batch_size: prompts at once; by number of tokens when None.
        max_length: longest prompt, in tokens; longer ones lose their beginning, as with the
            harness's own model. No limit when None.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Any,
        *,
        batch_size: int | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._runner = runner
        self._batch_size = batch_size
        self._max_length = max_length
        self._bos = bos_id(tokenizer)

    @property
    def eot_token_id(self) -> int:
        """End of text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context begins with."""
        return self._bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids, BOS first unless `add_special_tokens` is False or the text has one."""
        ids = list(self.tokenizer(string, add_special_tokens=False)["input_ids"])
        if add_special_tokens is False or (add_special_tokens is None and ids[:1] == [self._bos]):
            return ids
        return [self._bos, *ids]

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Per request, its continuation's log-likelihood in nats, and whether it is the greedy one.

        See `lm_eval.api.model.LM`.
        """
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Per request, the log-likelihood of a whole text in nats, in windows of `max_length`."""
        asked: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(
                token_list=ids,
                prefix_token=self._bos,
                max_seq_len=self._max_length or max(1, len(ids)),
                context_len=1,
            )
            for window in windows:
                asked.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(owners, self._loglikelihood_tokens(asked), strict=True):
            totals[owner] += likelihood
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> NoReturn:
        """Refuse: an engine gives logits."""
        raise HarnessError(
            f"{requests[0].task_name}: generates text; expected a task that is scored by "
            "likelihood, such as multiple choice"
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Per (anything, context, continuation), as `loglikelihood` gives it."""
        import torch

        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            ids = [*context, *continuation][:-1]
            groups.setdefault(tuple(ids[-(self._max_length or len(ids)) :]), []).append(index)
        prompts = [
            Prompt(
                source="lm-eval",
                form="plain",
                row=0,
                ids=ids,
                every_token=any(len(requests[index][2]) > 1 for index in indices),
                item=item,
            )
            for item, (ids, indices) in enumerate(groups.items())
        ]
        members = list(groups.values())
        found: dict[int, tuple[float, bool]] = {}
        for batch in self._batches(prompts):
            n = [1 if batch.last_only else len(prompt.ids) for prompt in batch.prompts]
            whole = self._runner.logits(batch.input_ids, batch.attention_mask, batch.wanted)
            for prompt, logits in zip(batch.prompts, torch.split(whole, n), strict=True):
                for index in members[prompt.item]:
                    found[index] = continuation_score(logits, requests[index][2])
        return [found[index] for index in range(len(requests))]

    def _batches(self, prompts: list[Prompt]) -> Iterator[Batch]:
        pad_id = self.tokenizer.pad_token_id or 0
        if self._batch_size is None:
            yield from batches(prompts, pad_id=pad_id, vocab_size=len(self.tokenizer))
            return
        for every_token in (False, True):
            group = [prompt for prompt in prompts if prompt.every_token is every_token]
            group.sort(key=lambda prompt: -len(prompt.ids))
            for start in range(0, len(group), self._batch_size):
                chosen = group[start : start + self._batch_size]
                yield left_padded(chosen, pad_id=pad_id, last_only=not every_token)


def continuation_score(logits: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """(log-likelihood in nats, whether every token is the likeliest).

    Args:
        logits: [seq, vocab] float32; the last row predicts the last token of the continuation.
        continuation: token ids, at most as many as there are columns.
    """
    import torch

    tokens = torch.tensor(continuation)
    scored = logits[-len(tokens) :]
    likelihoods = scored.double().log_softmax(dim=-1).gather(1, tokens[:, None])
    return float(likelihoods.sum()), bool((scored.argmax(dim=-1) == tokens).all())
