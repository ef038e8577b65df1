"""A recipe's base model as stock transformers loads it, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bake.base import find_base
from bake.errors import ModelError, short, shown
from bake.families import FAMILIES
from bake.reading.capped import read_json, wrong_file
from bake.recipe import Recipe
from bake.strangers.model_view import shown_model


def load_base(recipe: Recipe, device: str = "cpu", dtype: str | None = None) -> Any:
    """A recipe's base model: its stock class, eager attention, in the recipe's dtype or another.

    Raises:
        ModelError: it is missing, damaged, or no stock Gemma, or torch cannot run it on the device.
    """
    import transformers

    stock = [family.architecture for family in FAMILIES.values()]
    where = location(recipe)
    with _named(f"base model {recipe.base.model}"):
        with _one_line():
            config = transformers.AutoConfig.from_pretrained(**where, trust_remote_code=False)
        name = (config.architectures or ["none"])[0]
        if name not in stock:
            raise ModelError(f"its architecture is {name}; expected one of {', '.join(stock)}")
        model = load_model(getattr(transformers, name), where, dtype or recipe.base.dtype)
    return placed(model, device).requires_grad_(False)


def placed(model: Any, device: str) -> Any:
    """A model on a device. Changes `model`.

    Raises:
        ModelError: torch cannot run it there.
    """
    try:
        return model.to(device)
    except (AssertionError, RuntimeError) as error:  # torch without CUDA asserts
        raise ModelError(
            f"--device {device}: torch cannot run the model there ({reason_of(error)}); "
            "expected cpu, or cuda where torch has it"
        ) from error


def load_model(model_class: Any, where: dict[str, Any], dtype: str = "auto") -> Any:
    """A model by one of transformers' classes, on the CPU; code that lies beside it is not run.

    Args:
        model_class: an Auto class, or a model's own. It is shown config and safetensors only.
        where: what `from_pretrained` finds it by.
        dtype: auto, as it is stored; float32, bfloat16 or float16.

    Raises:
        ModelError: it is missing, damaged or lacks weights; the line does not name it.
    """
    import torch

    folder = Path(where["pretrained_model_name_or_path"])
    rest = {key: where[key] for key in where if key != "pretrained_model_name_or_path"}
    with shown_model(folder) if folder.is_dir() else nullcontext(folder) as shown:
        hidden = (str(shown), str(folder))
        with _one_line(hidden=hidden):
            model, info = model_class.from_pretrained(
                str(shown),
                **rest,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                attn_implementation="eager",
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"has no {missing[0]}; transformers would make it up. Download it again")
    read_whole(model)
    return model.eval()


def read_whole(model: Any) -> None:
    """Changes a model: every token goes through all its layers. Where a Gemma 4's last layers share
    keys and values, transformers gives them only the tokens whose logits are asked for.
    """
    backbone = model.get_decoder()
    if hasattr(backbone, "first_kv_shared_layer_idx"):
        backbone.first_kv_shared_layer_idx = None


def norm_gain(norm: Any) -> Tensor:
    """What a Gemma's norm multiplies by: [d] float32. Gemma 4's is w, all others' 1 + w."""
    weight = norm.weight.detach().float()
    gain: Tensor = weight if type(norm).__name__.startswith("Gemma4") else 1 + weight
    return gain


def load_tokenizer(recipe: Recipe) -> Any:
    """The base model's tokenizer, as it was loaded last where none of its files changed since: one
    of 262,144 tokens takes seconds. Whoever is given it leaves it as it is.

    Raises:
        ModelError: it is missing or damaged.
    """
    with _named(f"base model {recipe.base.model}"):
        where = location(recipe)
        folder = Path(where["pretrained_model_name_or_path"])
        files = [path.stat() for path in sorted(folder.iterdir()) if path.is_file()]
        return _tokenizer_of(folder, tuple((of.st_ino, of.st_size, of.st_mtime_ns) for of in files))


@lru_cache(maxsize=1)
def _tokenizer_of(folder: Path, _files: tuple[tuple[int, ...], ...]) -> Any:
    return open_tokenizer({"pretrained_model_name_or_path": str(folder), "local_files_only": True})


def open_tokenizer(where: dict[str, Any]) -> Any:
    """A tokenizer by what `from_pretrained` finds it by.

    Raises:
        ModelError: it is missing or damaged; the line does not name it.
    """
    from transformers import AutoTokenizer

    folder = Path(where["pretrained_model_name_or_path"])
    wrong = wrong_file(folder) or _wrong_special_tokens(folder / "special_tokens_map.json")
    if wrong is not None:
        raise ModelError(f"{wrong}; download it again")
    with _one_line("its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
        ids = set(tokenizer("A", add_special_tokens=False)["input_ids"])
    # Where the files are missing, a Gemma tokenizer that knows no text comes without a word.
    if ids <= {tokenizer.unk_token_id}:
        raise ModelError("has no tokenizer, or one that knows no letters; expected Gemma's")
    return tokenizer


def _wrong_special_tokens(path: Path) -> str | None:
    """What a special_tokens_map.json says that is no token: transformers takes all of it for
    arguments of the tokenizer, names of other files among them. None where all are tokens.
    """
    try:
        found = read_json(path)
    except (OSError, ValueError):  # mostly not there; whoever loads it says what is wrong with it
        return None
    keys = found if isinstance(found, dict) else {}
    odd = [key for key in keys if not key.endswith(("_token", "_tokens"))]
    return f"{path.name} says {shown(odd[0])}; expected tokens alone" if odd else None


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a Gemma, or of the language model of a Gemma 3 with images."""
    backbone = model.model
    layers = getattr(backbone, "language_model", backbone).layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def location(recipe: Recipe) -> dict[str, Any]:
    """What to give `from_pretrained` for a recipe's base: the folder that was found and checked.
    A hub id would be looked for beneath the current folder first.
    """
    local = recipe.local(recipe.base.model)
    folder = local if local.is_dir() else find_base(recipe).folder
    return {"pretrained_model_name_or_path": str(folder), "local_files_only": True}


def reason_of(error: BaseException) -> str:
    """The first line of an error, or its type where it says nothing."""
    return short(next(iter(str(error).strip().splitlines()), type(error).__name__))


@contextmanager
def _named(name: str) -> Iterator[None]:
    """A ModelError within the block says of which model it is."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error


@contextmanager
def _one_line(
    what: str = "transformers cannot load it", hidden: tuple[str, str] = ("", "")
) -> Iterator[None]:
    """What transformers raises becomes a line; its warnings and progress bars are kept back. Where
    it names the first of two paths, the second is meant.
    """
    try:
        with quiet():
            yield
    except ModelError:
        raise
    except Exception as error:  # transformers and tokenizers raise every kind
        reason = reason_of(error).replace(*hidden) if hidden[0] else reason_of(error)
        raise ModelError(
            f"{what} ({reason}); check the name and the network, or name a local folder"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block transformers warns of nothing and draws no progress."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
