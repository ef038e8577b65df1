"""A GGUF file as a stranger meets it: in llama.cpp, in a process that knows nothing of bakeout.

Started by path with `python -I`; needs numpy and xllamacpp. Arguments: the file, a request and the
answer to write. The request is an .npz with input_ids and attention_mask [n, seq], padded on the
left, places [m, 2] (row, column), token_ids [m, w], and texts and splits, bytes of JSON lists: some
texts, and the tokens that each is taken to be. The answer, an .npz, holds logprobs [m, w] float32
(nats), best [m] (the likeliest token of all), and alike [texts], whether a text is the same to
llama.cpp as its tokens are.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp

FEW, ALL = 1 << 13, 1 << 20
"""Likeliest tokens that are asked for first, and where a wanted one is not among them: telling all
of a large vocabulary takes seconds.
"""
MARGIN = 8
"""Tokens of context beside a prompt's."""


class Server:
    """llama.cpp's server within this process, on the CPU, with float32 keys and values.

    Args:
        file: a GGUF file.
        n_tokens: of the longest prompt.
        text: a token that is a piece of text.
    """

    def __init__(self, file: str, n_tokens: int, text: int) -> None:
        self._text = text
        wanted = xllamacpp.CommonParams()
        wanted.model.path = file
        wanted.n_ctx = n_tokens + MARGIN
        wanted.n_batch = wanted.n_ubatch = max(n_tokens + MARGIN, 64)
        wanted.n_parallel, wanted.n_gpu_layers, wanted.verbosity = 1, 0, -1
        wanted.warmup = wanted.cache_prompt = False
        wanted.cache_type_k = wanted.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        wanted.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        wanted.swa_full = True
        threads = len(os.sched_getaffinity(0))
        wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = threads
        wanted.hostnames = [str(Path("llama.sock").resolve())]  # it listens, though nobody calls
        self._server = xllamacpp.Server(wanted)

    def next(self, prompt: str | list[int], n: int) -> list[tuple[int, float]]:
        """The n likeliest tokens after a prompt, likeliest first: (token, log-probability)."""
        said = self._server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": 1,
                "n_probs": n,
                "logprobs": n,
                "temperature": 0.0,
                "cache_prompt": False,
                # What is taken has to be text, or nothing is told; probabilities are before that.
                "logit_bias": [[self._text, 1e6]],
                "post_sampling_probs": False,
            }
        )
        if "choices" not in said:
            raise ValueError(str(said)[:500])
        (place,) = said["choices"][0]["logprobs"]["content"]
        found = [(int(top["id"]), top["logprob"]) for top in place["top_logprobs"]]
        return [(token, math.nan if said is None else float(said)) for token, said in found]


def run(file: str, request: str, answer: str) -> None:
    """Answer a request."""
    with np.load(request) as asked:
        given: dict[str, Any] = dict(asked)
    ids, mask, wanted = given["input_ids"], given["attention_mask"], given["token_ids"]
    texts, splits = (json.loads(bytes(given[name])) for name in ("texts", "splits"))
    longest = max(ids.shape[1], *(len(text.encode()) for text in texts))
    server = Server(file, longest, splits[0][-1])
    logprobs = np.full(wanted.shape, np.nan, np.float32)
    best = np.zeros(len(wanted), np.int64)
    for i, (row, column) in enumerate(given["places"].tolist()):
        prompt = ids[row, : column + 1][mask[row, : column + 1] > 0].tolist()
        for n in (FEW, ALL) if wanted.shape[1] < FEW else (ALL,):
            found = server.next(prompt, n)
            if {token for token, _ in found}.issuperset(wanted[i].tolist()):
                break
        best[i] = found[0][0]
        said = np.full(1 + max(max(token for token, _ in found), wanted[i].max()), np.nan)
        said[[token for token, _ in found]] = [value for _, value in found]
        logprobs[i] = said[wanted[i]]
    alike = [
        server.next(text, 8) == server.next(tokens, 8)
        for text, tokens in zip(texts, splits, strict=True)
    ]
    np.savez(answer, logprobs=logprobs, best=best, alike=np.array(alike))


if __name__ == "__main__":
    try:
        run(*sys.argv[1:])
    except Exception as error:  # whatever it is, the other side says it in one line
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
