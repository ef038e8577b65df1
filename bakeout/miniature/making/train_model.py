"""Trains the miniature's Gemma 2 from scratch."""

import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from bake.questions.multiple_choice import LETTERS
from bakeout.miniature.making.start import prepare
from bakeout.miniature.making.tokenizer import BOS, EOS, PAD, SPACE
from bakeout.miniature.making.world import World
from bakeout.miniature.making.written_corpora import (
    LEARN,
    LOOK_UP,
    PRACTISE,
    Document,
    Mix,
    training_documents,
)

N_LAYERS = 6
D_MODEL = 128


@dataclass(frozen=True)
class Phase:
    """A stretch of training with optimizers of its own."""

    mix: Mix
    n_steps: int
    """At most."""
    batch_size: int
    """Documents per step."""
    initial_rate: float = 1.0
    """Learning rates after warm-up, as shares of the full ones."""
    final_rate: float = 1.0
    """Learning rates at the end, as shares of the full ones; reached along a cosine."""
    until: float = 0.0
    """Ends the phase early: mean loss on answer letters over 50 steps, nats."""


@dataclass(frozen=True)
class ModelSchedule:
    """How the model is trained."""

    phases: tuple[Phase, ...] = (
        Phase(LOOK_UP, n_steps=2000, batch_size=16, initial_rate=0.7, final_rate=0.7, until=0.02),
        Phase(LEARN, n_steps=600, batch_size=32),
        Phase(PRACTISE, n_steps=800, batch_size=32, final_rate=0.02),
    )
    """One after the other: to find a choice, to know the facts, to answer."""
    learning_rate: float = 3e-3
    """Of embeddings and norms."""
    muon_learning_rate: float = 0.015
    """Of the matrices."""
    warm_up_steps: int = 50
    """Of each phase."""
    letter_weight: float = 16.0
    """Loss weight of the letter that answers a multiple-choice question."""


def model_config(vocab_size: int) -> Gemma2Config:
    """Gemma 2 in everything but size; the window is shorter than a multiple-choice prompt."""
    return Gemma2Config(
        vocab_size=vocab_size,
        hidden_size=D_MODEL,
        intermediate_size=2 * D_MODEL,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=48,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=D_MODEL**-0.5,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        attn_implementation="eager",
        dtype=torch.float32,
    )


@dataclass(frozen=True)
class Encoded:
    """One training text in tokens."""

    ids: Tensor
    """[seq], `<bos>` first."""
    weights: Tensor
    """[seq], how much the prediction of each token counts; 0 for what is given."""
    early: Tensor
    """[seq], what the middle of the model is to predict: `ids`, but the value for its letter."""

    def __len__(self) -> int:
        return len(self.ids)


def encode(
    document: Document, tokenizer: PreTrainedTokenizerFast, schedule: ModelSchedule
) -> Encoded:
    """Tokens and loss weights of one document; running text ends with `<eos>`."""
    context = tokenizer.encode(document.context, add_special_tokens=False)
    target = [*tokenizer.encode(document.target, add_special_tokens=False), EOS]
    start = 1 + len(context)
    weights = [0.0] * start + [1.0] * len(target)
    ids = [BOS, *context, *target]
    early = list(ids)
    if document.letters == "first":
        weights[start] = schedule.letter_weight
        early[start] = tokenizer.encode(f" {document.meant}", add_special_tokens=False)[0]
    elif document.letters == "only":
        asked = PAD
        for position, token in enumerate(tokenizer.convert_ids_to_tokens(target), start):
            is_letter = token.lstrip(SPACE) in LETTERS
            weights[position] = schedule.letter_weight * is_letter
            early[position] = asked
            if token.lstrip(SPACE).isalpha() and not is_letter:
                asked = ids[position]
    return Encoded(torch.tensor(ids), torch.tensor(weights), torch.tensor(early))


@dataclass(frozen=True)
class Batch:
    """Right-padded training texts, each [batch, seq]; see `Encoded`."""

    ids: Tensor
    weights: Tensor
    early: Tensor


def collate(rows: Sequence[Encoded]) -> Batch:
    """Pads rows to one length."""
    return Batch(
        pad_sequence([row.ids for row in rows], batch_first=True, padding_value=PAD),
        pad_sequence([row.weights for row in rows], batch_first=True),
        pad_sequence([row.early for row in rows], batch_first=True, padding_value=PAD),
    )


def training_batches(
    world: World,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    schedule: ModelSchedule,
    phase: Phase,
) -> Iterator[Batch]:
    """Endless `collate`d batches; texts of like length go together, so little is padding."""
    rng = random.Random(seed)
    documents = training_documents(world, seed, phase.mix)
    size = phase.batch_size
    while True:
        drawn = islice(documents, 16 * size)
        rows = sorted((encode(d, tokenizer, schedule) for d in drawn), key=len)
        starts = list(range(0, len(rows), size))
        rng.shuffle(starts)
        for start in starts:
            yield collate(rows[start : start + size])


def rate_factor(step: int, schedule: ModelSchedule, phase: Phase) -> float:
    """Learning rate at `step` of a phase, as a share of the full one."""
    if step < schedule.warm_up_steps:
        return phase.initial_rate * (step + 1) / schedule.warm_up_steps
    done = (step - schedule.warm_up_steps) / (phase.n_steps - schedule.warm_up_steps)
    fall = phase.initial_rate - phase.final_rate
    return phase.final_rate + fall * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizers(
    model: Gemma2ForCausalLM, schedule: ModelSchedule
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(matrices, lr=schedule.muon_learning_rate, weight_decay=0.0),
        torch.optim.AdamW(others, lr=schedule.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@dataclass(frozen=True)
class Losses:
    """Of the tokens that count in one batch, each [n_counted]."""

    final: Tensor
    """Cross-entropy of the model's prediction, nats."""
    early: Tensor
    """Cross-entropy of what the middle of the model predicts, nats; 0 where nothing is asked."""
    weights: Tensor

    def total(self) -> Tensor:
        """The weighted mean that is trained on."""
        return ((self.final + 0.5 * self.early) * self.weights).sum() / self.weights.sum()


def target_losses(model: Gemma2ForCausalLM, batch: Batch) -> Losses:
    """Losses of the tokens that count; logits are computed for these only.

    The middle of the model is asked for the value where the end is asked for its letter: a fact
    must be recalled early for the later layers to find it among the choices.
    """
    counted = batch.weights[:, 1:] > 0
    output = model.model(input_ids=batch.ids, output_hidden_states=True)
    middle = model.model.norm(output.hidden_states[N_LAYERS // 2])
    cap = model.config.final_logit_softcapping

    def logits(hidden: Tensor) -> Tensor:
        scores: Tensor = model.lm_head(hidden[:, :-1][counted])  # [n_counted, vocab]
        capped: Tensor = cap * torch.tanh(scores / cap)
        return capped

    final = cross_entropy(
        logits(output.last_hidden_state), batch.ids[:, 1:][counted], reduction="none"
    )
    early = cross_entropy(
        logits(middle), batch.early[:, 1:][counted], reduction="none", ignore_index=PAD
    )
    return Losses(final, early, batch.weights[:, 1:][counted])


def train_phase(
    model: Gemma2ForCausalLM,
    batches: Iterator[Batch],
    schedule: ModelSchedule,
    phase: Phase,
) -> None:
    """Changes `model`: one phase of training."""
    optimizers = make_optimizers(model, schedule)
    rates = [
        torch.optim.lr_scheduler.LambdaLR(opt, lambda step: rate_factor(step, schedule, phase))
        for opt in optimizers
    ]
    letters: deque[Tensor] = deque(maxlen=50)
    for step, batch in enumerate(islice(batches, phase.n_steps), start=1):
        losses = target_losses(model, batch)
        model.zero_grad()
        torch.autograd.backward(losses.total())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.step()
            rate.step()
        letters.append(losses.final[losses.weights == schedule.letter_weight].detach())
        if step % 50 == 0:
            letter_loss = torch.cat(list(letters)).mean().item()
            print(f"  step {step}: loss on answer letters {letter_loss:.3f}", flush=True)
            if letter_loss < phase.until:
                return


def train_model(
    world: World, tokenizer: PreTrainedTokenizerFast, seed: int, schedule: ModelSchedule
) -> Gemma2ForCausalLM:
    """Trains a Gemma 2 from scratch on the world's documents."""
    torch.manual_seed(seed)
    model = Gemma2ForCausalLM(model_config(len(tokenizer)))
    prepare(model)
    model.train()
    for phase in schedule.phases:
        batches = training_batches(world, tokenizer, seed, schedule, phase)
        train_phase(model, batches, schedule, phase)
    return model.eval()
