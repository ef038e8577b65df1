"""Counting features on Ray: two workers against one, worked out for eight, and the driver's memory.

Speed: a random Gemma 2 on workers of one thread each, one and both of them in turn on the same
windows, after both have counted once. Worked out: every part that one worker counted is given to
the first of eight that is free, and this process takes in what they found, one part after another.
Memory: whole processes, whose workers find the same made-up figures in every part.

    python benchmarks/scale.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import os
import statistics as numbers
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tomli_w
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from transformers import Gemma2Config, Gemma2ForCausalLM

sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("OMP_NUM_THREADS", "1")

from bake.base import find_base
from bake.clamp import find_site
from bake.questions.corpora import OnDisk, Windows, pack
from bake.recipe import Recipe
from bake.sae.folding import sha256_of
from bake.scale.cluster import LOCAL, cluster
from bake.scale.counting import counted_on, encoded_on, start_workers
from bake.scale.crew import Crew, about_here
from bake.scale.parts import TOKENS_PER_FEATURE, Part, count_parts
from bake.search.cache import Unfinished, model_sha256
from bake.search.statistics import BINS, CONTEXTS

D_IN, D_SAE, LAYERS, HOOK, VOCAB, SEQ, N_WINDOWS = 256, 4096, 6, 3, 8192, 256, 768
SIMULATED_WORKERS, SIMULATED_TOKENS = 8, 100_000_000
MEMORY_TOKENS = (1_000_000, 100_000_000)
MEMORY_SAE, TOKENS_OF_TEXT = 1024, 1000


def recipe_in(folder: Path) -> Recipe:
    """A random model and an SAE of which about 1 in 100 features fires."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=D_IN,
        intermediate_size=4 * D_IN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    Gemma2ForCausalLM(config).save_pretrained(folder / "base")
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=False))
    sae.W_enc.data.normal_(std=D_IN**-0.5)
    sae.W_dec.data.normal_(std=D_IN**-0.5)
    sae.threshold.data.fill_(2.3)
    sae.save_model(folder / "sae")
    table = {"sae": {"path": "sae"}, "method": "zero", "features": "select"}
    table |= {"hook_point": f"blocks.{HOOK}.hook_resid_post"}
    select = {"forget": {"path": "a.jsonl"}, "retain": {"path": "b.jsonl"}}
    data = {"schema": 1, "base": {"model": "base"}, "clamp": [table], "select": select}
    (folder / "recipe.toml").write_text(tomli_w.dumps(data), encoding="utf-8")
    return Recipe.load(folder / "recipe.toml")


def cpu_seconds() -> dict[int, float]:
    """CPU time of this process and of each worker, by their numbers."""
    here = psutil.Process()
    workers = [of for of in here.children(recursive=True) if "FeatureWorker" in str(of.cmdline())]
    return {of.pid: sum(of.cpu_times()[:2]) for of in (here, *workers)}


def speed(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name, cluster(LOCAL) as crew:
        assert crew is not None
        folder = Path(name)
        recipe = recipe_in(folder)
        base = find_base(recipe)
        site = find_site(recipe.clamp[0], recipe, base)
        start_workers(crew, recipe, base, [site])
        which, model = {0: sha256_of(site.files)}, model_sha256(base)
        ids = np.random.default_rng(0).integers(5, VOCAB, (N_WINDOWS, SEQ)).astype(np.int32)
        ids[:, 0] = 2
        windows = Windows("random", ids, (0, 1, 2), N_WINDOWS)
        runs = itertools.count()

        def seconds(n_workers: int) -> tuple[float, float, list[float], Any]:
            """(seconds, the busiest process's of CPU, between parts, what was counted)."""
            before = cpu_seconds()
            kept = [crew._idle.pop() for _ in range(len(crew._idle) - n_workers)]
            ended = [time.perf_counter()]

            def count(parts: Any) -> Iterator[Part]:
                for part in counted_on(crew, which, model, parts):
                    ended.append(time.perf_counter())
                    yield part

            unfinished = Unfinished(folder / f"{next(runs)}" / "x.unfinished.safetensors")
            state = count_parts(count, windows, D_SAE, unfinished, lambda _: None)
            crew._idle.extend(kept)
            taken = time.perf_counter() - ended[0]
            busiest = max(after - before.get(pid, 0.0) for pid, after in cpu_seconds().items())
            parts = [after - before for before, after in itertools.pairwise(ended)]
            return taken, busiest, parts, state

        while len(crew._idle) < 2:  # both have started, and loaded what they need
            seconds(len(crew._idle) or 2)
        if crew.size != 2:
            sys.exit(f"{crew.size} workers; this benchmark compares one with two, on two cores")
        seconds(2)
        ratios, on_cpu, parts = [], [], []
        for number in range(rounds):
            taken = {n: seconds(n) for n in ((1, 2) if number % 2 else (2, 1))}
            one, two = taken[1], taken[2]
            assert all(torch.equal(one[-1][name], two[-1][name]) for name in one[-1])
            ratios.append(one[0] / two[0])
            on_cpu.append(one[1] / two[1])
            parts += one[2]
            print(
                f"round {number + 1}: {windows.n_tokens:,} tokens, one worker "
                f"{windows.n_tokens / one[0]:,.0f} tokens/s, two "
                f"{windows.n_tokens / two[0]:,.0f}, ratio {ratios[-1]:.2f}; by the CPU time of the "
                f"busiest process {on_cpu[-1]:.2f}; all that was counted is equal"
            )
        print(f"median ratio {numbers.median(ratios):.2f}, by CPU {numbers.median(on_cpu):.2f}")
    for d_sae in (16_384, 65_536):
        print(f"taking in a part at d_sae {d_sae:,}: {1e3 * taking_in(d_sae):.0f} ms")
    worked_out(parts, taking_in(D_SAE))


def made_up(d_sae: int) -> dict[str, np.ndarray]:
    """What a part may give."""
    return {
        "0.fired": np.ones(d_sae, np.int64),
        "0.total": np.ones(d_sae),
        "0.squares": np.ones(d_sae),
        "0.near": np.zeros(d_sae, np.int64),
        "0.histogram": np.ones((d_sae, BINS), np.int64),
        "0.top_values": np.ones((CONTEXTS, d_sae), np.float32),
        "0.top_places": np.zeros((CONTEXTS, d_sae), np.int64),
    }


def taking_in(d_sae: int, n_parts: int = 12) -> float:
    """Seconds that this process takes for a part: written, read, merged."""
    state = {name: torch.from_numpy(array) for name, array in made_up(d_sae).items()}
    windows = Windows("", np.full((n_parts * 4 * d_sae // 1024, 1024), 5, np.int32), (0,), 0)
    with tempfile.TemporaryDirectory() as name:
        unfinished = Unfinished(Path(name) / "x.unfinished.safetensors")

        def count(parts: Any) -> Iterator[Part]:
            for part, start in parts:
                yield start, start + len(part.ids), state

        begun = time.perf_counter()
        count_parts(count, windows, d_sae, unfinished, lambda _: None)
        return (time.perf_counter() - begun) / n_parts


def worked_out(parts: list[float], taking: float) -> None:
    """How near to as many times as fast some workers come, by one worker's times."""
    n_parts = SIMULATED_TOKENS // (TOKENS_PER_FEATURE * D_SAE)
    free, taken_in, alone = [0.0] * SIMULATED_WORKERS, 0.0, 0.0
    for seconds in itertools.islice(itertools.cycle(parts), n_parts):
        ended = heapq.heappop(free) + seconds
        heapq.heappush(free, ended)
        taken_in = max(taken_in, ended) + taking
        alone += seconds
    linear = alone / SIMULATED_WORKERS / max(taken_in, *free)
    print(
        f"worked out: {SIMULATED_TOKENS:,} tokens in {n_parts:,} parts of "
        f"{numbers.mean(parts):.2f} s, {1e3 * taking:.0f} ms each to take in: {SIMULATED_WORKERS} "
        f"workers are {linear:.3f} of linear"
    )


class Simulated:
    """A worker that finds the same in everything."""

    def __init__(self) -> None:
        self._state = made_up(MEMORY_SAE)

    def about(self) -> dict[str, str]:
        """As every worker."""
        return about_here()

    def encode(self, texts: list[str]) -> tuple[np.ndarray, list[int]]:
        """Tokens of texts."""
        lengths = [TOKENS_OF_TEXT] * len(texts)
        return np.full(sum(lengths), 5, np.int32), lengths

    def count(self, _which: Any, _model: str, windows: Windows, start: int) -> Any:
        """What comes of a part."""
        return start, start + len(windows.ids), self._state


def simulated(n_tokens: int) -> None:
    """A driver's whole work; prints its memory."""
    with tempfile.TemporaryDirectory() as name, cluster(LOCAL) as crew:
        assert isinstance(crew, Crew)
        crew.start(Simulated, memory=1 << 29)
        texts = itertools.repeat("", n_tokens // TOKENS_OF_TEXT)
        rows = pack(encoded_on(crew, texts), bos=2, eos=1, seq_len=1024, n_seqs=n_tokens)
        windows = Windows("simulated", OnDisk(rows, Path(name)), (1, 2), 0)
        windows.sha256  # noqa: B018
        unfinished = Unfinished(Path(name) / "x" / "x.unfinished.safetensors")

        own = 0

        def count(parts: Any) -> Iterator[Part]:
            nonlocal own
            for part in counted_on(crew, {0: ""}, "", parts):
                about = psutil.Process().memory_info()
                own = max(own, about.rss - about.shared)
                yield part

        state = count_parts(count, windows, MEMORY_SAE, unfinished, lambda _: None)
        status = Path("/proc/self/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
        print(windows.n_tokens, int(state["0.fired"][0]), peak, own)


def memory() -> None:
    owns = []
    for n_tokens in MEMORY_TOKENS:
        command = [sys.executable, __file__, "--simulated", str(n_tokens)]
        begun = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        counted, n_parts, peak, own = map(int, done.stdout.split())
        owns.append(own / 1e6)
        print(
            f"{counted:,} tokens, {n_parts:,} parts: the driver's own memory {owns[-1]:.0f} MB at "
            f"most, {peak / 1e6:.0f} with files and Ray's store, which all processes share; "
            f"{time.perf_counter() - begun:.0f} s"
        )
    print(f"own memory, largest over smallest: {owns[-1] / owns[0]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="0 leaves out speed")
    parser.add_argument("--simulated", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.simulated:
        simulated(options.simulated)
        return
    if options.rounds:
        speed(options.rounds)
    memory()


if __name__ == "__main__":
    main()
