"""A folder that bakeout wrote, loaded by transformers in a process that cannot import bakeout.

Started by path with `python -I`; needs torch, transformers and safetensors only. Its argument is
bakeout's own modeling file: no code of a folder is ever run. A second one names the one package of
bakeout that an adapter needs; then nothing is kept away. Requests come on stdin, answers go to
stdout, each as eight bytes of length (little endian) and that many bytes of safetensors; what a
message says besides tensors stands in the safetensors' metadata:

    {"op": "load", "model", "from", "class", "adapter", "dtype", "bits", "device", "threads"}
                                                     -> {"dtype", "class", "hidden_size"}
    {"op": "drop"} -> nothing is loaded any more
    {"op": "read"}, input_ids, attention_mask, wanted, scored   -> logits, losses
    {"op": "decoded", "n_last"}, input_ids, attention_mask      -> logits
    {"op": "go on", "most"}, input_ids, attention_mask, stops   -> tokens
    {"op": "tree"}, what verify.engines.token_tree.TokenTree.tensors gives -> logits

Logits are float32, losses float64. A request that fails is answered by {"error": one line}. The
process ends when stdin does.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any, BinaryIO

BLOCKED = ("bake", "export", "verify", "model_cards", "bakeout")


class Blocker(MetaPathFinder):
    """Refuses to import the packages of bakeout, and remembers which were asked for."""

    def __init__(self) -> None:
        self.tried: list[str] = []

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> None:
        """Raise for a blocked package; leave every other to the finders behind."""
        if name.partition(".")[0] in BLOCKED:
            self.tried.append(name)
            raise ImportError(f"{name} is a package of bakeout, which is kept away here")


def read_message(stream: BinaryIO) -> bytes | None:
    """The next message, or None at the end of the stream."""
    length = stream.read(8)
    if len(length) < 8:
        return None
    size = int.from_bytes(length, "little")
    data = stream.read(size)
    return data if len(data) == size else None


def write_message(stream: BinaryIO, data: bytes) -> None:
    """Send one message."""
    stream.write(len(data).to_bytes(8, "little"))
    stream.write(data)
    stream.flush()


def pack(metadata: dict[str, str], tensors: dict[str, Any] | None = None) -> bytes:
    """Tensors and words as one message."""
    from safetensors.torch import save

    data: bytes = save(tensors or {}, metadata=metadata)
    return data


def unpack(data: bytes) -> tuple[dict[str, str], dict[str, Any]]:
    """(words, tensors) of a message."""
    from safetensors.torch import load

    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header.get("__metadata__") or {}, load(data)


def load_model(asked: dict[str, str], modeling: Path) -> Any:
    """The model of a folder, and an adapter over it, with no code and no pickle of either.

    Args:
        asked: `model`, a folder with nothing but config and safetensors; `class`, which is to load
            it, from `transformers` or from `bakeout`'s modeling file; `adapter`, a folder or "";
            `bits`, to which its layers' matrices are rounded, or "".
        modeling: that file.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.dynamic_module_utils.get_class_in_module = _no_code
    source = by_path(modeling) if asked["from"] == "bakeout" else transformers
    model = getattr(source, asked["class"]).from_pretrained(
        asked["model"],
        dtype=getattr(torch, asked["dtype"]),
        attn_implementation="eager",
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
    )
    if asked["adapter"]:
        stated = json.loads((Path(asked["adapter"]) / "adapter_config.json").read_bytes())
        if str(stated.get("peft_type")).partition(":")[0] != "SAE_CLAMP":
            raise ValueError(f"its peft_type is {stated.get('peft_type')!r}; expected 'SAE_CLAMP'")
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, asked["adapter"])
    if asked["bits"]:
        rounding = by_path(Path(__file__).resolve().parents[2] / "bake" / "rounding.py")
        change = partial(rounding.rounded_to_integers, bits=int(asked["bits"]))
        rounding.coarsen(model.get_decoder().layers, change)
    return model.to(asked["device"]).eval()


def by_path(file: Path) -> Any:
    """A Python file as a module of its own name."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _no_code(name: Any, module: Any, *_: Any, **__: Any) -> Any:
    """In place of what runs a file of a model's folder."""
    raise ValueError(f"{name} of {module} is code of the folder, which is never run")


def serve(modeling: Path, requests: BinaryIO, answers: BinaryIO, blocker: Blocker) -> None:
    """Answer requests until there are no more."""
    model: Any = None
    loaded: dict[str, str] | None = None
    forward = by_path(Path(__file__).with_name("forward.py"))
    # What loading will need, while the other side prepares its own model.
    import safetensors.torch  # noqa: F401
    from transformers import AutoModelForCausalLM, Gemma2Model, Gemma3Model, GemmaModel  # noqa: F401

    while (data := read_message(requests)) is not None:
        asked, tensors = unpack(data)
        failed = False
        try:
            if asked["op"] == "load":
                import torch

                torch.set_num_threads(int(asked["threads"]))
                which = {key: value for key, value in asked.items() if key != "threads"}
                if loaded != which:
                    model = loaded = None  # before the next one takes memory
                    model, loaded = load_model(asked, modeling), which
                dtype = str(model.dtype).removeprefix("torch.")
                width = str(model.config.get_text_config().hidden_size)
                answer = pack({"dtype": dtype, "class": type(model).__name__, "hidden_size": width})
            elif asked["op"] == "read":
                answer = pack(
                    {}, dict(zip(("logits", "losses"), forward.read(model, tensors), strict=True))
                )
            elif asked["op"] == "drop":
                model = loaded = None
                give_back()
                answer = pack({"op": "drop"})
            elif asked["op"] == "decoded":
                answer = pack({}, {"logits": forward.decoded(model, tensors, int(asked["n_last"]))})
            elif asked["op"] == "tree":
                answer = pack({}, {"logits": forward.tree_logits(model, tensors)})
            else:
                answer = pack({}, {"tokens": forward.go_on(model, tensors, int(asked["most"]))})
        except Exception as error:  # whatever it is, the other side says it in one line
            reason = " ".join(str(error).split()) or "no further reason"
            if blocker.tried:
                reason = f"it tried to import {', '.join(sorted(set(blocker.tried)))}: {reason}"
            answer = pack({"error": f"{type(error).__name__}: {reason}"})
            failed = True
        if failed:  # perhaps for want of memory: of the half that comes next nothing is in the way
            give_back()
        write_message(answers, answer)
        answer = b""  # logits are large: not kept beside the next ones


def give_back() -> None:
    """Give back the memory of what is gone, to the system and to other users of the GPU."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def main() -> None:
    """Serve one folder at a time."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints, prints to stderr
    sys.stdout = sys.stderr
    os.environ["HF_HUB_OFFLINE"] = "1"
    if loaded := [name for name in BLOCKED if name in sys.modules]:
        write_message(answers, pack({"error": f"{loaded[0]} is imported already"}))
        return
    blocker = Blocker()
    if len(sys.argv) > 2:
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
        importlib.import_module(sys.argv[2])
    else:
        sys.meta_path.insert(0, blocker)
    serve(Path(sys.argv[1]), sys.stdin.buffer, answers, blocker)


if __name__ == "__main__":
    main()
