"""The state of a training that may be killed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bake.errors import OutputError, short
from bake.search.cache import Seldom, cache_folder


@dataclass
class Kept:
    """The state of a training that may be killed, in the cache."""

    folder: Path
    """One folder in it for each state; the highest is the last."""
    seldom: Seldom = field(default_factory=Seldom)

    @classmethod
    def of(cls, made_from: Sequence[str | bytes]) -> Kept:
        """Where the state of a training lies that depends on all of this."""
        digest = hashlib.sha256()
        for part in made_from:
            digest.update(part.encode() if isinstance(part, str) else part)
        return cls(cache_folder() / "train-sae" / digest.hexdigest()[:32])

    def restore(self, trainer: Any) -> int:
        """Bring a new trainer to the last state that was kept; gives the block that comes next."""
        for path in sorted(self.folder.glob("block-*[0-9]"), reverse=True):
            try:
                trainer.sae.load_weights_from_checkpoint(path)
                trainer.load_trainer_state(path)
            except Exception as error:  # torch and safetensors raise every kind
                raise OutputError(
                    f"{path}: what was kept of an earlier training cannot be read "
                    f"({short(' '.join(str(error).split()))}); remove that folder, and start anew"
                ) from error
            return int(path.name.partition("-")[2])
        return 0

    def save(self, trainer: Any, block: int) -> None:
        """Keep the state before a block, but so seldom that it costs next to nothing."""
        self.seldom(lambda: self._save(trainer, block))

    def _save(self, trainer: Any, block: int) -> None:
        before = list(self.folder.glob("block-*"))
        new = self.folder / f"block-{block:09}.new"
        shutil.rmtree(new, ignore_errors=True)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.save_checkpoint(new.name, self.folder)
        new.rename(new.with_suffix(""))
        for path in before:
            shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """The training is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)
