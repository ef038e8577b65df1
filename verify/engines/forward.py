"""What a loaded model of transformers says to token ids, in whichever process it is.

Needs torch and transformers only: `torch_worker` reads this file by its path.
"""

from __future__ import annotations

from typing import Any

AT_ONCE = 16
"""Of how many tokens the losses are taken together."""


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


def run(model: Any, input_ids: Any, attention_mask: Any) -> None:
    """One forward pass for what hooks see of it: no logits but the last are formed.

    Args:
        model: a Gemma.
        input_ids: [batch, seq], padded on the left.
        attention_mask: [batch, seq], 1 at real tokens.
    """
    import torch

    ids, mask = (of.to(model.device) for of in (input_ids, attention_mask))
    with torch.inference_mode():
        model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=1,
        )


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
    kept = wanted[formed]
    logits = (found if bool(kept.all()) else found[kept]).float().cpu().contiguous()
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


def go_on(model: Any, tensors: dict[str, Any], most: int, *, cached: bool = True) -> Any:
    """The likeliest next token, again and again: [batch, steps], -1 after a stop.

    Args:
        model: a Gemma.
        tensors: input_ids and attention_mask, [batch, seq], padded on the left; stops, [k], the
            tokens that end a sequence, which stand last in it.
        most: how many steps at most.
        cached: keep the keys and values of what was read; else all is read again at every step.
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
                use_cache=cached,
                logits_to_keep=1,
            )
        cache = output.past_key_values if cached else None
        token = output.logits[:, -1].argmax(dim=-1)
        steps.append(token.masked_fill(ended, -1))
        ended |= torch.isin(token, stops)
        if bool(ended.all()):
            break
        ids = token[:, None] if cached else torch.cat([ids, token[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(token)[:, None]], dim=1)
    return torch.stack(steps, dim=1).cpu()
