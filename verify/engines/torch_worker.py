"""A folder that bakeout wrote, loaded by transformers in a process that cannot import bakeout.

A second argument names the one package of bakeout that an adapter needs; then nothing is kept away.
Started by path with `python -I`; needs torch, transformers and safetensors only. Requests come on
stdin, answers go to stdout, each as eight bytes of length (little endian) and that many bytes of
safetensors; what a message says besides tensors stands in the safetensors' metadata:

    {"op": "load", "dtype", "device", "threads"} -> {"dtype", "class", "hidden_size"}
    {"op": "read"}, input_ids, attention_mask, wanted, scored   -> logits, losses
    {"op": "decoded", "n_last"}, input_ids, attention_mask      -> logits
    {"op": "go on", "most"}, input_ids, attention_mask, stops   -> tokens
    {"op": "tree"}, what verify.engines.token_tree.TokenTree.tensors gives -> logits

Logits are float32, losses float64. A request that fails is answered by {"error": one line}. The
process ends when stdin does.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any, BinaryIO

AT_ONCE = 16
"""Of how many tokens the losses are taken together."""
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


def load_model(folder: Path, asked: dict[str, str]) -> Any:
    """The checkpoint, as anybody would load it."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    base = json.loads(asked.get("base", "null"))
    where = base or {"pretrained_model_name_or_path": str(folder)}
    # Only a folder with code of its own is trusted to run any.
    trust = base is None and b'"auto_map"' in (folder / "config.json").read_bytes()
    config = transformers.AutoConfig.from_pretrained(**where, trust_remote_code=trust)
    name = (config.architectures or [""])[0]
    images = name.endswith("ForConditionalGeneration")
    auto = transformers.AutoModelForImageTextToText if images else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(
        **where,
        trust_remote_code=trust,
        dtype=getattr(torch, asked["dtype"]),
        attn_implementation="eager",
    )
    if base is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    return model.to(asked["device"]).eval()


def read(model: Any, tensors: dict[str, Any], choose: Any = None) -> tuple[Any, Any]:
    """Logits at some tokens and losses at some, of one forward pass that forms no others.

    Args:
        model: a Gemma.
        tensors: input_ids and attention_mask, [batch, seq]; wanted and scored, [batch, seq] bool.
        choose: gives `wanted` instead, once all layers were run.

    Returns:
        ([n, vocab] float32 on the CPU at the wanted tokens, row by row; [m] float64, nats, the
        cross-entropy of what follows each scored token).
    """
    import torch

    here = {name: tensor.to(model.device) for name, tensor in tensors.items()}
    mask = here["attention_mask"]
    formed = here.get("wanted")

    def pick(_: Any, args: Any) -> Any:
        nonlocal formed
        if choose is not None:
            formed = choose().to(model.device)
        return (args[0][formed | here["scored"]][None], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        with torch.inference_mode():
            output = model(
                input_ids=here["input_ids"],
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                use_cache=False,
            )
    finally:
        handle.remove()
    return parted(output.logits[0], formed, here["scored"], here["input_ids"])


def parted(found: Any, wanted: Any, scored: Any, input_ids: Any) -> tuple[Any, Any]:
    """(logits, losses) as `read` gives them.

    Args:
        found: [n, vocab] logits at all tokens that are wanted or scored.
        wanted: [batch, seq] bool.
        scored: [batch, seq] bool.
        input_ids: [batch, seq].
    """
    import torch

    formed = wanted | scored
    following = input_ids.roll(-1, dims=-1)[scored]
    of_scored = scored[formed].nonzero().flatten()
    pieces = zip(of_scored.split(AT_ONCE), following.split(AT_ONCE), strict=True)
    cross_entropy = torch.nn.functional.cross_entropy
    losses = [cross_entropy(found[at].float(), ids, reduction="none") for at, ids in pieces]
    logits = found[wanted[formed]].float().cpu().contiguous()
    return logits, torch.cat([*losses, found.new_zeros(0).float()]).double().cpu()


def tree_logits(model: Any, tensors: dict[str, Any]) -> Any:
    """Logits at the ends of a tree of tokens: [ends, vocab] float32, on the CPU.

    Args:
        model: a Gemma with eager attention; hooks on it see plain attention masks.
        tensors: what `verify.engines.token_tree.TokenTree.tensors` gives.
    """
    import torch
    from transformers import DynamicCache

    here = {name: tensor.to(model.device) for name, tensor in tensors.items()}
    trunk, ids, ends = here["trunk"], here["input_ids"], here["ends"]
    (rows, width), shared = ids.shape, trunk.shape[1]
    before = torch.arange(shared, device=model.device)[None]
    # Without a config a cache keeps what is beyond a sliding window.
    cache = DynamicCache() if shared else None
    with torch.inference_mode():
        if cache is not None:
            model(
                input_ids=trunk,
                attention_mask=torch.ones_like(trunk),
                position_ids=before,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache.batch_repeat_interleave(rows)
        seen = torch.cat([here["visible"].new_ones(rows, width, shared), here["visible"]], dim=-1)
        mask = _additive(seen, model)
        if getattr(config := model.config.get_text_config(), "layer_types", None):
            keys = torch.cat([before.expand(rows, -1), here["position_ids"]], dim=-1)
            near = here["position_ids"][..., None] - keys[:, None] < config.sliding_window
            windowed = _additive(seen & near, model)
            mask = {"full_attention": mask, "sliding_attention": windowed}

        def see_the_tree(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "attention_mask": mask}

        # Registered last: hooks before it are given token ids and a mask that they understand.
        handle = model.register_forward_pre_hook(see_the_tree, with_kwargs=True)
        try:
            output = model(
                input_ids=ids,
                attention_mask=torch.cat(
                    [ids.new_ones(rows, shared), here["attention_mask"]], dim=-1
                ),
                position_ids=here["position_ids"],
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=width - int(ends[:, 1].min()),
            )
        finally:
            handle.remove()
    at_ends = output.logits[ends[:, 0], ends[:, 1] - width]
    return at_ends.float().cpu().contiguous()


def _additive(seen: Any, model: Any) -> Any:
    """[rows, 1, queries, keys] in the model's dtype, to be added to scores."""
    import torch

    blank = torch.zeros(seen.shape, dtype=model.dtype, device=model.device)
    return blank.masked_fill(~seen, torch.finfo(model.dtype).min)[:, None]


def decoded(model: Any, tensors: dict[str, Any], n_last: int) -> Any:
    """[batch, n_last, vocab] float32, on the CPU: the last columns one by one, the rest cached."""
    import torch

    ids, mask = (tensors[name].to(model.device) for name in ("input_ids", "attention_mask"))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    begin = ids.shape[1] - n_last
    cache, found = None, []
    for start, stop in [(0, begin), *((c, c + 1) for c in range(begin, ids.shape[1]))]:
        with torch.inference_mode():
            output = model(
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        cache = output.past_key_values
        found.append(output.logits.float().cpu())
    return torch.cat(found[1:], dim=1).contiguous()


def go_on(model: Any, tensors: dict[str, Any], most: int) -> Any:
    """The likeliest next token, again and again, the rest cached: [batch, steps], -1 after a stop.

    Args:
        model: a Gemma.
        tensors: input_ids and attention_mask, [batch, seq], padded on the left; stops, [k], the
            tokens that end a sequence, which stand last in it.
        most: how many steps at most.
    """
    import torch

    names = ("input_ids", "attention_mask", "stops")
    ids, mask, stops = (tensors[name].to(model.device) for name in names)
    cache, steps = None, []
    ended = torch.zeros(len(ids), dtype=torch.bool, device=model.device)
    for _ in range(most):
        with torch.inference_mode():
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        cache = output.past_key_values
        token = output.logits[:, -1].argmax(dim=-1)
        steps.append(token.masked_fill(ended, -1))
        ended |= torch.isin(token, stops)
        if bool(ended.all()):
            break
        ids, mask = token[:, None], torch.cat([mask, torch.ones_like(token)[:, None]], dim=1)
    return torch.stack(steps, dim=1).cpu()


def serve(folder: Path, requests: BinaryIO, answers: BinaryIO, blocker: Blocker) -> None:
    """Answer requests until there are no more."""
    model: Any = None
    loaded: tuple[str, str] | None = None
    # What loading will need, while the other side prepares its own model.
    import safetensors.torch  # noqa: F401
    from transformers import AutoModelForCausalLM, Gemma2Model, Gemma3Model, GemmaModel  # noqa: F401

    while (data := read_message(requests)) is not None:
        asked, tensors = unpack(data)
        try:
            if asked["op"] == "load":
                import torch

                torch.set_num_threads(int(asked["threads"]))
                if loaded != (asked["dtype"], asked["device"]):
                    model = loaded = None  # before the next one takes memory
                    model = load_model(folder, asked)
                    loaded = (asked["dtype"], asked["device"])
                dtype = str(model.dtype).removeprefix("torch.")
                width = str(model.config.get_text_config().hidden_size)
                answer = pack({"dtype": dtype, "class": type(model).__name__, "hidden_size": width})
            elif asked["op"] == "read":
                answer = pack(
                    {}, dict(zip(("logits", "losses"), read(model, tensors), strict=True))
                )
            elif asked["op"] == "decoded":
                answer = pack({}, {"logits": decoded(model, tensors, int(asked["n_last"]))})
            elif asked["op"] == "tree":
                answer = pack({}, {"logits": tree_logits(model, tensors)})
            else:
                answer = pack({}, {"tokens": go_on(model, tensors, int(asked["most"]))})
        except Exception as error:  # whatever it is, the other side says it in one line
            reason = " ".join(str(error).split()) or "no further reason"
            if blocker.tried:
                reason = f"it tried to import {', '.join(sorted(set(blocker.tried)))}: {reason}"
            answer = pack({"error": f"{type(error).__name__}: {reason}"})
        write_message(answers, answer)


def main() -> None:
    """Serve the folder named on the command line."""
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
