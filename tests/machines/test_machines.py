"""Other machines on this one: the miniature's folders pass whatever kernels and threads are used.

The instruction set and the thread count decide in which order sums are formed, and with it the last
digits of every logit. A setting whose instructions this processor lacks is skipped: torch would
execute them all the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from bake.rounding import BAR
from bakeout.verbs.demo import MINIATURE

SETTINGS: dict[str, dict[str, str]] = {
    "as it is": {},
    "no vectors": {"ATEN_CPU_CAPABILITY": "default"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "AVX-512": {"ATEN_CPU_CAPABILITY": "avx512", "MKL_CBWR": "AVX512"},
    "compatible": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
        "DNNL_MAX_CPU_ISA": "SSE41",
        "OMP_NUM_THREADS": "1",
    },
    "AVX2, 1 thread": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_CBWR": "AVX2",
        "DNNL_MAX_CPU_ISA": "AVX2",
        "OMP_NUM_THREADS": "1",
    },
    "2 threads": {"OMP_NUM_THREADS": "2", "MKL_DYNAMIC": "FALSE"},
}
NEEDS = {
    "avx2": ("avx2", "fma3"),
    "avx512": ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"),
}
"""What a processor must have for a value of ATEN_CPU_CAPABILITY."""
CASES = [
    *(("checkpoint", setting) for setting in ("AVX2", "AVX-512", "compatible")),
    *(("compiled", setting) for setting in ("no vectors", "AVX2, 1 thread")),
    ("compiled-elsewhere", "2 threads"),
    ("adapter", "compatible"),
]
"""`make demo` has all of them as it is."""
RECIPE = MINIATURE / "recipe.toml"
TYPICAL = 2.0
"""Most roundings on average: ONNX Runtime, whose kernels are others than torch's, was seen at 1.6;
the bar is 3."""


def bakeout(setting: str, *arguments: str, cache: Path) -> None:
    """Run the command line under a setting."""
    asked, has = SETTINGS[setting].get("ATEN_CPU_CAPABILITY", ""), torch.cpu.get_capabilities()
    if lacking := [need for need in NEEDS.get(asked, ()) if not has.get(need)]:
        pytest.skip(f"this processor has no {', '.join(lacking)}")
    environment = {**os.environ, "BAKEOUT_CACHE": str(cache), **SETTINGS[setting]}
    command = [sys.executable, "-m", "bakeout", *arguments]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The miniature's folders, baked and exported on two machines: made once for all workers."""
    root = tmp_path_factory.getbasetemp()
    root = (root if worker_id == "master" else root.parent) / "machines"
    with FileLock(f"{root}.lock"):
        if not (root / "done").exists():
            root.mkdir(exist_ok=True)
            for setting, name in (("as it is", "checkpoint"), ("compatible", "elsewhere")):
                out = str(root / name)
                bakeout(setting, "bake", str(RECIPE), "--out", out, "--witnesses", cache=root)
                bakeout(setting, "export", "onnx", out, cache=root)
            out = str(root / "compiled-elsewhere")  # its own trial holds there, too
            bakeout("compatible", "export", "compiled", str(root / name), "--out", out, cache=root)
            checkpoint = str(root / "checkpoint")
            for carrier in ("compiled", "adapter"):
                out = str(root / carrier)
                bakeout("as it is", "export", carrier, checkpoint, "--out", out, cache=root)
            (root / "done").touch()
    return root


def verified(work: Path, setting: str, folder: str, out: Path, *kinds: str) -> dict[str, Any]:
    """The report of a verification under a setting."""
    report = out / "report.json"
    more = ["--recipe", str(RECIPE)] if "parity" in kinds else []
    asked = ["--only", ",".join(kinds), "--json", str(report), *more]
    bakeout(setting, "verify", str(work / folder), *asked, cache=out)
    found: dict[str, Any] = json.loads(report.read_text())
    assert found["verdict"] == "pass" and found["failures"] == []
    return found


@pytest.mark.long
@pytest.mark.parametrize(("folder", "setting"), CASES)
def test_sound_folders_pass_far_from_the_bar(
    work: Path, tmp_path: Path, folder: str, setting: str
) -> None:
    kinds = ("integrity", "parity") if folder == "adapter" else ("integrity", "parity", "witnesses")
    report = verified(work, setting, folder, tmp_path, *kinds)
    engines = ("onnx", "checkpoint") if folder == "checkpoint" else (folder.split("-")[0],)
    for name in engines:
        rounding = report["engines"][name]["parity"]["rounding"]
        assert rounding["worst"] <= BAR / 2, (name, rounding)
        assert rounding["mean_kl"] <= TYPICAL**2 * rounding["sensitivity_kl"], name
        assert rounding["tokens_fired"] > 100 and rounding["edge_tokens"] == 0
        assert report["engines"][name]["parity"]["answer_flips"] == 0


@pytest.mark.long
@pytest.mark.parametrize("setting", ["as it is", "no vectors", "AVX2, 1 thread", "AVX-512"])
def test_witnesses_of_another_machine_hold(work: Path, tmp_path: Path, setting: str) -> None:
    report = verified(work, setting, "elsewhere", tmp_path, "integrity", "witnesses")
    for name in ("checkpoint", "onnx"):
        seen = report["engines"][name]["witnesses"]
        assert seen["max_abs_logit"] <= BAR / 2 * seen["sensitivity"], (name, seen)
