"""The initial weights of the miniature's Gemma 2."""

import torch
from torch import Tensor
from transformers import Gemma2ForCausalLM

OFFSET_GAIN = 12.0
"""Attention logits per rotation at which a head prefers its offset at the start."""


@torch.no_grad()
def prepare(model: Gemma2ForCausalLM) -> None:
    """Changes `model`: initial weights from which looking up a choice is learned in few steps.

    What each branch adds starts small beside the token embeddings; two heads of the first layer
    start by looking one and two tokens back; in later layers like attends to like.
    """
    config = model.config
    d_in, d_head, n_heads = config.hidden_size, config.head_dim, config.num_attention_heads
    for layer in model.model.layers:
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            torch.nn.init.constant_(norm.weight, (2 * config.num_hidden_layers) ** -0.5 - 1)
    # Half of every embedding's square is one shared vector, which carries the heads' offsets.
    model.model.embed_tokens.weight.add_(d_in**-0.5).mul_(0.5**0.5)
    shared = torch.ones(d_in) / d_in**0.5
    fast = (torch.arange(d_head) % (d_head // 2) < 6).float()  # [d_head], fastest rotations
    gain = (OFFSET_GAIN / (0.5 * d_in)) ** 0.5
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight[:d_head] *= 0.1
    attention.k_proj.weight[:d_head] += gain * torch.outer(fast, shared)
    for head, offset in enumerate((1, 2)):
        query = _rotated(fast, -offset, model.model.rotary_emb.inv_freq)
        rows = attention.q_proj.weight[head * d_head : (head + 1) * d_head]
        rows *= 0.1
        rows += gain * torch.outer(query, shared)
    group = n_heads // config.num_key_value_heads
    for layer in model.model.layers[1:]:
        queries = layer.self_attn.q_proj.weight.view(n_heads, d_head, d_in)
        layer.self_attn.k_proj.weight.copy_(queries[::group].flatten(0, 1))


def _rotated(vector: Tensor, position: int, inv_freq: Tensor) -> Tensor:
    """Rotary embedding of `vector` [d_head] at `position`; `inv_freq` [d_head // 2]."""
    half = len(vector) // 2
    cos = torch.cos(position * inv_freq).repeat(2)
    sin = torch.sin(position * inv_freq).repeat(2)
    return vector * cos + torch.cat([-vector[half:], vector[:half]]) * sin
