"""What students are to match: the base's and the clamped model's outputs, kept in bfloat16.

Of the logits, what the output matrix is applied to is kept: a vocabulary is hundreds of times as
wide as a residual stream.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bake.clamp import ClampWeights
from bake.distill.distill_texts import Rows
from bake.distill.objectives import Head, Seen
from bake.files.halving import in_halves
from bake.modeling_clamped_gemma import SAEClamp, SoFar
from bake.new_folder import check_space
from bake.stock import decoder_layers
from bake.tensors import Tensors, write_tensors

ROWS_AT_ONCE = 16
"""Rows of one forward, where memory allows."""


def read(model: Any, ids: Tensor, real: Tensor, layers: Sequence[int]) -> Seen:
    """Run a model over rows that are padded on the right, without its output matrix.

    Args:
        model: a stock Gemma.
        ids: [batch, seq].
        real: [batch, seq] bool.
        layers: whose outputs are wanted.
    """
    hidden: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[Any, Any, Any], None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            hidden[layer] = (output[0] if isinstance(output, tuple) else output)[real]

        return hook

    modules = decoder_layers(model)
    with ExitStack() as undo:
        for layer in layers:
            undo.callback(modules[layer].register_forward_hook(keep(layer)).remove)
        final = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return Seen(final[real], hidden)


def head_of(model: Any) -> Head:
    """A stock Gemma's output matrix."""
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    return Head(model.get_output_embeddings().weight, cap)


@contextmanager
def clamped(
    model: Any, clamps: Sequence[ClampWeights]
) -> Iterator[Callable[[Tensor, Tensor], None]]:
    """Within the block the clamps act on a stock model; call what it gives with the token ids of
    every forward, by which BOS is told, and which of them are no padding.
    """
    bos = model.config.get_text_config().bos_token_id
    exempt: dict[bool, Tensor] = {}
    so_far: SoFar | None = None

    def about(ids: Tensor, real: Tensor) -> None:
        nonlocal so_far
        exempt[True], exempt[False] = ids == bos, torch.zeros_like(ids, dtype=torch.bool)
        so_far = SoFar(real)

    def clamp(module: SAEClamp, exempt_bos: bool) -> Callable[[Any, Any, Any], Any]:
        return lambda _, __, h: module(h, exempt[exempt_bos], so_far)

    with ExitStack() as undo:
        for weights in clamps:
            module = module_of(weights, model.device)
            hook = clamp(module, weights.clamp.exempt_bos)
            layer = decoder_layers(model)[weights.layer]
            undo.callback(layer.register_forward_hook(hook).remove)
        yield about


def module_of(clamp: ClampWeights, device: Any) -> SAEClamp:
    """The product's own clamp of a recipe's table."""
    module: SAEClamp = SAEClamp.at(clamp.sae.W_enc.shape[0], clamp.site)
    tensors = {name: torch.tensor(array, device=device) for name, array in clamp.tensors.items()}
    if (whole := clamp.sae.whole) is not None:
        numbers = torch.frombuffer(bytearray(b"".join(whole.blocks())), dtype=module.W_enc.dtype)
        tensors["W_enc"] = numbers.view(whole.shape).to(device)
    module.load_state_dict(tensors, assign=True)
    return module


class Teacher:
    """A model's outputs on some rows, as they were kept.

    Args:
        folder: where they lie.
        rows: all rows of the corpus.
        numbers: of those that were kept, ascending.
    """

    def __init__(self, folder: Path, rows: Rows, numbers: Sequence[int]) -> None:
        self._file = folder / "outputs.safetensors"
        lengths = [len(rows.ids[number]) for number in numbers]
        ends = list(accumulate(lengths))
        self._places = {
            number: slice(end - length, end)
            for number, end, length in zip(numbers, ends, lengths, strict=True)
        }

    def seen(self, numbers: Sequence[int], device: Any = "cpu") -> Seen:
        """What it made of some of the rows, one after another, in float32."""
        with safe_open(self._file, framework="pt") as file:

            def of(name: str) -> Tensor:
                stored = file.get_slice(name)
                parts = [stored[self._places[number]] for number in numbers]
                return torch.cat(parts).to(device, torch.float32)

            layers = sorted(int(name) for name in file.keys() if name.isdigit())  # noqa: SIM118
            return Seen(of("final"), {layer: of(str(layer)) for layer in layers})


def teach(
    model: Any,
    clamps: Sequence[ClampWeights],
    rows: Rows,
    numbers: Sequence[int],
    layers: Sequence[int],
    *,
    cache: Path,
    about: dict[str, Any],
    progress: Callable[[float], None] = lambda _: None,
) -> Teacher:
    """Read from the cache, or take and keep, what a model makes of some rows.

    Args:
        model: the base.
        clamps: that act on it; none for the base itself.
        rows: of a corpus.
        numbers: of the rows that are wanted.
        layers: whose outputs are wanted besides.
        cache: folder.
        about: what the model and its clamps are; equal contents mean equal outputs.
        progress: called with the share that is done.

    Raises:
        OutputError: the cache's disk has no room for it.
    """
    numbers = sorted(set(numbers))
    key = {
        "schema": 1,
        **about,
        "clamps": [clamp_sha256(clamp) for clamp in clamps],
        "rows": rows.batch(numbers).sha256,
        "layers": list(layers),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache / "teachers" / name
    teacher = Teacher(folder, rows, numbers)
    if not _is_whole(folder):
        n = sum(len(rows.ids[number]) for number in numbers)
        width = model.config.get_text_config().hidden_size * (1 + len(layers))
        check_space(folder, 2 * 2 * n * width)  # in pieces, and as one file
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            _write(new, model, clamps, rows, numbers, layers, progress)
            shutil.rmtree(folder, ignore_errors=True)
            new.rename(folder)
    return teacher


def clamp_sha256(clamp: ClampWeights) -> str:
    """Of what a clamp does, and where."""
    gate = "" if clamp.clamp.tau is None else f" {clamp.clamp.tau!r}"
    digest = hashlib.sha256(f"{clamp.layer} {clamp.clamp.exempt_bos}{gate}".encode())
    for name, tensor in sorted(clamp.tensors.items()):
        digest.update(f"{name} {tensor.shape}".encode() + tensor.tobytes())
    return digest.hexdigest()


def _is_whole(folder: Path) -> bool:
    try:
        with safe_open(folder / "outputs.safetensors", framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


@torch.no_grad()
def _write(
    folder: Path,
    model: Any,
    clamps: Sequence[ClampWeights],
    rows: Rows,
    numbers: Sequence[int],
    layers: Sequence[int],
    progress: Callable[[float], None],
) -> None:
    """Block by block, so that memory does not grow with the corpus."""
    n = sum(len(rows.ids[number]) for number in numbers)
    d_in = model.config.get_text_config().hidden_size
    files = {name: (folder / f"{name}.bits") for name in ["final", *map(str, layers)]}
    with ExitStack() as opened, clamped(model, clamps) as tell:
        writers = {name: opened.enter_context(file.open("wb")) for name, file in files.items()}

        def keep(some: slice) -> None:
            ids, real = rows.batch(numbers[some]).padded(model.device)
            tell(ids, real)
            seen = read(model, ids, real, layers)
            tensors = {"final": seen.final, **{str(at): h for at, h in seen.hidden.items()}}
            bits = {
                name: tensor.to("cpu", torch.bfloat16).contiguous().view(torch.int16)
                for name, tensor in tensors.items()
            }
            for name, writer in writers.items():
                writer.write(bits[name].numpy().tobytes())
            progress(some.stop / len(numbers))

        in_halves(model, "teachers' outputs", keep, len(numbers), most=ROWS_AT_ONCE)

    def blocks(file: Path) -> Callable[[], Iterator[bytes]]:
        def give() -> Iterator[bytes]:
            with file.open("rb") as stored:
                while block := stored.read(1 << 24):
                    yield block

        return give

    tensors: Tensors = {name: ("BF16", (n, d_in), blocks(file)) for name, file in files.items()}
    write_tensors(folder / "outputs.safetensors", tensors, lambda _: None)
    for file in files.values():
        file.unlink()
