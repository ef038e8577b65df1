"""How much memory there is, and how much of what was freed a process keeps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEAP_KEPT = 8 << 20
"""Most bytes that the C library's heap keeps at its end, and the least that lie outside of it."""
HEAPS = 2
"""How many heaps a process's threads share."""
LARGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
"""Makes torch ask the system for large pages where a tensor is large: logits are made, looked at
and given back by the gigabyte, and a small page at a time that is a tenth of all the work."""


def available_memory(device: Any = "cpu") -> int:
    """Bytes that this process may still take: the system's, or its control group's if less; or a
    GPU's that torch has, with what torch keeps of it.
    """
    if str(device).startswith("cuda"):
        from torch import cuda

        if cuda.is_available():
            kept = cuda.memory_reserved(device) - cuda.memory_allocated(device)
            return int(cuda.mem_get_info(device)[0] + kept)
    page = os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_AVPHYS_PAGES") * page
    free = max([free, *_numbers(Path("/proc/meminfo"), "MemAvailable:", 1024)])
    group = Path("/sys/fs/cgroup")
    limit, used = _numbers(group / "memory.max"), _numbers(group / "memory.current")
    return min([free, *(most - now for most, now in zip(limit, used, strict=False))])


def _numbers(path: Path, label: str = "", unit: int = 1) -> Iterator[int]:
    """The first number after a label in one of the system's own text files, if it is there."""
    try:
        words = path.read_text().split(label, 1)[-1].split() if label else path.read_text().split()
    except OSError:
        return
    if words and words[0].isdigit():
        yield int(words[0]) * unit
