"""onnxruntime-genai runs an exported folder as it is, and says what torch says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import bakeout
from bake.errors import FolderError
from bakeout.cli import run
from bakeout.verbs.demo import MINIATURE
from export.carriers.onnx.genai_config import genai_config, read_generation_config
from tests.folders import rehash
from tests.worlds import save_sae_lens, tiny_base, tiny_sae, tiny_tokenizer
from verify.engines.onnx_runner import open_runner

og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")

MODELS = {
    "gemma": (0, 0.1),
    "gemma2": (2, 0.2),
    "gemma3_text": (2, 0.1),
    "gemma2, dynamic": (2, 0.2),
}
"""Seed, and factor on the embeddings, with which a random model does not say one token for ever:
its first layers then outweigh the token that it has just read."""
WINDOW = 8
PROMPT = [2, *range(30, 42)]
N_NEW = 80


def lively_folder(folder: Path, family: str, seed: int, factor: float) -> Path:
    """A clamped folder with a shared graph, and an int4 graph in a folder of its own."""
    family, _, method = family.partition(", ")
    tiny_base(folder / "base", family, seed=seed)
    tiny_tokenizer(folder / "base")
    weights = load_file(folder / "base/model.safetensors")
    weights["model.embed_tokens.weight"] *= factor
    save_file(weights, folder / "base/model.safetensors", metadata={"format": "pt"})
    save_sae_lens(folder / "sae", tiny_sae())
    clamp = {"sae": {"path": "sae"}, "method": "clamp", "features": [0, 1, 2, 3], "value": -2.0}
    if method:
        clamp |= {"method": method, "trigger": 0.5, "tau": 0.3}
    base = {"model": "base", "license": "apache-2.0"}
    recipe = folder / "recipe.toml"
    recipe.write_text(tomli_w.dumps({"schema": 1, "base": base, "clamp": [clamp]}))
    baked, rounded = str(folder / "baked"), str(folder / "int4")
    assert run(["bake", str(recipe), "--out", baked]) == 0
    assert run(["export", "onnx", baked]) == 0
    assert run(["export", "onnx", baked, "--precision", "int4", "--out", rounded]) == 0
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("genai")
    return {name: lively_folder(root / name, name, *how) for name, how in MODELS.items()}


def by_torch(folder: Path, n: int = N_NEW) -> tuple[list[int], float]:
    """Greedy tokens of transformers, and by how much the closest of them was ahead."""
    from transformers import AutoModelForCausalLM

    assert bakeout  # registers the clamped classes
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype="float32"
    )
    ids = torch.tensor([PROMPT])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=n,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    ahead = min(float(-scores[0].topk(2).values.diff()) for scores in output.scores)
    return output.sequences[0, len(PROMPT) :].tolist(), ahead


def by_our_own(folder: Path, n: int = N_NEW) -> list[int]:
    ids = torch.tensor([PROMPT])
    with open_runner(folder, threads=1) as runner:
        steps = runner.generate(ids, torch.ones_like(ids), max_new_tokens=n, eos_token_ids=[1])
        return [int(token) for token in steps]


def without_end(tokens: list[int], end: int = 1) -> list[int]:
    """As genai has it: it stops at the token that ends an answer, and does not show it."""
    return tokens[:-1] if tokens[-1] == end else tokens


def by_genai(folder: Path, *rows: list[int], n: int = N_NEW) -> list[list[int]]:
    model = og.Model(str(folder))
    asked = og.GeneratorParams(model)
    asked.set_search_options(max_length=len(rows[0]) + n, batch_size=len(rows), do_sample=False)
    generator = og.Generator(model, asked)
    generator.append_tokens(np.array(rows, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(t) for t in generator.get_sequence(i)][len(rows[0]) :] for i in range(len(rows))]


@pytest.mark.parametrize("family", MODELS)
def test_genai_and_our_own_generate_say_what_torch_says(
    folders: dict[str, Path], family: str
) -> None:
    baked = folders[family] / "baked"
    expected, ahead = by_torch(baked)
    # A comparison that means something: many tokens, of many kinds, none by a hair's breadth.
    assert len(expected) >= 64 > WINDOW and len(set(expected)) >= 15 and ahead > 1e-4
    assert by_torch(folders[family] / "base")[0] != expected
    assert by_our_own(baked) == expected
    assert by_genai(baked, PROMPT) == [without_end(expected)]


@pytest.mark.parametrize("family", MODELS)
def test_a_rounded_graph_in_a_folder_of_its_own(folders: dict[str, Path], family: str) -> None:
    expected = by_our_own(folders[family] / "int4")
    assert len(set(expected)) >= 5
    assert by_genai(folders[family] / "int4", PROMPT) == [without_end(expected)]


def test_genai_batches(folders: dict[str, Path]) -> None:
    """Rows of one length; genai does not mask what stands to the left of shorter ones."""
    other = [2, *range(50, 50 + len(PROMPT) - 1)]
    baked = folders["gemma2"] / "baked"
    alone = [*by_genai(baked, PROMPT, n=40), *by_genai(baked, other, n=40)]
    assert by_genai(baked, PROMPT, other, n=40) == alone and alone[0] != alone[1]


def test_genai_stops_where_the_generation_config_says(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    baked = folders["gemma"] / "baked"
    full = by_our_own(baked)
    end = next(token for i, token in enumerate(full) if i >= 5 and token not in full[:i])
    folder = shutil.copytree(baked, tmp_path / "ends")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [98, end]}))
    rehash(folder)
    assert run(["export", "onnx", str(folder), "--force"]) == 0
    assert by_genai(folder, PROMPT) == [full[: full.index(end)]]


def gemma_tokenizer(folder: Path) -> Any:
    """A small tokenizer of the class, and with the parts, that Gemma's own has."""
    from transformers import GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    letters = list("abcdefghijklmnopqrstuvwxyzWAB0123456789\n\u2581.,:?")
    merges = [("\u2581", "a"), ("t", "h"), ("th", "e"), ("\u2581", "the"), ("i", "n")]
    tokens = [*special, *letters, *("".join(pair) for pair in merges)]
    tokenizer = GemmaTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        extra_special_tokens=special[4:],
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_genai_reads_tokenizers_of_gemmas_kind(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["gemma2"] / "baked", tmp_path / "baked")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    ours = gemma_tokenizer(folder)
    theirs = og.Tokenizer(og.Model(str(folder)))
    messages = [{"role": "user", "content": "What is in the A?"}]
    chat = ours.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert theirs.apply_chat_template(json.dumps(messages), add_generation_prompt=True) == chat
    for text in ("the thin lathe, a bath: 42.", "What is A?\nB. in the", chat):
        ids = ours(text, add_special_tokens=False)["input_ids"]
        assert theirs.encode(text).tolist() == ids
        assert theirs.decode(ids) == ours.decode(ids, skip_special_tokens=True)
    assert (theirs.bos_token_id, list(theirs.eos_token_ids), theirs.pad_token_id) == (2, [1], 0)


def test_genai_reads_the_miniatures_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    """Every shipped text, and what is not in its vocabulary, as transformers does."""
    folder = shutil.copytree(folders["gemma2"] / "baked", tmp_path / "baked")
    for path in (MINIATURE / "model").glob("*token*"):
        shutil.copy(path, folder)
    ours = AutoTokenizer.from_pretrained(MINIATURE / "model")
    theirs = og.Tokenizer(og.Model(str(folder)))
    texts = [
        "x\r\ny\t z",
        " a  b ",
        "caf\u00e9 \u4f60\u597d \U0001f600 e\u0301",
        "(A) 12,3\u2014\u00bd's",
        "",
    ]
    for path in MINIATURE.rglob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        texts += [text for row in rows for text in row.values() if isinstance(text, str)]
        texts += ["\n".join(row["choices"]) for row in rows if "choices" in row]
    assert len(texts) > 3000
    for text in texts:
        ids = ours(text, add_special_tokens=False)["input_ids"]
        assert theirs.encode(text).tolist() == ids, text
        assert theirs.decode(ids) == ours.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids) == text
    assert (theirs.bos_token_id, theirs.pad_token_id) == (2, 0)


CONFIG = SimpleNamespace(
    model_type="clamped_gemma2",
    bos_token_id=2,
    eos_token_id=1,
    pad_token_id=None,
    max_position_embeddings=64,
    vocab_size=99,
    head_dim=8,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=4,
)


def test_what_is_not_stated_is_left_out_or_transformers_default(tmp_path: Path) -> None:
    found = genai_config(CONFIG, tmp_path, "model.onnx")
    assert found["model"]["type"] == "gemma2" and found["model"]["eos_token_id"] == 1
    assert "pad_token_id" not in found["model"]
    stated = {"eos_token_id": [1, 5], "bos_token_id": None, "temperature": None, "top_k": 64}
    (tmp_path / "generation_config.json").write_text(json.dumps(stated | {"do_sample": True}))
    found = genai_config(CONFIG, tmp_path, "model.onnx")
    assert found["model"]["eos_token_id"] == [1, 5] and found["model"]["bos_token_id"] == 2
    search = found["search"]
    assert (search["do_sample"], search["temperature"], search["top_k"]) == (True, 1.0, 64)


@pytest.mark.parametrize("text", ["{", "[1]", "\x80"])
def test_a_generation_config_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FolderError, match=r"generation_config\.json: .* again"):
        genai_config(CONFIG, tmp_path, "model.onnx")


@pytest.mark.parametrize(
    ("field", "match"),
    [
        ({"do_sample": "no"}, "do_sample is 'no'; expected true or false"),
        ({"do_sample": 0}, "do_sample is 0; expected true or false"),
        ({"temperature": "hot"}, "temperature is 'hot'; expected a number"),
        ({"top_k": 5.5}, "top_k is 5.5; expected a whole number"),
        ({"eos_token_id": ["1"]}, "expected a token's number or a list of them"),
    ],
)
def test_a_generation_config_of_other_types_is_refused(
    field: dict[str, Any], match: str, tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(field))
    with pytest.raises(FolderError, match=match):
        read_generation_config(tmp_path)
