"""What a GGUF file says, against what the folder says: in llama.cpp where it is installed, else by
reading the file back.

A compiled folder's file is asked the folder's witnesses, whose logits with and without the clamp
are known: it has to show the clamp. Another one is asked a few texts, which torch is asked too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bake.errors import BakeoutError, CheckError, FolderError
from bake.files.scratch import Scratch
from bake.rounding import MIN_EFFECT
from bake.strangers import confined
from export.carriers.gguf.gguf_types import Planned, largest_error
from export.manifest import RoundedEntry
from export.witness_file import WITNESSES, Witnesses

if TYPE_CHECKING:
    from export.carriers.gguf.gguf_file import StockModel

SAMPLES = (
    "The river bends twice before it meets the sea.",
    "In 1987 there were 12,345 of them, at 3.5 each (more or less).",
    "Gr\u00fc\u00dfe aus K\u00f6ln, \u00e0 bient\u00f4t!",
    "\u4eca\u65e5\u306f\u3044\u3044\u5929\u6c17\u3067\u3059\u306d\u3002",
    "def f(x):\n    return x  # two  spaces\n\n\n",
    "<start_of_turn>user\nWhat is it?<end_of_turn>\n<start_of_turn>model\n",
)
"""Texts that are split into tokens by both."""
MOST_KL = 0.5
"""Mean distance from torch, in nats per token, above which a file is another model than its folder:
one that is read wrongly is further off, and 4 bits are nearer."""
PROGRAM = Path(__file__).with_name("llama_process.py")
"""It needs llama.cpp, so it is never imported here."""
RUNTIME = "xllamacpp"
"""The package that brings llama.cpp."""
Values = dict[str, NDArray[Any]]


def has_llama_cpp() -> bool:
    """Whether llama.cpp is installed here."""
    return find_spec(RUNTIME) is not None


@dataclass(frozen=True)
class Checked:
    """What was found, and by whom."""

    by: str
    """llama.cpp, with its version, or reading back."""
    tokens: int = 0
    """How many tokens' logits were compared."""
    same_top: int = 0
    """In how many of them the likeliest token is the folder's."""
    kl: float | None = None
    """Mean distance from torch in nats per token, where no clamp is known."""
    clamp: RoundedEntry | None = None
    """How far it is from the clamped checkpoint, beside what the clamp does."""
    split_alike: int | None = None
    """How many of `SAMPLES` are split into the same tokens; None where that was not tried."""
    quantize: str = ""
    """How llama.cpp's own quantizer is called, where a clamp is to survive it."""

    @property
    def warnings(self) -> list[str]:
        """What a user has to know."""
        found = []
        if self.clamp is not None and self.clamp.warning is not None:
            found.append(self.clamp.warning)
        if self.split_alike is not None and self.split_alike < len(SAMPLES):
            found.append(
                f"llama.cpp splits {len(SAMPLES) - self.split_alike} of {len(SAMPLES)} sample "
                "texts into other tokens than the folder's tokenizer; where it is given tokens, "
                "nothing changes"
            )
        return found

    @property
    def lines(self) -> list[str]:
        """Each finding, for a terminal."""
        if not self.tokens:
            return [f"{self.by}: every number is the folder's but for the rounding of its type"]
        found = [f"{self.by}: same likeliest token in {self.same_top} of {self.tokens}"]
        if self.clamp is not None:
            found.append(
                f"max |\u0394logit| to the checkpoint {self.clamp.error:.1e}; the clamp moves "
                f"{self.clamp.effect:.1e}, of which {self.clamp.shown:.0%} shows"
            )
        if self.kl is not None:
            found.append(f"mean KL to torch {self.kl:.1e} nats per token")
        return found


def check_file(file: Path, stock: StockModel, tokenizer: Any, plan: Sequence[Planned]) -> Checked:
    """Check a file that was just written.

    Args:
        file: it.
        stock: what it was made from.
        tokenizer: the folder's.
        plan: its tensors.

    Raises:
        CheckError: it does not say what the folder says.
        FolderError: the folder's clamp cannot be asked: it has no witnesses.
    """
    if not has_llama_cpp():
        _read_back(file, plan)
        return Checked("read back (llama.cpp is not installed: pip install 'bakeout[llamacpp]')")
    by = f"llama.cpp ({RUNTIME} {version(RUNTIME)})"
    wanted = [tokenizer(text)["input_ids"] for text in SAMPLES]
    if stock.compiled_layers:
        witnesses = witnesses_of(stock)
        said = ask(file, {k: getattr(witnesses, k).numpy() for k in _ASKED}, wanted)
        clamp = _shown(witnesses, said["logprobs"])
        top = np.take_along_axis(
            witnesses.token_ids.numpy(), witnesses.logits.numpy().argmax(-1)[:, None], -1
        )[:, 0]
        found = Checked(by, len(top), int((said["best"] == top).sum()), clamp=clamp)
    else:
        asked, logits = _in_torch(stock, wanted)
        said = ask(file, asked, wanted)
        kl = _kl(logits, said["logprobs"])
        if not kl <= MOST_KL:
            raise CheckError(
                f"the file was not kept: in llama.cpp it is {kl:.2g} nats per token from what "
                f"torch says (bar {MOST_KL}); please report this"
            )
        same = int((said["best"] == logits.argmax(-1)).sum())
        found = Checked(by, len(logits), same, kl=kl)
    return replace(found, split_alike=int(said["alike"].sum()))


_ASKED = ("input_ids", "attention_mask", "places", "token_ids")


def witnesses_of(stock: StockModel) -> Witnesses:
    """A compiled folder's.

    Raises:
        FolderError: it has none.
    """
    if not (stock.folder / WITNESSES).is_file():
        raise FolderError(
            f"{stock.folder}: has no witnesses, so a GGUF file cannot be checked; compile it from "
            "a checkpoint that has some (`bakeout bake --witnesses`)"
        )
    return Witnesses.load(stock.folder)


def ask(file: Path, asked: Values, splits: Sequence[Sequence[int]]) -> Values:
    """What llama.cpp says, in a process that is confined.

    Args:
        file: a GGUF file.
        asked: as `llama_process` documents it, without texts.
        splits: the tokens of `SAMPLES`.

    Raises:
        CheckError: it refuses the file.
    """
    texts, tokens = (
        np.frombuffer(json.dumps(of).encode(), np.uint8) for of in (SAMPLES, list(splits))
    )
    with Scratch("gguf") as scratch:
        request, answer = scratch / "request.npz", scratch / "answer.npz"
        given: dict[str, Any] = {**asked, "texts": texts, "splits": tokens}
        np.savez(request, **given)
        program = (str(PROGRAM), str(file.resolve()), str(request), str(answer))
        if (why := confined.run(*program, scratch=scratch)) is not None:
            raise CheckError(
                f"the file was not kept: llama.cpp refuses it: {why}; please report this"
            )
        with np.load(answer) as found:
            return dict(found)


def _shown(witnesses: Witnesses, said: NDArray[np.float32]) -> RoundedEntry:
    """How much of the clamp shows in some log-probabilities [m, w].

    They are logits but for one number per token, which no probability depends on: each token's are
    shifted to the hook's on average.

    Raises:
        CheckError: less than half, or they are nearer the base's.
    """
    hook, base = witnesses.logits.numpy(), witnesses.unclamped.numpy()
    logits = said + (hook - said).mean(axis=-1, keepdims=True)
    base = base + (hook - base).mean(axis=-1, keepdims=True)
    effect = hook - base
    shown = float(((logits - base) * effect).sum() / (effect * effect).sum())
    to_hook, to_base = (float(np.linalg.norm(logits - of)) for of in (hook, base))
    if not (shown >= MIN_EFFECT and to_hook < to_base):  # NaN too
        raise CheckError(
            f"the file was not kept: in llama.cpp it shows {shown:.2f} of the clamp's effect (bar "
            f"{MIN_EFFECT}), {to_hook:.1e} from the checkpoint's logits and {to_base:.1e} from the "
            "base's over all witnesses; expected the other way. Take another --outtype"
        )
    error, moved = float(np.abs(logits - hook).max()), float(np.abs(effect).max())
    return RoundedEntry(error=error, effect=moved, shown=shown)


def _in_torch(
    stock: StockModel, prompts: Sequence[Sequence[int]]
) -> tuple[Values, NDArray[np.float32]]:
    """The question of `llama_process` at the last two tokens of each prompt, and what torch says,
    [m, vocab], in float32.
    """
    import torch
    import transformers

    from bake.stock import load_model

    where = {"pretrained_model_name_or_path": str(stock.folder), "local_files_only": True}
    model = load_model(transformers.AutoModelForCausalLM, where, "float32")
    longest = max(map(len, prompts))
    ids = np.zeros((len(prompts), longest), np.int64)
    mask = np.zeros_like(ids)
    rows, places = [], []
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt])).logits[0, -2:]
        rows.append(logits.float().numpy())
        places += [(row, longest - 2), (row, longest - 1)]
    said = np.concatenate(rows)
    every = np.broadcast_to(np.arange(said.shape[1]), said.shape)
    values = (ids, mask, np.array(places), np.ascontiguousarray(every))
    return dict(zip(_ASKED, values, strict=True)), said


def _kl(of: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Mean KL(of || other) in nats, from logits [m, vocab]."""
    import torch

    p, q = (torch.from_numpy(logits).double().log_softmax(dim=-1) for logits in (of, other))
    return float(torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True))


def _read_back(file: Path, plan: Sequence[Planned]) -> None:
    """Raise CheckError unless a file's numbers are the folder's but for rounding."""
    from gguf import GGUFReader, dequantize

    try:
        inside = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
        for of in plan:
            tensor = inside.pop(of.name)
            start = 0
            for values in of.blocks():
                stored = dequantize(tensor.data[start : start + len(values)], tensor.tensor_type)
                if not (np.abs(stored - values) <= largest_error(values, of.kind)).all():
                    raise ValueError(f"{of.name} holds other numbers than {of.tensor.file.name}")
                start += len(values)
        if inside:
            raise ValueError(f"{next(iter(inside))} is in no plan")
    except BakeoutError:
        raise
    except Exception as error:  # whatever `gguf` meets
        raise CheckError(
            f"the file was not kept: read back, it does not hold ({error}); please report this"
        ) from error
