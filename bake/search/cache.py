"""Feature statistics on disk: Parquet and safetensors, found again by what they were made from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from torch import Tensor

from bake.base import BaseModel
from bake.errors import OutputError
from bake.new_folder import whole_file
from bake.reading.capped import read_json
from bake.search.statistics import FeatureStatistics

SCHEMA = 1
TABLE, CONTEXTS_FILE, ABOUT = "statistics.parquet", "contexts.safetensors", "about.json"
_COLUMNS = ("fired", "total", "squares", "maximum", "near")
SAVING_SHARE = 0.05
"""Most of the time that saving the state of an unfinished pass may take."""


def cache_folder() -> Path:
    """Where statistics are kept: $BAKEOUT_CACHE, else bakeout in the user's cache folder.

    Raises:
        OutputError: the user has no home, as some have in a container.
    """
    if given := os.environ.get("BAKEOUT_CACHE"):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bakeout"
    except RuntimeError as error:
        raise OutputError(
            "there is no home folder, and so no place for a cache; expected HOME, or BAKEOUT_CACHE "
            "with a folder that may be written"
        ) from error


def model_sha256(base: BaseModel) -> str:
    """What a base model computes: its config, its commit or its weights, byte for byte."""
    digest = hashlib.sha256(json.dumps(base.config, sort_keys=True).encode())
    if base.revision is not None:
        digest.update(f"{base.name} {base.revision}".encode())
        return digest.hexdigest()
    for shard in base.shards:
        with (base.folder / shard).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@dataclass(frozen=True)
class Entry:
    """One corpus under one model and one SAE: where its statistics are, or will be."""

    folder: Path
    """The cache."""
    about: dict[str, Any]
    """What the statistics are made from; equal contents give an equal key."""

    @property
    def path(self) -> Path:
        """Folder of the finished statistics."""
        text = json.dumps(self.about, sort_keys=True)
        return self.folder / "statistics" / hashlib.sha256(text.encode()).hexdigest()[:32]

    def read(self) -> FeatureStatistics | None:
        """The finished statistics; None where there are none, or where they are damaged."""
        try:
            if read_json(self.path / ABOUT) != self.about:
                return None
            table = parquet.read_table(self.path / TABLE)
            arrays = load_arrays(self.path / CONTEXTS_FILE)
            return FeatureStatistics(
                n_tokens=int(arrays["n_tokens"][0]),
                **{name: table[name].to_numpy() for name in _COLUMNS},
                **{name: arrays[name] for name in ("histogram", "top_values", "top_places")},
            )
        except (OSError, ValueError, KeyError, pa.ArrowException, SafetensorError):
            return None

    def write(self, statistics: FeatureStatistics) -> None:
        """Keep finished statistics; they appear whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.path.parent) as name:
            new = Path(name) / "new"
            new.mkdir()
            columns = {column: getattr(statistics, column) for column in _COLUMNS}
            columns |= {
                "share": statistics.share,
                "mean": statistics.mean,
                "mean_square": statistics.mean_square,
            }
            numbers = {"feature": np.arange(len(statistics.fired)), **columns}
            parquet.write_table(pa.table(numbers), new / TABLE)
            contexts = {
                "n_tokens": np.array([statistics.n_tokens]),
                "histogram": statistics.histogram,
                "top_values": statistics.top_values,
                "top_places": statistics.top_places,
            }
            save_arrays(contexts, new / CONTEXTS_FILE)
            (new / ABOUT).write_text(json.dumps(self.about, indent=2), encoding="utf-8")
            shutil.rmtree(self.path, ignore_errors=True)
            new.rename(self.path)


class Seldom:
    """Does a thing the first time, and then so seldom that it costs next to nothing."""

    def __init__(self) -> None:
        self._done = self._took = 0.0

    def __call__(self, work: Callable[[], None]) -> bool:
        """Whether it was done this time."""
        begun = time.monotonic()
        if self._done and self._took > SAVING_SHARE * (begun - self._done):
            return False
        work()
        self._done = time.monotonic()
        self._took = self._done - begun
        return True


@dataclass
class Unfinished:
    """The state of a pass that may be killed, in one file that is replaced as a whole."""

    path: Path

    @classmethod
    def beside(cls, entries: list[Entry]) -> Unfinished:
        """The state file of a pass over these entries."""
        keys = " ".join(entry.path.name for entry in entries).encode()
        name = f"{hashlib.sha256(keys).hexdigest()[:32]}.unfinished.safetensors"
        return cls(entries[0].path.parent / name)

    @property
    def parts(self) -> Path:
        """Folder of what was counted and is not in the state yet."""
        return self.path.with_suffix("").with_suffix(".parts")

    def load(self) -> dict[str, Tensor] | None:
        """What was last saved, if anything readable was."""
        try:
            state: dict[str, Tensor] = load_tensors(self.path)
            return state
        except (OSError, SafetensorError):
            return None

    def save(self, state: dict[str, Tensor]) -> None:
        """Keep a state in place of the last one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path) as new:
            save_tensors({name: tensor.contiguous() for name, tensor in state.items()}, new)

    def saver(self) -> Callable[[dict[str, Tensor]], bool]:
        """Saves the first state and then so seldom that it costs next to nothing; says whether it
        did.
        """
        seldom = Seldom()
        return lambda state: seldom(partial(self.save, state))

    def remove(self) -> None:
        """The pass is finished."""
        self.path.unlink(missing_ok=True)
