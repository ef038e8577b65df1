"""Models that answer token by token, in torch or in ONNX Runtime, and the words for it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bake.base import check_plain
from bake.errors import BakeoutError, FolderError, ModelError
from bake.families import END_OF_TURN, LATER_TURNS
from bake.stock import load_model, open_tokenizer, reason_of
from bake.strangers.chat_template import NotRendered, rendered
from bakeout.terminal import printable
from export.carriers.onnx.genai_config import read_generation_config
from export.clamped import read_config
from export.code_check import check_code
from export.folder_contents import check_contents, check_files
from export.manifest import Manifest
from verify.engines.onnx_runner import OnnxRunner, ProviderError, open_runner
from verify.engines.sampling import Chooser
from verify.engines.what_loads import loading_class

if TYPE_CHECKING:
    from torch import Tensor

ENGINES = ("torch", "onnx")


@dataclass(frozen=True)
class Manner:
    """How answers are made."""

    max_new_tokens: int
    temperature: float | None = None
    """Of the draws; None or 0 takes the likeliest token."""

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise BakeoutError(
                f"--temperature {self.temperature}: expected 0 (the likeliest token) or above"
            )


class Speaker(Protocol):
    """A loaded model that goes on with a prompt."""

    def tokens(self, ids: list[int], manner: Manner, seed: int) -> Iterator[int]:
        """Tokens after `ids`, as they are made; up to `max_new_tokens`, whatever they say."""
        ...


class TorchSpeaker:
    """A model of transformers.

    Args:
        model: any causal language model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def tokens(self, ids: list[int], manner: Manner, seed: int) -> Iterator[int]:
        """See `Speaker`."""
        import torch

        choose = _chooser(manner, seed)
        new: Tensor = torch.tensor([ids])
        cache = None
        for _ in range(manner.max_new_tokens):
            with torch.inference_mode():
                output = self._model(
                    input_ids=new.to(self._model.device),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            cache = output.past_key_values
            token = choose(output.logits[:, -1].float().cpu())
            yield int(token)
            new = token[:, None]


class OnnxSpeaker:
    """A graph in ONNX Runtime."""

    def __init__(self, runner: OnnxRunner) -> None:
        self._runner = runner

    def tokens(self, ids: list[int], manner: Manner, seed: int) -> Iterator[int]:
        """See `Speaker`."""
        import torch

        prompt = torch.tensor([ids])
        steps = self._runner.generate(
            prompt,
            torch.ones_like(prompt),
            max_new_tokens=manner.max_new_tokens,
            do_sample=bool(manner.temperature),
            temperature=manner.temperature or 1.0,
            seed=seed,
        )
        return (int(token) for token in steps)


def _chooser(manner: Manner, seed: int) -> Chooser:
    return Chooser(bool(manner.temperature), manner.temperature or 1.0, seed=seed)


class Language:
    """A clamped folder's tokenizer: prompts to tokens, tokens to text.

    Args:
        folder: the clamped folder.

    Raises:
        FolderError: its tokenizer or its configs cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig

        self.folder = folder
        try:
            self.tokenizer = open_tokenizer(_at(str(folder)))
            config = AutoConfig.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            ).get_text_config()
        except Exception as error:  # each of transformers' checks raises another kind
            raise FolderError(f"{folder}: {reason_of(error)}") from error
        self.context: int = config.max_position_embeddings
        """Longest prompt and answer together, in tokens."""
        self.ends = self._ends(read_generation_config(folder), config)
        """Tokens that end an answer."""

    def _ends(self, generation: dict[str, Any], config: Any) -> frozenset[int]:
        stated = generation.get("eos_token_id")
        stated = config.eos_token_id if stated is None else stated
        ends = stated if isinstance(stated, list) else [stated]
        # Not every Gemma that was taught to chat says so in its generation_config.json.
        known = self.tokenizer.get_vocab()
        ends = [*ends, *(known.get(mark) for mark in (END_OF_TURN, LATER_TURNS[END_OF_TURN]))]
        return frozenset(end for end in ends if isinstance(end, int))

    def prompt_text(self, prompt: str) -> str:
        """A prompt in the folder's chat template; as it is where there is none."""
        if not self.tokenizer.chat_template:
            return prompt
        chat = [{"role": "user", "content": prompt}]
        (said,) = rendered(self.tokenizer, [chat], add_generation_prompt=True)
        if isinstance(said, NotRendered):
            raise FolderError(
                f"{self.folder}: its chat template refuses a prompt ({said.reason}); check the "
                "folder with `bakeout verify`"
            )
        return said

    def prompt_ids(self, prompt: str) -> list[int]:
        """A prompt in the folder's chat template, or after BOS as it is where there is none."""
        text = self.prompt_text(prompt)
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        bos = self.tokenizer.bos_token_id
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def pieces(self, tokens: Iterator[int]) -> Iterator[str]:
        """Text as it grows, fit for a terminal; ends where the answer does."""
        ids: list[int] = []
        shown = text = ""
        for token in tokens:
            if token in self.ends:
                break
            ids.append(token)
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            # A character of several tokens is not shown until it is whole.
            if not text.endswith("\ufffd"):
                yield _plain(text[len(shown) :])
                shown = text
        if text != shown:
            yield _plain(text[len(shown) :])


def _plain(text: str) -> str:
    return printable(text.replace("\t", "    ").replace("\r\n", "\n"))


# --------------------------------------------------------------------------- loading


def open_speaker(folder: Path, engine: str, device: str, dtype: str | None = None) -> Speaker:
    """Load a clamped folder, whose files are those that its manifest lists.

    Raises:
        FolderError: it is no clamped folder, lacks what the engine needs, is damaged, or holds what
            bakeout does not write.
        ProviderError: the engine cannot use the device here.
    """
    check_code(folder)
    read_config(folder)
    manifest = Manifest.read(folder)
    check_contents(folder, manifest)
    check_files(folder, manifest, [name for name in manifest.files if (folder / name).is_file()])
    if engine not in ENGINES:
        raise BakeoutError(f"--engine {engine}: expected {' or '.join(ENGINES)}")
    if engine == "onnx":
        if dtype is not None:
            raise BakeoutError(f"--dtype {dtype}: a graph has its own; expected --engine torch")
        return OnnxSpeaker(open_runner(folder, device=device))
    if not any(folder.glob("*.safetensors")):
        raise FolderError(f"{folder}: holds no weights for torch; pass --engine onnx")
    loading_class(folder)  # of transformers' many models, a Gemma and no other
    try:
        return load_torch(str(folder), device, dtype)
    except ModelError as error:
        raise FolderError(f"{folder}: {error}") from error


def open_base(name: str, device: str, language: Language, dtype: str | None = None) -> Speaker:
    """Load a model that is to read the same tokens as a clamped folder.

    Raises:
        ModelError: it cannot be loaded, or its tokenizer has another vocabulary.
    """
    try:
        if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            raise ModelError("no such folder; expected one, or a hub id")
        vocabulary = open_tokenizer(_at(name)).get_vocab()
        if vocabulary != language.tokenizer.get_vocab():
            raise ModelError(
                f"its tokenizer has {len(vocabulary)} tokens that are not the clamped folder's "
                f"{len(language.tokenizer.get_vocab())}; expected the model that was baked"
            )
        return load_torch(name, device, dtype)
    except ModelError as error:
        raise ModelError(f"--beside {name}: {error}") from error


def load_torch(name: str, device: str, dtype: str | None = None) -> TorchSpeaker:
    """A causal model by folder or hub id, in the dtype that it is stored in or another.

    A clamped folder is loaded by the classes of this installation: code in it is not run.

    Raises:
        ModelError: it is missing or damaged.
        ProviderError: torch does not have the device.
    """
    import torch
    import transformers

    number = device.partition(":")[2] or "0"
    there = number.isdecimal() and int(number[:6]) < torch.cuda.device_count()
    if device != "cpu" and not there:
        raise ProviderError(
            f"device {device}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA "
            "devices here; pass --device cpu, or install torch for CUDA"
        )
    if Path(name).is_dir():
        check_plain(Path(name), name)
    model = load_model(transformers.AutoModelForCausalLM, _at(name), dtype or "auto")
    return TorchSpeaker(model.to(device))


def _at(name: str) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": name, "local_files_only": Path(name).is_dir()}
