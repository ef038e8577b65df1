"""Processes that read what strangers wrote: without secrets, without a network where the system
can, with limits, and for a time only.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from bake.files.memory import HEAP_KEPT, HEAPS, LARGE_PAGES
from bake.strangers import start_confined

SECONDS = 3600.0
"""How long one request may take: a large model's loading, or a batch on a slow processor."""
_PROBE_SECONDS = 10
_KEPT = re.compile(
    r"PATH|LANG|LC_\w+|TZ|LD_LIBRARY_PATH|(OMP|GOMP|KMP|MKL|ATEN|DNNL|ONEDNN|OPENBLAS|CUDA)_\w+"
    r"|NVIDIA_(VISIBLE_DEVICES|DRIVER_CAPABILITIES|TF32_OVERRIDE)|PYTORCH_(CUDA_)?ALLOC_CONF"
)
"""Variables that such a process gets: how numbers are computed, on what, in which language."""
_KILLED = (-9, 137)
"""How a process ends that the system kills for want of memory, by itself or behind a wall."""
_NO_MEMORY = re.compile(
    r"MemoryError|OutOfMemory|bad_alloc|(allocate|not enough|out of) memory", re.IGNORECASE
)
"""What Python, torch, C++ and the system say where there is none."""
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL|AUTH")


def environment(scratch: Path) -> dict[str, str]:
    """All variables of a confined process. It finds no token, and nothing of the user's home.

    Args:
        scratch: an empty folder, its home.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if _KEPT.fullmatch(name) and not _SECRET.search(name)
    }
    folders = dict.fromkeys(("HOME", "TMPDIR", "HF_HOME", "HF_MODULES_CACHE"), str(scratch))
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"), "1")
    return (
        kept
        | folders
        | offline
        | {"USE_HUB_KERNELS": "NO", "TOKENIZERS_PARALLELISM": "false"}
        | {"MALLOC_ARENA_MAX": str(HEAPS)}
        | LARGE_PAGES
        | dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(HEAP_KEPT))
    )


def command(program: str, *arguments: str, scratch: Path) -> list[str]:
    """The command line of a Python program that is confined.

    Args:
        program: its path.
        arguments: its own.
        scratch: the one folder that it may write to, where writing elsewhere can be prevented.
    """
    start = [sys.executable, "-I", start_confined.__file__, program, *arguments]
    return [*_walls(_wall(), scratch), *start]


def start(program: str, *arguments: str, scratch: Path, **pipes: Any) -> subprocess.Popen[bytes]:
    """Start such a program in its scratch folder, without the user's terminal."""
    return subprocess.Popen(
        command(program, *arguments, scratch=scratch),
        env=environment(scratch),
        cwd=scratch,
        start_new_session=True,
        **pipes,
    )


def run(program: str, *arguments: str, scratch: Path) -> str | None:
    """Run such a program to its end; returns its last line where it fails."""
    stderr = scratch / "stderr"
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    with stderr.open("wb") as file:
        process = start(program, *arguments, scratch=scratch, stderr=file, **quiet)
        try:
            with time_limit(process, SECONDS) as late:
                process.wait()
        finally:
            process.kill()
            process.wait()
    if late.is_set():
        return f"it took over {SECONDS:.0f} seconds"
    return last_words(process, stderr) if process.returncode else None


@contextmanager
def time_limit(process: subprocess.Popen[bytes], seconds: float) -> Iterator[threading.Event]:
    """Kill a process that takes longer than this within the block; the event says that it did."""
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()


def last_words(process: subprocess.Popen[bytes], stderr: Path) -> str:
    """How a process ended, and the last line that it said."""
    code = process.wait()
    lines = stderr.read_text(errors="replace").splitlines()
    last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
    return f"ended with exit code {code} ({last.strip()})"


def ran_out_of_memory(said: str, exit_code: int | None = None) -> bool:
    """Whether a process had too little memory, by what it said last and how it ended."""
    return exit_code in _KILLED or _NO_MEMORY.search(said) is not None


def _walls(tool: str | None, scratch: Path) -> Sequence[str]:
    """What stands before a command so that it has no network. Devices stay as they are."""
    if tool is None:
        return ()
    if Path(tool).name == "unshare":
        return (tool, "--user", "--map-root-user", "--net", "--")
    place = str(scratch.resolve())
    view = ("--ro-bind", "/", "/", "--dev-bind", "/dev", "/dev", "--proc", "/proc")
    apart = ("--unshare-net", "--unshare-pid", "--die-with-parent")  # other processes' variables
    return (tool, *view, "--bind", place, place, *apart, "--chdir", place, "--")


@cache
def _wall() -> str | None:
    """bubblewrap, else unshare, else nothing: the first that works here."""
    for name in ("bwrap", "unshare"):
        tool = shutil.which(name)
        if tool is not None and _works(tool):
            return tool
    return None


def _works(tool: str) -> bool:
    scratch = Path("/tmp" if Path("/tmp").is_dir() else "/")
    try:
        done = subprocess.run(
            [*_walls(tool, scratch), sys.executable, "-I", "-S", "-c", ""],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0
