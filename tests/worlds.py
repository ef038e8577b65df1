"""Tiny worlds: random models, SAEs, tokenizers, questions and texts that tests are run on."""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy

D_IN = 32
D_SAE = 64
N_LAYERS = 4
VOCAB = 99
FAMILIES = (
    *("gemma", "gemma2", "gemma3_text", "gemma3"),
    *("gemma4_text", "gemma4", "gemma4_unified_text", "gemma4_unified"),
)
_PER_LAYER = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB}
_SHARED = _PER_LAYER | {"num_kv_shared_layers": 2, "use_double_wide_mlp": True}
GEMMA_4_TEXT: dict[str, dict[str, Any]] = {
    "gemma4_text": {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "gemma4_text, per-layer embeddings": _PER_LAYER,
    "gemma4_text, shared keys": _SHARED,  # transformers shares none without these embeddings
    "gemma4_text, experts": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    },
}
"""Kinds of Gemma 4, and what each says of itself."""
KINDS = (*FAMILIES, *list(GEMMA_4_TEXT)[1:])
"""Every kind of model; a name begins with its family's."""


def tiny_config(family: str) -> Any:
    """A config of a few thousand parameters, with a sliding window shorter than the prompts.

    Args:
        family: or a kind.
    """
    import transformers as tf

    common = {
        "vocab_size": VOCAB,
        "hidden_size": D_IN,
        "intermediate_size": 48,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
    }
    if family == "gemma":
        return tf.GemmaConfig(**common)
    windowed = {**common, "sliding_window": 8, "query_pre_attn_scalar": 8}
    if family == "gemma2":
        return tf.Gemma2Config(
            **windowed, final_logit_softcapping=30.0, attn_logit_softcapping=50.0
        )
    if family == "gemma3_text":
        return tf.Gemma3TextConfig(**windowed, sliding_window_pattern=2)
    if family.startswith("gemma4"):
        return _tiny_gemma_4(family, {**common, "sliding_window": 8, "global_head_dim": 16})
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "model_type": "siglip_vision_model",
    }
    return tf.Gemma3Config(
        text_config={**windowed, "sliding_window_pattern": 2},
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=98,
        boi_token_index=96,
        eoi_token_index=97,
    )


def _tiny_gemma_4(kind: str, text: dict[str, Any]) -> Any:
    """With images one that is as the smallest of Google's."""
    import transformers as tf

    text["layer_types"] = ["sliding_attention", "full_attention"] * (N_LAYERS // 2)
    none = {"hidden_size_per_layer_input": 0}
    if kind == "gemma4_unified_text":
        return tf.Gemma4UnifiedTextConfig(**text)
    if kind in GEMMA_4_TEXT:
        return tf.Gemma4TextConfig(**text, **none | GEMMA_4_TEXT[kind])
    tokens = {"boi_token_id": 95, "eoi_token_id": 95}
    tokens |= {"image_token_id": 98, "video_token_id": 97, "audio_token_id": 96}
    if kind == "gemma4_unified":
        vision = {"patch_size": 2, "pooling_kernel_size": 1, "mm_embed_dim": 16}
        vision |= {"mm_posemb_size": 8, "output_proj_dims": 16}
        return tf.Gemma4UnifiedConfig(text_config=text, vision_config=vision, **tokens)
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    vision |= {"num_attention_heads": 2, "num_key_value_heads": 2, "patch_size": 2}
    vision |= {"pooling_kernel_size": 2, "position_embedding_size": 8}
    audio = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    audio |= {"subsampling_conv_channels": [4, 2], "output_proj_dims": 8}
    parts = {"text_config": text | _SHARED, "vision_config": vision, "audio_config": audio}
    return tf.Gemma4Config(**parts, **tokens)


def tiny_model(family: str, config: Any, *, seed: int = 0) -> Any:
    """A random model of a family or kind, with a config of it."""
    import transformers as tf

    heads = {
        "gemma": tf.GemmaForCausalLM,
        "gemma2": tf.Gemma2ForCausalLM,
        "gemma3_text": tf.Gemma3ForCausalLM,
        "gemma3": tf.Gemma3ForConditionalGeneration,
        "gemma4_text": tf.Gemma4ForCausalLM,
        "gemma4": tf.Gemma4ForConditionalGeneration,
        "gemma4_unified_text": tf.Gemma4UnifiedForCausalLM,
        "gemma4_unified": tf.Gemma4UnifiedForConditionalGeneration,
    }
    torch.manual_seed(seed)
    model = heads[family.partition(",")[0]](config)
    if family == "gemma3":  # starts as zeros, which would hide the images
        model.model.multi_modal_projector.mm_input_projection_weight.data.normal_()
    for name, tensor in model.state_dict().items():  # ones, which would hide what multiplies
        if name.endswith(("q_norm.weight", "k_norm.weight")) and family.startswith("gemma4"):
            tensor.uniform_(0.2, 0.5)  # scores are not divided by anything else
        elif family.startswith("gemma4") and name.endswith(("norm.weight", "_scalar", "_scale")):
            tensor.uniform_(0.6, 1.2)
    return model


def tiny_base(
    folder: Path, family: str = "gemma2", *, seed: int = 0, shards: int = 1, dtype: str = "float32"
) -> Path:
    """A random model of a family or kind, saved as transformers saves it."""
    model = tiny_model(family, tiny_config(family), seed=seed).to(getattr(torch, dtype))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=size if shards == 1 else size // shards)
    return folder


@dataclass
class TinySAE:
    """A random SAE: arrays, [d_in, d_sae] and [d_sae, d_in]."""

    W_enc: np.ndarray
    b_enc: np.ndarray
    W_dec: np.ndarray
    b_dec: np.ndarray
    threshold: np.ndarray


def tiny_sae(seed: int = 0, d_in: int = D_IN, d_sae: int = D_SAE) -> TinySAE:
    """Random weights of which about a third of the features fire on a token."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    return TinySAE(
        W_enc=normal(d_in, d_sae, scale=0.3),
        b_enc=normal(d_sae, scale=0.1),
        W_dec=normal(d_sae, d_in, scale=0.3),
        b_dec=normal(d_in, scale=0.1),
        threshold=np.abs(normal(d_sae, scale=0.5)) + np.float32(0.1),
    )


def save_sae_lens(
    folder: Path,
    sae: TinySAE,
    *,
    layer: int = 1,
    architecture: str = "jumprelu",
    hook_name: str | None = None,
    apply_b_dec_to_input: bool = True,
    **config: Any,
) -> Path:
    """An SAE folder as sae_lens writes it: cfg.json and sae_weights.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    d_in, d_sae = sae.W_enc.shape
    if architecture == "topk":
        config.setdefault("k", 6)
    cfg = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.54.12",
            "hook_name": hook_name or f"blocks.{layer}.hook_resid_post",
            "model_name": "tiny",
        },
        **config,
    }
    tensors = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if architecture == "gated":
        rng = np.random.default_rng(7)
        tensors["b_gate"] = sae.b_enc
        tensors["b_mag"] = (rng.standard_normal(d_sae) * 0.1).astype(np.float32)
        tensors["r_mag"] = (rng.standard_normal(d_sae) * 0.2).astype(np.float32)
    else:
        tensors["b_enc"] = sae.b_enc
    if architecture == "jumprelu":
        tensors["threshold"] = sae.threshold
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_numpy(tensors, folder / "sae_weights.safetensors")
    return folder


def save_gemma_scope(folder: Path, sae: TinySAE) -> Path:
    """Gemma Scope's layout: `…/layer_L/…/params.npz`, no b_dec on the input."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **vars(sae))
    return folder


def save_gemma_scope_2(folder: Path, sae: TinySAE) -> Path:
    """Gemma Scope 2's layout: `…/layer_L_…/params.safetensors` with lower-case keys."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name.replace("W_", "w_"): array for name, array in vars(sae).items()}
    save_numpy(arrays, folder / "params.safetensors")
    hook = {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.1.output"}
    (folder / "config.json").write_text(json.dumps(hook | {"model_name": "gemma-v3-tiny"}))
    return folder


OTHER_PLACES = (
    "gemma-scope-2b-pt-mlp/layer_1/width_16k/average_l0_7",
    "gemma-scope-2b-pt-att/layer_1/width_16k/average_l0_7",
    "gemma-scope-2b-pt-transcoders/layer_1/width_16k/average_l0_7",
    "gemma-scope-2b-pt-res/embedding/width_16k/average_l0_7",
    "models--google--gemma-scope-9b-pt-mlp/snapshots/0f/layer_1/width_16k/average_l0_7",
    "models--google--gemma-scope-9b-pt-att/snapshots/0f/layer_1/width_16k/average_l0_7",
    "gemma-scope-2-1b-pt/mlp_out/layer_1_width_16k_l0_small",
    "gemma-scope-2-1b-pt/attn_out_all/layer_1_width_16k_l0_big",
    "models--google--gemma-scope-2-1b-pt/snapshots/0f/transcoder/layer_1_width_16k_l0_small",
    "models--google--gemma-scope-2-1b-pt/snapshots/0f/attn_out/layer_1_width_16k_l0_small",
)
"""Folders of Gemma Scope and Gemma Scope 2 (from `…_l0_…` alone) that say another place than the
residual stream, by themselves and in the hub's cache."""


def sae_table(path: str) -> dict[str, Any]:
    """The beginning of a [[clamp]] table over an SAE's folder. Where the folder is called by its
    layer only, as Gemma Scope's are, the recipe says that it is the residual stream's.
    """
    layer = re.search(r"layer_(\d+)", path)
    word = {"hook_point": f"blocks.{layer[1]}.hook_resid_post"} if layer else {}
    return {"sae": {"path": path}, **word}


def tiny_tokenizer(
    folder: Path, turns: tuple[str, str] = ("<start_of_turn>", "<end_of_turn>")
) -> Path:
    """A tokenizer by characters with Gemma's special tokens, where " A" to " D" are one token.

    Its ids stay below those that the tiny Gemma 3 keeps for images.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    special = ("<pad>", "<eos>", "<bos>", "<unk>", *turns)
    characters = string.ascii_letters + string.digits + "\n\u2581.,:;?!()'-"
    pairs = [f"\u2581{letter}" for letter in "ABCD"]
    vocab = {token: i for i, token in enumerate([*special, *characters, *pairs])}
    model = BPE(vocab=vocab, merges=[(pair[0], pair[1]) for pair in pairs], unk_token="<unk>")
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Replace("\u2581", " ")
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens=list(special[4:]),
    ).save_pretrained(folder)
    return folder


def tiny_words(n: int, seed: int) -> str:
    """Made-up words."""
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abdeiklmnorstu", k=rng.randint(2, 6))) for _ in range(n))


def write_questions(path: Path, n: int, *, seed: int = 0, **extra: Any) -> Path:
    """Questions of made-up words, one JSON object a line."""
    rows = [
        {
            "question": f"{tiny_words(1 + i % 4, 100 * seed + i)}?",
            "choices": [tiny_words(1, 1000 * seed + 4 * i + c) for c in range(4)],
            "answer": (i + seed) % 4,
            **extra,
        }
        for i in range(n)
    ]
    return write_jsonl(path, rows)


def write_texts(path: Path, n: int, *, seed: int = 0) -> Path:
    """Texts of made-up words, one JSON object a line."""
    return write_jsonl(path, [{"text": tiny_words(3 + 5 * i, seed + i)} for i in range(n)])


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


RecipeWriter = Callable[..., Path]
"""What the fixture `write_recipe` gives."""


def cut(path: Path, keep: int) -> None:
    """Truncate a file to its first `keep` bytes."""
    with path.open("rb+") as file:
        file.truncate(keep)


@contextmanager
def room_for(tokens: int, *, layer: int) -> Iterator[list[int]]:
    """Within the block memory runs out in a layer of any stock Gemma 2 that is given more tokens at
    once; gives how many it was given, each time.
    """
    from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer

    asked: list[int] = []
    forward = Gemma2DecoderLayer.forward

    def limited(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.self_attn.layer_idx == layer:
            asked.append(hidden_states[..., 0].numel())
            if asked[-1] > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, hidden_states, *args, **kwargs)

    Gemma2DecoderLayer.forward = limited
    try:
        yield asked
    finally:
        Gemma2DecoderLayer.forward = forward


def notes(capsys: Any) -> list[str]:
    """Those that were given on stderr since it was read last."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]


def write_corpora(folder: Path) -> None:
    """Texts and questions to select features from, and text to measure loss on."""
    for seed, side in enumerate(("forget", "retain")):
        write_texts(folder / f"{side}.jsonl", 12, seed=seed)
        write_questions(folder / f"{side}_questions.jsonl", 10, seed=seed)
    write_texts(folder / "text.jsonl", 4, seed=9)


def talkative(root: Path) -> Path:
    """A recipe whose base does not say the same token for ever."""
    base = tiny_base(root / "base", "gemma2", seed=2)
    weights = load_numpy(base / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 0.2
    save_numpy(weights, base / "model.safetensors", metadata={"format": "pt"})
    save_sae_lens(root / "sae", tiny_sae())
    clamp = {"sae": {"path": "sae"}, "method": "clamp", "features": [0, 1, 2, 3], "value": -2.0}
    data = {"schema": 1, "base": {"model": "base", "license": "apache-2.0"}, "clamp": [clamp]}
    recipe = root / "recipe.toml"
    recipe.write_text(tomli_w.dumps(data))
    return recipe
