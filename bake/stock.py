"""A recipe's base model as stock transformers loads it, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError
from torch import nn

from bake.errors import ModelError
from bake.families import FAMILIES
from bake.recipe import Recipe


def load_base(recipe: Recipe, device: str = "cpu", dtype: str | None = None) -> Any:
    """A recipe's base model: its stock class, eager attention, in the recipe's dtype or another.

    Raises:
        ModelError: it is missing, damaged, or no stock Gemma, or torch cannot run it on the device.
    """
    import torch
    import transformers

    stock = [family.architecture for family in FAMILIES.values()]
    where = location(recipe)
    dtype = dtype or recipe.base.dtype
    try:
        config = transformers.AutoConfig.from_pretrained(**where)
        name = (config.architectures or ["none"])[0]
        if name not in stock:
            raise ModelError(
                f"base model {recipe.base.model}: its architecture is {name}; expected one of "
                f"{', '.join(stock)}"
            )
        with _no_progress_bar():
            model, info = getattr(transformers, name).from_pretrained(
                **where,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                attn_implementation="eager",
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"base model {recipe.base.model}: transformers cannot load it ({_reason(error)}); "
            "check the name and the network, or name a local folder"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"base model {recipe.base.model}: has no {missing[0]}; transformers would make it up. "
            "Download it again"
        )
    try:
        model = model.to(device)
    except (AssertionError, RuntimeError) as error:  # torch without CUDA asserts
        raise ModelError(
            f"--device {device}: torch cannot run the base model there ({_reason(error)}); "
            "expected cpu, or cuda where torch has it"
        ) from error
    return model.eval().requires_grad_(False)


def load_tokenizer(recipe: Recipe) -> Any:
    """The base model's tokenizer.

    Raises:
        ModelError: it is missing or damaged.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(**location(recipe))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"base model {recipe.base.model}: its tokenizer cannot be loaded ({_reason(error)}); "
            "questions and text need it"
        ) from error
    # Where the files are missing, a Gemma tokenizer that knows no text comes without a word.
    if set(tokenizer("A", add_special_tokens=False)["input_ids"]) <= {tokenizer.unk_token_id}:
        raise ModelError(
            f"base model {recipe.base.model}: has no tokenizer, or one that knows no letters; "
            "questions and text need it"
        )
    return tokenizer


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a Gemma, or of the language model of a Gemma 3 with images."""
    backbone = model.model
    layers = getattr(backbone, "language_model", backbone).layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def location(recipe: Recipe) -> dict[str, str]:
    """What to give `from_pretrained` for a recipe's base."""
    local = recipe.local(recipe.base.model)
    if local.is_dir():
        return {"pretrained_model_name_or_path": str(local)}
    return {"pretrained_model_name_or_path": recipe.base.model, "revision": recipe.base.revision}


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """One is drawn for every load, on a terminal or not."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
