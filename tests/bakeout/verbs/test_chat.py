"""`bakeout chat`: prompts from a pipe, answers of both engines, base and clamped, errors."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from bakeout.cli import run
from bakeout.verbs import chat
from bakeout.verbs.streaming import Language, Manner, TorchSpeaker
from tests.folders import rehash
from tests.worlds import talkative, tiny_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PROMPTS = ["What is in the A?", "zeta bath"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `baked` with a shared graph, and `int4` with nothing but a rounded one."""
    root = tmp_path_factory.mktemp("chat")
    recipe = talkative(root)
    tiny_tokenizer(root / "base")
    baked = str(root / "baked")
    assert run(["bake", str(recipe), "--out", baked]) == 0
    assert run(["export", "onnx", baked]) == 0
    assert run(["export", "onnx", baked, "--precision", "int4", "--out", str(root / "int4")]) == 0
    return root


Chat = Callable[..., tuple[int, str, str]]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    """Pipes lines into `bakeout chat`; gives exit code, stdout, stderr."""

    def talk(folder: Path, *options: str, lines: list[str] = PROMPTS) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        code = run(["chat", str(folder), "--max-new-tokens", "20", *options])
        return code, *capsys.readouterr()

    return talk


def expected(folder: Path, prompt: str) -> str:
    """What transformers generates: 20 greedy tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=[1, tokenizer.convert_tokens_to_ids("<end_of_turn>")],
    )
    text: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def test_both_engines_answer_each_piped_prompt_as_transformers_does(root: Path, talk: Chat) -> None:
    answers = [expected(root / "baked", prompt) for prompt in PROMPTS]
    assert len(set(answers)) == 2 and all(len(set(text)) > 5 for text in answers)
    shown = "".join(f"{text}\n\n" for text in answers)
    for engine in ("torch", "onnx"):
        found = talk(root / "baked", "--engine", engine, lines=[PROMPTS[0], "", PROMPTS[1]])
        assert found == (0, shown, "")


def test_quit_and_nothing_at_all(root: Path, talk: Chat) -> None:
    first = f"{expected(root / 'baked', PROMPTS[0])}\n\n"
    assert talk(root / "baked", lines=[PROMPTS[0], " /quit ", PROMPTS[1]]) == (0, first, "")
    assert talk(root / "baked", lines=[]) == (0, "", "")


def test_base_and_clamped_beside_each_other(root: Path, talk: Chat) -> None:
    base, clamped = (expected(root / name, PROMPTS[0]) for name in ("base", "baked"))
    assert base != clamped
    shown = f"[base: base]\n{base}\n\n[clamped: baked]\n{clamped}\n\n"
    for engine in ("torch", "onnx"):
        options = ("--engine", engine, "--beside", str(root / "base"))
        assert talk(root / "baked", *options, lines=PROMPTS[:1]) == (0, shown, "")


def test_draws_are_those_of_every_run_and_engine(root: Path, talk: Chat) -> None:
    greedy = talk(root / "baked")
    assert talk(root / "baked", "--temperature", "0") == greedy
    code, shown, _ = drawn = talk(root / "baked", "--temperature", "1.5")
    assert code == 0 and drawn != greedy
    assert talk(root / "baked", "--temperature", "1.5", "--engine", "onnx") == drawn
    first = talk(root / "baked", "--temperature", "1.5", lines=PROMPTS[:1])[1]
    twice = talk(root / "baked", "--temperature", "1.5", lines=[PROMPTS[0]] * 2)[1]
    assert shown.startswith(first) and twice.startswith(first) and twice != first * 2


def test_a_folder_of_a_rounded_graph_alone(root: Path, talk: Chat) -> None:
    code, shown, _ = talk(root / "int4", "--engine", "onnx")
    assert code == 0 and len(shown) > 20
    code, shown, error = talk(root / "int4")
    assert (code, shown) == (2, "")
    assert error == f"error: {root / 'int4'}: holds no weights for torch; pass --engine onnx\n"


# --------------------------------------------------------------------------- prompts and answers


def test_prompts_stand_in_the_chat_template_where_there_is_one(root: Path, tmp_path: Path) -> None:
    language = Language(root / "baked")
    assert language.prompt_ids("ab c") == language.tokenizer("ab c").input_ids
    copy = shutil.copytree(root / "baked", tmp_path / "baked")
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    text = "<bos><start_of_turn>user\nab c<end_of_turn>\n<start_of_turn>model\n"
    ids = language.tokenizer(text, add_special_tokens=False).input_ids
    assert Language(copy).prompt_ids("ab c") == ids and ids.count(2) == 1


@pytest.mark.parametrize(
    ("generation", "ends"),
    [({"eos_token_id": 9}, {9, 5}), ({"eos_token_id": [9, 8]}, {9, 8, 5}), (None, {1, 5})],
)
def test_where_answers_end(root: Path, tmp_path: Path, generation: Any, ends: set[int]) -> None:
    copy = shutil.copytree(root / "baked", tmp_path / "baked")
    (copy / "generation_config.json").unlink()
    if generation is not None:
        (copy / "generation_config.json").write_text(json.dumps(generation))
    language = Language(copy)
    assert language.ends == ends and language.context == 256
    letter = language.tokenizer.get_vocab()["x"]
    for end in ends:
        assert "".join(language.pieces(iter([letter, letter, end, letter]))) == "xx"


def test_text_grows_by_whole_characters_and_holds_no_escapes(root: Path) -> None:
    parts = ["A", "\x1b[31m", "\ufffd", "é", "\u202e\tz\r\n", "\ufffd"]
    language = Language(root / "baked")

    def decode(ids: list[int], **_: object) -> str:
        text = "".join(parts[i] for i in ids)
        return text.replace("\ufffdé", "é")

    language.tokenizer = SimpleNamespace(decode=decode)
    language.ends = frozenset()
    found = list(language.pieces(iter(range(6))))
    assert found == ["A", "\ufffd[31m", "é", "\ufffd    z\n", "\ufffd"]


def test_ctrl_c_stops_an_answer_and_nothing_else(
    root: Path, talk: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = TorchSpeaker.tokens

    def interrupted(self: TorchSpeaker, ids: list[int], how: Manner, seed: int) -> Iterator[int]:
        for n, token in enumerate(tokens(self, ids, how, seed)):
            if seed == 0 and n == 3:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(TorchSpeaker, "tokens", interrupted)
    first, second = (expected(root / "baked", prompt) for prompt in PROMPTS)
    code, shown, _ = talk(root / "baked")
    assert code == 0 and shown.endswith(f"(stopped)\n\n{second}\n\n")
    assert first.startswith(shown.split("\n(stopped)")[0]) and first not in shown


def test_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        chat, "console", lambda: Console(file=screen, force_terminal=True, width=60)
    )
    chat.show_columns({"base: [b]": iter(["one ", "two"]), "clamped": iter(["no", "", "[red]"])})
    last = screen.getvalue().rpartition("base: [b]")[2].splitlines()
    assert "clamped" in last[0]
    assert last[1].split() == ["one", "two", "no[red]"]


def test_a_prompt_that_is_too_long_or_no_text(
    root: Path, talk: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = talk(root / "baked", lines=["x" * 300])
    assert code == 2 and "the prompt has 301 tokens; the model reads 256" in error
    # An answer has the room that the prompt leaves.
    assert talk(root / "baked", lines=["x" * 250])[0] == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), "utf-8"))
    assert run(["chat", str(root / "baked")]) == 2
    assert "error: a prompt is not UTF-8" in capsys.readouterr().err


# --------------------------------------------------------------------------- what cannot be opened


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["base"], "expected sae_clamp.sites"),
        (["absent"], "expected a clamped checkpoint"),
        (["baked", "--engine", "jax"], "--engine jax: expected torch or onnx"),
        (["baked", "--device", "tpu"], "--device tpu: expected cpu, or cuda"),
        (["baked", "--device", "cuda:77"], "pass --device cpu, or install torch for CUDA"),
        (["baked", "--temperature", "-1"], "--temperature -1.0: expected 0"),
        (["baked", "--temperature", "nan"], "--temperature nan"),
        (["baked", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["baked", "--beside", "no/such/folder"], "no such folder; expected one, or a hub id"),
        (["baked", "--beside", "sae"], "--beside sae: its tokenizer cannot be loaded"),
        (["baked", "--beside", "int4"], "--beside int4: transformers cannot load it"),
        (["baked", "--beside", "other"], "--beside other: its tokenizer has"),
    ],
)
def test_bad_input_is_one_line(
    root: Path, talk: Chat, monkeypatch: pytest.MonkeyPatch, options: list[str], match: str
) -> None:
    monkeypatch.chdir(root)
    if "other" in options and not (root / "other").exists():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(root / "base")
        tokenizer.add_tokens(["more"])
        tokenizer.save_pretrained(root / "other")
    code, shown, error = talk(Path(options[0]), *options[1:])
    assert (code, shown) == (2, "")
    assert error.startswith("error: ") and error.count("\n") == 1 and match in error


def test_onnx_without_a_graph_or_a_provider(
    root: Path, talk: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime as ort

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    code, _, error = talk(root / "baked", "--engine", "onnx", "--device", "cuda")
    assert code == 2 and "pip install 'bakeout[gpu]'" in error and error.count("\n") == 1
    copy = shutil.copytree(root / "baked", tmp_path / "baked")
    (copy / "model.onnx").unlink()
    code, _, error = talk(copy, "--engine", "onnx")
    assert code == 2 and "write it with `bakeout export onnx" in error and error.count("\n") == 1


def test_damaged_weights_and_configs(root: Path, talk: Chat, tmp_path: Path) -> None:
    copy = shutil.copytree(root / "baked", tmp_path / "baked")
    (copy / "generation_config.json").write_text("{")
    code, _, error = talk(copy)
    assert code == 2 and "generation_config.json: is not the file that the manifest" in error
    rehash(copy)
    code, _, error = talk(copy)
    assert code == 2 and "generation_config.json: cannot be read" in error
    shard = copy / "model-sae-clamp.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    rehash(copy)
    code, _, error = talk(copy)
    assert code == 2 and "transformers cannot load it" in error and error.count("\n") == 1
    base = shutil.copytree(root / "base", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    code, _, error = talk(root / "baked", "--beside", str(base))
    assert code == 2 and "has no model.norm.weight" in error


def test_a_terminated_chat_ends(root: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "bakeout", "chat", str(root / "baked"), "--max-new-tokens", "5"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{PROMPTS[0]}\n")
    process.stdin.flush()
    assert process.stdout.readline().strip()
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.startswith("error: interrupted")
