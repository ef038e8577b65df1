"""llama.cpp, over what `bakeout export gguf` writes, on the CPU."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tests.clients.cells import Client, NotHereError, Prompt, Said, Way

TYPES = ("f32", "bf16", "f16", "q8_0")
"""`bakeout export gguf --outtype`; the folder `gguf` has a file of each, by that name."""
SAID = "llama-quantize.txt"
"""Beside them: the command that `export gguf` gives for 4 bits."""
MOST = 1 << 16
"""Likeliest tokens that are told after each: all of a real vocabulary take seconds. The others are
taken to be as likely as the last of them, which alone is 2.7e-3 nats a token for a Gemma 3 270M."""
QUANTIZED = {"q4_k_m": True, "q4_k_m, without options": False}
"""Ways to have the file in f32 quantized, and whether that command's options are taken."""


def say(way: Way, folders: Mapping[str, Path], prompts: Sequence[Prompt]) -> Sequence[Said]:
    """See `Client.say`."""
    vocab = json.loads((folders["base"] / "config.json").read_text())["vocab_size"]
    if way.dtype not in QUANTIZED:
        return _asked(folders["gguf"] / f"{way.dtype}.gguf", prompts, vocab)
    with TemporaryDirectory() as scratch:
        made = Path(scratch) / "made.gguf"
        _quantize(folders["gguf"], made, told=QUANTIZED[way.dtype])
        return _asked(made, prompts, vocab)


def _quantize(gguf: Path, made: Path, *, told: bool) -> None:
    if which("llama-quantize") is None:
        raise NotHereError("llama-quantize is not on PATH")
    if not (gguf / SAID).is_file():
        raise NotHereError("there is no f32.gguf")
    program, *options, source, _, kind = shlex.split((gguf / SAID).read_text())
    call = [program, *(options if told else []), source, str(made), kind]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "failed" in line]
        raise RuntimeError((said or ["?"])[0])


def _asked(file: Path, prompts: Sequence[Prompt], vocab: int) -> Sequence[Said]:
    """[seq, vocab] log-probabilities of each prompt, NaN where none are wanted."""
    import xllamacpp

    if not file.is_file():
        raise NotHereError(f"there is no {file.name}")
    wanted = xllamacpp.CommonParams()
    wanted.model.path = str(file)
    wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = max(64, *(len(ids) + 8 for ids in prompts))
    wanted.n_parallel, wanted.n_gpu_layers, wanted.verbosity = 1, 0, -1
    wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = 1
    with TemporaryDirectory() as scratch:
        wanted.hostnames = [f"{scratch}/llama.sock"]  # it listens, though nobody calls
        server = xllamacpp.Server(wanted)
        text = prompts[0][-1]
        said = [np.full((len(ids), vocab), np.nan, np.float32) for ids in prompts]
        for ids, rows in zip(prompts, said, strict=True):
            for place in ids.places:
                tokens, values = _next(server, ids[: place + 1], text)
                rows[place] = min(values)
                rows[place, tokens] = values
        return said


def _next(server: Any, ids: list[int], text: int) -> tuple[list[int], list[float]]:
    """The likeliest tokens after a prompt, and their log-probabilities."""
    said = server.handle_completions(
        {
            "prompt": ids,
            "n_predict": 1,
            "n_probs": MOST,
            "logprobs": MOST,
            "temperature": 0.0,
            "cache_prompt": True,
            # What is taken has to be text, or nothing is told; probabilities are before that.
            "logit_bias": [[text, 1e6]],
            "post_sampling_probs": False,
        }
    )
    if "choices" not in said:
        raise RuntimeError(str(said)[:200])
    (place,) = said["choices"][0]["logprobs"]["content"]
    told = [(top["id"], top["logprob"]) for top in place["top_logprobs"]]
    return [token for token, _ in told], [np.nan if of is None else of for _, of in told]


CLIENT = Client(
    "llama.cpp",
    ("xllamacpp",),
    tuple(Way("gguf", of) for of in (*TYPES, *QUANTIZED)),
    say,
    note="q4_k_m by `llama-quantize` of the file in f32, with the options that `export gguf` says; "
    "of more than 65,536 tokens only the likeliest are told, which alone is 2.7e-3 for the Gemma 3",
)
