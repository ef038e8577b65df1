"""The recipe's [distill] table: on which texts a model is trained to forget, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from bake.sources import Corpus, Table

Share = Annotated[float, Field(ge=0, lt=1)]


class Distill(Table):
    """What `bakeout distill` trains on, and how; every field may be left out."""

    forget: Corpus | None = None
    """Texts on what is to be forgotten; without them those of [select]."""
    retain: Corpus | None = None
    """Texts on everything else; without them those of [select]."""
    n_texts: int = Field(default=4096, ge=1, le=1 << 24)
    """Texts of each corpus, at most; a tenth of them is kept to judge by."""
    seq_len: int = Field(default=256, ge=8, le=1 << 20)
    """Longest piece of a text in tokens, BOS included."""
    student: Literal["full", "disturbed", "lora"] = "full"
    """What learns the clamped model's outputs (method merged): the layers' weights, the same after
    they were disturbed, or a LoRA over them, which is merged in the end."""
    start: Literal["base", "least-squares"] = "base"
    """What the student begins as: the base, or the base whose MLPs' output matrices were moved in
    closed form. With steps = 0 that is the whole result."""
    layers: list[int] | None = None
    """First and last decoder layer whose weights change; without it, the method's own choice."""
    rank: int = Field(default=16, ge=1, le=4096)
    """Of the LoRA."""
    noise: Share = 0.25
    """alpha of a disturbed student: a matrix W becomes (1 - alpha) W + alpha N, N normal and as
    large as W."""
    token_noise: float = Field(default=0.0, ge=0, le=1)
    """alpha of the embeddings of the topic's tokens, which retain texts hardly have: what each
    differs by from their mean, D, becomes (1 - alpha) D + alpha N, and is learned anew (method
    merged); 0 leaves the embedding matrix as it is."""
    steps: int | None = Field(default=None, ge=0, le=1 << 24)
    """Steps of training; without it, the method's own."""
    batch_size: int = Field(default=16, ge=1, le=1 << 16)
    """Texts of either corpus in a step."""
    learning_rate: float | None = Field(default=None, gt=0)
    """At its highest; without it, the method's own."""
    strength: float | None = Field(default=None, gt=0)
    """How hard the method pushes, in the unit that its entry in `UNLEARNERS` names."""

    @field_validator("layers")
    @classmethod
    def _first_and_last(cls, layers: list[int] | None) -> list[int] | None:
        if layers is not None and (len(layers) != 2 or not 0 <= layers[0] <= layers[1]):
            raise ValueError(f"got {layers}, expected [first, last], decoder layers from 0")
        return layers

    @model_validator(mode="after")
    def _both_corpora(self) -> Self:
        if (self.forget is None) != (self.retain is None):
            raise ValueError("expected `forget` and `retain`, or neither (then [select]'s)")
        return self

    def with_options(self, **given: Any) -> Self:
        """The same with some fields set, where they are given at all, checked anew."""
        table = self.model_dump(exclude_unset=True)
        return type(self).model_validate(
            table | {name: value for name, value in given.items() if value is not None}
        )
