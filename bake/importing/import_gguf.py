"""A Gemma in a GGUF file → a folder that transformers loads, tensor by tensor, in bfloat16.

Names, config and tokenizer are those that transformers itself makes of such a file; the numbers
are dequantised by the `gguf` package, a few rows at a time, so that memory does not grow with the
model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bake.base import INDEX, WEIGHTS
from bake.errors import ModelError
from bake.families import END_OF_TURN, FAMILIES, GEMMA_BOS
from bake.files.scratch import Scratch
from bake.importing.gguf_header import check_header
from bake.new_folder import check_output, check_space, new_folder
from bake.tensors import Tensors, index_of, n_bytes, to_bits, write_tensors

DTYPE = "BF16"
SHARD_BYTES = 4 << 30
"""Most bytes of a weight file, about."""
ROW_BYTES = 16 << 20
"""Bytes of float32 that are dequantised at once, about."""
_READABLE = {"gemma2": "gemma2", "gemma3": "gemma3_text"}
"""Architectures, as GGUF names them, and our families: those that transformers reads."""
_AGAIN = "download it again"


@dataclass(frozen=True)
class Gguf:
    """A GGUF file, opened; no tensor is read yet."""

    family: str
    config: Any
    """transformers' config object, as it belongs into the folder."""
    tensors: dict[str, Any]
    """By transformers' name: the reader's tensor."""
    tokenizer: Any
    """As transformers rebuilds it."""

    @property
    def size(self) -> int:
        """Bytes of the weights that will be written."""
        return sum(n_bytes(_shape(tensor), DTYPE) for tensor in self.tensors.values())


def import_gguf(
    file: Path,
    out: Path,
    *,
    sha256: str | None = None,
    progress: Callable[[str, float], None] = lambda _stage, _share: None,
) -> Gguf:
    """Write the model of a GGUF file as a Hugging Face folder: weights, config, tokenizer.

    Args:
        file: a Gemma 2 or Gemma 3 (its text part), quantised or not.
        out: the folder to write.
        sha256: what the file must have; not looked at when None.
        progress: called with a stage and the share of it done, 0 to 1.

    Raises:
        ModelError: the file is another, damaged, of another family, or has no tokenizer that can be
            rebuilt.
        OutputError: the folder is there already, or the disk is full.
    """
    if not file.is_file():
        raise ModelError(f"{file}: is no file; expected a GGUF file")
    check_output(out, inputs=[file], size=0, force=False)
    if sha256 is not None:
        _check_sha256(file, sha256)
    progress("open", 0.0)
    gguf = open_gguf(file)
    check_space(out, gguf.size)
    with new_folder(out) as folder:
        gguf.tokenizer.save_pretrained(folder)
        gguf.config.save_pretrained(folder)
        _write_generation_config(gguf.config, gguf.tokenizer, folder)
        shards = _shards(gguf)
        done = 0

        def advance(n: int) -> None:
            nonlocal done
            done += n
            progress("write", done / gguf.size)

        for name, tensors in shards.items():
            write_tensors(folder / name, tensors, advance)
        if len(shards) > 1:
            (folder / INDEX).write_text(json.dumps(index_of(shards), indent=2) + "\n")
    return gguf


def open_gguf(file: Path) -> Gguf:
    """Parse a file, and find every tensor that the model needs.

    Raises:
        ModelError: see `import_gguf`.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError("GGUF files are read by `gguf`; pip install 'bakeout[gguf]'") from error
    if not file.is_file():
        raise ModelError(f"{file}: is no file; expected a GGUF file")
    try:
        check_header(file)
        reader = GGUFReader(file)
        architecture = str(reader.fields["general.architecture"].contents())
    except Exception as error:  # whatever is wrong in the file
        raise ModelError(
            f"{file}: is no GGUF file, or a truncated one ({_line(error)}); {_AGAIN}"
        ) from error
    if architecture not in _READABLE:
        raise ModelError(
            f"{file}: holds a model of the family {architecture}; expected one of "
            f"{', '.join(_READABLE)}"
        )
    if "tokenizer.ggml.tokens" not in reader.fields:
        raise ModelError(f"{file}: its tokenizer cannot be rebuilt (it has none); {_AGAIN}")
    family = _READABLE[architecture]
    # transformers reads what lies beside the file too, and that is not what was asked for.
    with Scratch("gguf") as alone, _read_once(reader):
        link = alone / "model.gguf"
        link.symlink_to(file.resolve())
        config = _config(file, link, reader, architecture, family)
        tensors = _tensors(file, reader, architecture, config)
        return Gguf(family, config, tensors, _tokenizer(file, link))


@contextmanager
def _read_once(reader: Any) -> Iterator[None]:
    """Within the block transformers is given the file as it was parsed: it would parse it anew for
    the config and for the tokenizer, and a vocabulary of 262,144 takes most of a minute each time.
    """
    import gguf

    kind = gguf.GGUFReader
    gguf.GGUFReader = lambda *_, **__: reader  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        gguf.GGUFReader = kind  # type: ignore[misc]


def _config(file: Path, link: Path, reader: Any, architecture: str, family: str) -> Any:
    from transformers import AutoConfig

    try:
        n_layers = int(reader.fields[f"{architecture}.block_count"].contents())
        n_tensors = len(reader.tensors)
        if not 0 < n_layers <= n_tensors:
            raise ValueError(f"{n_layers} layers in {n_tensors} tensors")
        config = AutoConfig.from_pretrained(link.parent, gguf_file=link.name)
    except Exception as error:  # whatever is wrong in the file
        raise ModelError(f"{file}: has no config that fits ({_line(error)}); {_AGAIN}") from error
    config.architectures = [FAMILIES[family].architecture]
    config.dtype = "bfloat16"
    config._name_or_path = ""
    # What transformers does not take over: beyond some length, positions are scaled.
    scaling = reader.fields.get(f"{architecture}.rope.scaling.factor")
    if scaling is not None and isinstance(rope := config.rope_parameters, dict):
        rope = rope.get("full_attention", rope)
        rope |= {"rope_type": "linear", "factor": float(scaling.contents())}
    return config


def _tensors(file: Path, reader: Any, architecture: str, config: Any) -> dict[str, Any]:
    """Per tensor of the stock model, that of the file; shapes must agree."""
    import torch
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from transformers import AutoModelForCausalLM

    kind = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(kind, config.num_hidden_layers)
    inside = {tensor.name: tensor for tensor in reader.tensors}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = "lm_head.weight" if "output.weight" not in inside else None
    tensors = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name == tied:
            continue
        stem, _, suffix = name.rpartition(".")
        tensor = inside.pop(f"{names.get_name(stem)}.{suffix}", None)
        if tensor is None:
            raise ModelError(f"{file}: has no tensor for {name}; {_AGAIN}")
        if _shape(tensor) != tuple(parameter.shape):
            raise ModelError(
                f"{file}: {tensor.name} has shape {_shape(tensor)}; expected "
                f"{tuple(parameter.shape)} by its own config"
            )
        _check_readable(file, tensor)
        tensors[name] = tensor
    inside.pop("rope_freqs.weight", None)  # of the scaling, which the config has
    if inside:
        raise ModelError(
            f"{file}: has a tensor {next(iter(inside))}, for which a {config.model_type} has no "
            f"place; {_AGAIN}"
        )
    return tensors


def _check_readable(file: Path, tensor: Any) -> None:
    """Raise ModelError unless the tensor's numbers can be had: of its first row, as of all."""
    from gguf import dequantize

    try:
        dequantize(tensor.data[:1], tensor.tensor_type)
    except Exception as error:  # whatever is wrong in the file
        raise ModelError(
            f"{file}: {tensor.name} is stored as {tensor.tensor_type.name}, which `gguf` does not "
            f"read ({_line(error)}); expected another quantisation, such as Q4_K, Q8_0 or BF16"
        ) from error


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))


def _shards(gguf: Gguf) -> dict[str, Tensors]:
    """Files of at most `SHARD_BYTES`, in the model's order."""
    parts: list[Tensors] = [{}]
    size = 0
    for name, tensor in gguf.tensors.items():
        length = n_bytes(_shape(tensor), DTYPE)
        if parts[-1] and size + length > SHARD_BYTES:
            parts.append({})
            size = 0
        size += length
        parts[-1][name] = (DTYPE, _shape(tensor), partial(_blocks, name, tensor))
    if len(parts) == 1:
        return {WEIGHTS: parts[0]}
    n = len(parts)
    return {f"model-{i:05}-of-{n:05}.safetensors": part for i, part in enumerate(parts, 1)}


def _blocks(name: str, tensor: Any) -> Iterator[bytes]:
    """A tensor as bfloat16, some rows at a time."""
    from gguf import dequantize

    rows = len(tensor.data)
    step = max(1, ROW_BYTES * rows // (4 * int(np.prod(_shape(tensor)))))
    # Gemma multiplies with 1 + weight; GGUF stores the sum.
    less = np.float32(1.0 if name.endswith("norm.weight") else 0.0)
    for start in range(0, rows, step):
        values = dequantize(tensor.data[start : start + step], tensor.tensor_type)
        yield to_bits(values.astype(np.float32, copy=False) - less, DTYPE).tobytes()


def _tokenizer(file: Path, link: Path) -> Any:
    """The file's tokenizer, as transformers rebuilds it."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(link.parent, gguf_file=link.name)
        ids = tokenizer("a b", add_special_tokens=True)["input_ids"]
    except Exception as error:  # whatever is wrong in the file
        raise ModelError(
            f"{file}: its tokenizer cannot be rebuilt ({_line(error)}); {_AGAIN}"
        ) from error
    if tokenizer.bos_token_id != GEMMA_BOS or ids.count(GEMMA_BOS) > 1:
        raise ModelError(
            f"{file}: its tokenizer cannot be rebuilt (BOS is {tokenizer.bos_token_id}; expected "
            f"{GEMMA_BOS}, as every Gemma has it)"
        )
    return tokenizer


def _write_generation_config(config: Any, tokenizer: Any, folder: Path) -> None:
    """With the end of a turn among the ends, where the model was made for turns."""
    from transformers import GenerationConfig

    generation = GenerationConfig.from_model_config(config)
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    if tokenizer.chat_template is not None and end != tokenizer.unk_token_id:
        generation.eos_token_id = [tokenizer.eos_token_id, end]
    generation.save_pretrained(folder)


def _check_sha256(file: Path, expected: str) -> None:
    try:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(
            f"{file}: cannot be read ({error.strerror}); expected a GGUF file"
        ) from error
    if found != expected.lower():
        raise ModelError(f"{file}: has sha256 {found}; expected {expected.lower()}; {_AGAIN}")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
