"""`make fuzz`: mutated files through every reader for FUZZ_SECONDS, from FUZZ_SEED on.

What a reader neither takes nor refuses in a line is written to runs/fuzz/READER/, and makes the
exit code 1: mend the reader, and keep a small case of it in tests/fuzz/corpus/READER/.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.fuzz.readers import READERS, good_files
from tests.fuzz.trying import fuzz

ROUND = 1.0
"""Seconds of one reader before it is the next one's turn."""


def main() -> int:
    """Fuzz; returns the exit code."""
    seconds = float(os.environ.get("FUZZ_SECONDS", "600"))
    seed = int(os.environ.get("FUZZ_SEED", str(int(time.time()))))
    only = sys.argv[1:] or list(READERS)
    tried: Counter[str] = Counter()
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = good_files(Path(folder))
        print(f"FUZZ_SEED={seed}, {seconds:g} s over {len(only)} readers", flush=True)
        end, turn = time.monotonic() + seconds, seed
        while time.monotonic() < end:
            turn += 1
            for name in only:
                for finding in fuzz(name, root, seed=turn, most=100_000, seconds=ROUND):
                    tried[name] += 1
                    if finding is None:
                        continue
                    key = f"{name}: {finding.what.partition(':')[0]} {finding.what[-60:]}"
                    if key not in found:
                        found[key] = finding.what
                        out = Path("runs/fuzz") / name
                        out.mkdir(parents=True, exist_ok=True)
                        case = out / hashlib.sha256(finding.data).hexdigest()[:16]
                        case.write_bytes(finding.data)
                        print(f"{case}: {finding.what}", flush=True)
    for name, n in sorted(tried.items()):
        print(f"{n:>9,}  {name}")
    print(f"{tried.total():>9,}  inputs, {len(found)} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
