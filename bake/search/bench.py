"""Measures many clamps on the same prompts: everything below the hook layer is run once.

The clamp is `bake`'s own module: this is how settings are found. That a checkpoint computes what
it should is for `verify` to show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bake.clamp import ClampWeights, SAESite
from bake.errors import DataError
from bake.files.halving import in_halves, joined
from bake.files.memory import available_memory
from bake.modeling_clamped_gemma import SAEClamp, SoFar
from bake.questions.answers import (
    LetterTokens,
    best_choice,
    best_letters,
    choice_log_likelihoods,
    letter_tokens,
)
from bake.questions.loss import scored_losses
from bake.questions.multiple_choice import LETTERS, Question
from bake.questions.prompts import Batch, Prompt, batches, by_question
from bake.recipe import Clamp
from bake.sae.folding import SAESlice, load_decoder, load_encoder
from bake.search.corpus_statistics import Material, Progress
from bake.search.statistics import check_memory

Key = tuple[str, str, int]
"""(source, form, item)."""


@dataclass
class Results:
    """What a model answered, and what text cost it."""

    letters: dict[Key, int] = field(default_factory=dict)
    """Of each question, the index of the choice that was answered."""
    losses: list[tuple[float, int]] = field(default_factory=list)
    """Of each window of text: summed cross-entropy in nats, tokens."""
    tokens_fired: int = 0
    """Tokens that a clamp changed."""

    def accuracy(self, source: str, form: str, questions: Sequence[Question]) -> float:
        """Share of a source's questions that were answered right."""
        right = [
            self.letters[source, form, item] == question.answer
            for item, question in enumerate(questions)
        ]
        return sum(right) / len(right)

    @property
    def loss(self) -> float:
        """Nats per token of text."""
        return sum(nats for nats, _ in self.losses) / max(1, sum(n for _, n in self.losses))


@dataclass(frozen=True)
class _Cached:
    """A batch, what reaches the hook layer of it, and what the base makes of it."""

    batch: Batch
    h: Tensor
    """[batch, seq, d_in]: output of the hook layer."""
    base: list[Any]
    """Per prompt: a choice, or (nats, tokens)."""
    lent: dict[str, tuple[Tensor, ...]]
    """Keys and values that layers behind borrow of those up to the hook layer, by kind of layer:
    [batch, heads, seq, head_dim] each. None but in a Gemma 4."""


class Bench:
    """A base model with prompts, ready to be measured under one clamp after another.

    Args:
        model: a stock Gemma.
        prompts: what to measure on.
        letters: the answer tokens.
        layer: the lowest layer that is going to be clamped.
        pad_id: stands in front of shorter prompts.

    Raises:
        DataError: the cached activations do not fit into memory.
        RanOutError: memory runs out at one prompt, here or later.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Prompt],
        letters: LetterTokens,
        layer: int,
        pad_id: int,
        progress: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._model, self._letters, self.layer = model, letters, layer
        config = model.config.get_text_config()
        self._bos_id: int | None = config.bos_token_id
        n_tokens = sum(len(prompt.ids) for prompt in prompts)
        needed = 2 * n_tokens * config.hidden_size * model.dtype.itemsize
        if needed > (free := available_memory(model.device)):
            raise DataError(
                f"{len(prompts):,} prompts: their activations need {needed / 1e9:.1f} GB, "
                f"{free / 1e9:.1f} GB are free; name fewer questions in [select]"
            )
        self._cached: list[_Cached] = []
        done = 0
        for batch in batches(prompts, pad_id=pad_id, vocab_size=config.vocab_size):
            h, logits, lent = self._first_pass(batch)
            self._cached.append(_Cached(batch, h, self._read(batch, logits), lent))
            done += sum(len(prompt.ids) for prompt in batch.prompts)
            progress(done / n_tokens)

    @property
    def base(self) -> Results:
        """The base model's."""
        return self._collect((cached.base for cached in self._cached), 0)

    def measure(self, clamps: Sequence[ClampWeights]) -> Results:
        """What the model makes of the prompts under these clamps.

        Where no clamp fires in a prompt, the base's answer stands and nothing is run.

        Args:
            clamps: the lowest of them at `layer` or above.
        """
        found, fired = [], 0
        for _, answers, changed in self._under(clamps):
            found.append(answers)
            fired += changed
        return self._collect(found, fired)

    def changes(self, clamps: Sequence[ClampWeights]) -> bool:
        """Whether any answer is another than the base's; stops at the first that is."""
        return any(answers != cached.base for cached, answers, _ in self._under(clamps))

    @torch.inference_mode()
    def _under(self, clamps: Sequence[ClampWeights]) -> Iterator[tuple[_Cached, list[Any], int]]:
        """(batch, its answers, tokens that a clamp changed), batch by batch."""
        modules = {clamp.layer: _module(clamp, self._model.device) for clamp in clamps}
        exempt_bos = {clamp.layer: clamp.clamp.exempt_bos for clamp in clamps}
        for cached in self._cached:
            answers, fired = list(cached.base), 0
            rows = torch.arange(len(answers))
            if set(modules) == {self.layer}:
                exempt = self._exempt(cached.batch.input_ids, exempt_bos[self.layer])
                real = cached.batch.attention_mask.bool()
                changed = _changed(modules[self.layer], cached.h, exempt, real).cpu() & real
                fired = int(changed.sum())
                touched = changed.any(dim=1)
                if cached.batch.of_choices:  # those of a question are answered together
                    together = touched.view(-1, len(LETTERS)).any(dim=1)
                    touched = together.repeat_interleave(len(LETTERS))
                rows = touched.nonzero().flatten()
            if len(rows):
                part = _rows(cached.batch, rows)

                def run(some: slice, c: _Cached = cached, r: Any = rows, p: Batch = part) -> Tensor:
                    with self._clamped(p.part(some), c, r[some], modules, exempt_bos):
                        return self._logits(p.part(some), p.n_last)

                logits = joined(in_halves(self._model, "clamping", run, *part.input_ids.shape))
                for row, answer in zip(rows.tolist(), self._read(part, logits), strict=True):
                    answers[row] = answer
            yield cached, answers, fired

    def _exempt(self, input_ids: Tensor, exempt_bos: bool) -> Tensor:
        """[batch, seq] bool."""
        if not exempt_bos or self._bos_id is None:
            return torch.zeros_like(input_ids, dtype=torch.bool)
        return input_ids == self._bos_id

    def _first_pass(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, ...]]]:
        """(output of the hook layer, logits, keys and values that it lends) of the base."""
        kept: list[Tensor] = []
        lent: dict[str, tuple[Tensor, ...]] = {}

        def keep(_: Any, __: Any, kwargs: dict[str, Any], output: Any) -> None:
            kept[:] = [output[0] if isinstance(output, tuple) else output]
            lent.update(kwargs.get("shared_kv_states") or {})

        def run(rows: slice) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, ...]]]:
            lent.clear()
            logits = self._logits(batch.part(rows), batch.n_last)
            return kept[0], logits, dict(lent)

        layer = self._model.get_decoder().layers[self.layer]
        handle = layer.register_forward_hook(keep, with_kwargs=True)
        try:
            with torch.inference_mode():
                return joined(in_halves(self._model, "prompts", run, *batch.input_ids.shape))
        finally:
            handle.remove()

    def _logits(self, batch: Batch, n_last: int) -> Tensor:
        mask = batch.attention_mask.to(self._model.device)
        logits: Tensor = self._model(
            input_ids=batch.input_ids.to(self._model.device),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=n_last,
        ).logits
        return logits.float().cpu()

    @contextmanager
    def _clamped(
        self,
        batch: Batch,
        cached: _Cached,
        rows: Tensor,
        modules: Mapping[int, SAEClamp],
        exempt_bos: Mapping[int, bool],
    ) -> Iterator[None]:
        """Within the block, the forward of these rows starts at the hook layer."""
        rows = rows.to(cached.h.device)
        h = cached.h[rows]
        lent = {kind: tuple(of[rows] for of in pair) for kind, pair in cached.lent.items()}
        layers = self._model.get_decoder().layers
        exempt = {
            layer: self._exempt(batch.input_ids, spared).to(h.device)
            for layer, spared in exempt_bos.items()
        }

        so_far = SoFar(batch.attention_mask.to(h.device))

        def clamp(layer: int) -> Callable[[Any, Any, Any], Any]:
            def hook(_: Any, __: Any, output: Any) -> Any:
                return modules[layer](output, exempt[layer], so_far)

            return hook

        def begin(*_: Any, shared_kv_states: Any = None, **__: Any) -> Tensor:
            if lent:
                shared_kv_states.update(lent)
            return h

        with ExitStack() as undo:
            for i in range(self.layer + 1):
                layers[i].forward = lambda hidden_states, *_, **__: hidden_states
                undo.callback(delattr, layers[i], "forward")
            start = layers[self.layer]
            start.forward = begin
            for layer in modules:
                undo.callback(layers[layer].register_forward_hook(clamp(layer)).remove)
            yield

    def _read(self, batch: Batch, logits: Tensor) -> list[Any]:
        """Per prompt: the choice that is answered, or (nats, tokens) of a text."""
        if batch.prompts[0].source == "text":
            n_tokens = [len(prompt.ids) - 1 for prompt in batch.prompts]
            of_texts = torch.split(scored_losses(logits, batch), n_tokens)
            return [(float(losses.sum()), len(losses)) for losses in of_texts]
        if batch.of_choices:
            losses = scored_losses(logits, batch)
            each = choice_log_likelihoods(losses, batch.prompts)
            pairs = zip(each, by_question(batch.prompts), strict=True)
            return [best for pair in pairs for best in [best_choice(*pair)] * len(LETTERS)]
        by_form = {
            form: best_letters(logits[:, -1], getattr(self._letters, form))
            for form in {prompt.form for prompt in batch.prompts}
        }
        return [by_form[prompt.form][row] for row, prompt in enumerate(batch.prompts)]

    def _collect(self, answers_by_batch: Any, fired: int) -> Results:
        results = Results(tokens_fired=fired)
        for cached, answers in zip(self._cached, answers_by_batch, strict=True):
            for prompt, answer in zip(cached.batch.prompts, answers, strict=True):
                if prompt.source == "text":
                    results.losses.append(answer)
                else:
                    results.letters[prompt.source, prompt.form, prompt.item] = answer
        return results


def bench_of(
    material: Material, prompts: Sequence[Prompt], layer: int, what: str, progress: Progress
) -> Bench:
    """Prompts on a recipe's model, cached at a layer; progress is told `what` is being read."""
    letters, pad_id = letter_tokens(material.tokenizer), material.tokenizer.pad_token_id or 0
    told = partial(progress, what)
    return Bench(material.model, prompts, letters, layer, pad_id, told)


class Clamper:
    """A table's whole SAE in memory, from which clamps of any features are cut.

    Args:
        site: the SAE.

    Raises:
        SAEError: it does not fit into memory.
    """

    def __init__(self, site: SAESite) -> None:
        check_memory(site.name, site.d_in, site.d_sae, decoder=True)
        self.site = site
        self.encoder, self.W_dec = load_encoder(site.files), load_decoder(site.files)

    def weights(self, clamp: Clamp) -> ClampWeights:
        """The clamp of a table of this SAE.

        Raises:
            SAEError: a feature is out of range.
        """
        rows = self.site.rows(clamp)
        k = list(rows.features)
        encoder = self.encoder
        cut = SAESlice(
            encoder.W_enc[:, k],
            encoder.b_enc[k],
            encoder.theta[k],
            self.W_dec[k],
            rows.features,
            self.site.files.architecture,
            encoder.sha256,
        )
        return ClampWeights(self.site.layer, self.site.hook_point, clamp, cut, rows)


def _module(clamp: ClampWeights, device: Any) -> SAEClamp:
    module = SAEClamp(clamp.sae.W_enc.shape[0], clamp.k)
    tensors = {name: torch.tensor(array, device=device) for name, array in clamp.tensors.items()}
    module.load_state_dict(tensors, assign=True)
    return module


def _changed(module: SAEClamp, h: Tensor, exempt: Tensor, real: Tensor) -> Tensor:
    """[batch, seq] bool: where the clamp changes a feature."""
    acts, exempt = module.feature_acts(h), exempt.to(h.device)
    if module.tau is not None:
        exempt = module.shut(acts, exempt, SoFar(real.to(h.device)))
    changed: Tensor = (module.edited(acts) != acts).any(dim=-1) & ~exempt
    return changed


def _rows(batch: Batch, rows: Tensor) -> Batch:
    """Some prompts of a batch."""
    prompts = tuple(batch.prompts[row] for row in rows.tolist())
    return Batch(prompts, batch.input_ids[rows], batch.attention_mask[rows], batch.last_only)
