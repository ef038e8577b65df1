"""Engines that turn token ids into logits, behind one protocol."""

from __future__ import annotations

import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bake.errors import FolderError, RanOutError, TooLargeError
from bake.files.halving import in_halves, joined
from bake.files.scratch import Scratch
from bake.strangers import confined
from bake.strangers.model_view import show_adapter, show_model
from verify.engines import forward, torch_worker
from verify.engines.heap import by_halves
from verify.engines.sampling import asked_to_go_on, check_padding
from verify.engines.what_loads import MODELING, loading_class

if TYPE_CHECKING:
    from torch import Tensor

    from verify.engines.token_tree import TokenTree
    from verify.reference.oracle import Oracle

CLOSING_SECONDS = 10
"""How long a worker process may take to end by itself."""


@dataclass(frozen=True)
class Reading:
    """What one forward pass of an engine shows."""

    logits: Tensor
    """[n, vocab] float32 on the CPU: next-token logits at the wanted tokens, row by row."""
    losses: Tensor
    """[m] float64, nats: the cross-entropy of what follows each scored token."""


class Runner(ABC):
    """One engine with one model loaded."""

    name: str
    """base | reference | checkpoint | onnx | …"""

    @abstractmethod
    def read(
        self, input_ids: Tensor, attention_mask: Tensor, wanted: Tensor, scored: Tensor
    ) -> Reading:
        """One forward pass, with nothing cached, of which only what is asked for is formed where
        the engine can leave the rest, and only that is kept.

        Args:
            input_ids: [batch, seq], padded on the left.
            attention_mask: [batch, seq], 1 at real tokens. Positions count from the first of them.
            wanted: [batch, seq] bool, the tokens whose logits are asked for.
            scored: [batch, seq] bool, the tokens of which the loss of what follows is asked for;
                never in the last column.
        """

    @abstractmethod
    def go_on(
        self, input_ids: Tensor, attention_mask: Tensor, stops: Sequence[int], most: int
    ) -> Tensor:
        """The likeliest next token, again and again, from a cache.

        Args:
            input_ids: [batch, seq], padded on the left.
            attention_mask: [batch, seq], 1 at real tokens.
            stops: tokens that end a sequence; the one that did is its last.
            most: how many steps at most; at least 1.

        Returns:
            [batch, steps]; -1 after a sequence's end.
        """

    def logits(
        self, input_ids: Tensor, attention_mask: Tensor, wanted: Tensor | None = None
    ) -> Tensor:
        """Next-token logits, [n, vocab], of `wanted` tokens, or at the end of each sequence."""
        import torch

        check_padding(attention_mask)
        nothing = torch.zeros_like(attention_mask, dtype=torch.bool)
        if wanted is None:
            wanted = nothing.clone()
            wanted[:, -1] = True
        return self.read(input_ids, attention_mask, wanted, nothing).logits


class DecodingRunner(Runner):
    """An engine that is used to generate, and so is looked at while it does."""

    @abstractmethod
    def decoded(self, input_ids: Tensor, attention_mask: Tensor, n_last: int) -> Tensor:
        """Logits of the last columns, each fed alone after everything before it was cached.

        Args:
            input_ids: [batch, seq], padded on the left.
            attention_mask: [batch, seq], 1 at real tokens.
            n_last: how many columns; less than seq.

        Returns:
            [batch, n_last, vocab], float32 on the CPU.
        """


class HookedRunner(Runner):
    """A stock model in this process: the base, or with an oracle's hooks on it the reference.

    Args:
        name: of the engine.
        model: a stock Gemma.
        oracle: over the same model; None for the base.
    """

    def __init__(self, name: str, model: Any, oracle: Oracle | None = None) -> None:
        self.name = name
        self._model = model
        self._oracle = oracle
        self.reads_trees = oracle is None or not oracle.gated  # else whole sequences only

    def read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        wanted: Tensor | Callable[[slice], Tensor],
        scored: Tensor,
    ) -> Reading:
        """See `Runner.read`. What is wanted may be asked for once all layers were run on some of
        the rows.
        """

        def run(rows: slice) -> Reading:
            given = {"input_ids": input_ids[rows], "attention_mask": attention_mask[rows]}
            given["scored"] = scored[rows]
            choose = partial(wanted if callable(wanted) else wanted.__getitem__, rows)
            with self._hooks():
                return Reading(*forward.read(self._model, given, choose))

        if self._oracle is not None:
            return self._oracle.in_halves(run, *input_ids.shape)
        return joined(in_halves(self._model, "reading prompts", run, *input_ids.shape))

    @by_halves
    def go_on(
        self, input_ids: Tensor, attention_mask: Tensor, stops: Sequence[int], most: int
    ) -> Tensor:
        """See `Runner.go_on`."""
        asked = asked_to_go_on(input_ids, attention_mask, stops)
        with self._hooks():
            found: Tensor = forward.go_on(self._model, asked, most, cached=self.reads_trees)
        return found

    def _hooks(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._oracle is None else self._oracle.applied()

    def width(self) -> int:
        """See `TreeRunner.width`."""
        return int(self._model.config.get_text_config().hidden_size)

    def tree_logits(self, tree: TokenTree) -> Tensor:
        """See `TreeRunner.tree_logits`."""
        with self._hooks():
            logits: Tensor = forward.tree_logits(self._model, tree.tensors(self.width()))
        return logits


class TorchRunner(DecodingRunner):
    """A folder in a confined process that cannot import bakeout, unless it needs to. The process
    runs bakeout's own modeling file, whatever the folder holds. It starts at once and imports what
    it needs; `load` loads the folder into it.

    Args:
        folder: the checkpoint.
        name: of the engine.
        needs: a package of bakeout that the process imports first, where the folder wants it.
    """

    def __init__(self, folder: Path, name: str = "checkpoint", needs: str | None = None) -> None:
        self.name = name
        self.reads_trees = True
        self._folder = folder
        self._hidden_size = 0
        self._scratch = Scratch("verify")
        scratch = self._scratch.path.resolve()
        self._stderr = (scratch / "stderr").open("wb")
        self._process = confined.start(
            *(torch_worker.__file__, str(MODELING), *([] if needs is None else [needs])),
            scratch=scratch,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
        )

    def load(
        self,
        dtype: str,
        *,
        device: str = "cpu",
        threads: int = 1,
        base: Path | None = None,
        bits: int | None = None,
    ) -> str:
        """Load the folder; returns the class that transformers made of it.

        Args:
            dtype: float32, bfloat16 or float16.
            device: as torch names it.
            threads: of the process.
            base: for an adapter: the base's folder.
            bits: to which its layers' matrices are rounded.

        Raises:
            FolderError: it does not load; the message is transformers' own.
            RanOutError: for want of memory or time.
        """
        shown = self._scratch.path.resolve() / "shown"
        shutil.rmtree(shown, ignore_errors=True)
        shown.mkdir()
        asked = {"op": "load", "dtype": dtype, "device": device, "threads": str(threads)}
        asked["bits"] = str(bits or "")
        asked["from"], asked["class"] = loading_class(base or self._folder)
        asked["model"] = str(show_model(base or self._folder, shown / "model"))
        asked["adapter"] = "" if base is None else str(show_adapter(self._folder, shown / "over"))
        found, _ = self._ask(asked)
        if found["dtype"] != dtype:
            raise FolderError(
                f"{self._folder.name}: loads as {found['dtype']}; expected the base's {dtype}"
            )
        self._hidden_size = int(found["hidden_size"])
        return found["class"]

    def drop(self) -> None:
        """Let go of what is loaded; the process stays."""
        if self._process.poll() is None:
            self._ask({"op": "drop"})

    @by_halves
    def read(
        self, input_ids: Tensor, attention_mask: Tensor, wanted: Tensor, scored: Tensor
    ) -> Reading:
        """See `Runner.read`."""
        _, tensors = self._ask(
            {"op": "read"},
            input_ids=input_ids,
            attention_mask=attention_mask,
            wanted=wanted,
            scored=scored,
        )
        return Reading(tensors["logits"], tensors["losses"])

    @by_halves
    def go_on(
        self, input_ids: Tensor, attention_mask: Tensor, stops: Sequence[int], most: int
    ) -> Tensor:
        """See `Runner.go_on`."""
        asked = asked_to_go_on(input_ids, attention_mask, stops)
        _, tensors = self._ask({"op": "go on", "most": str(most)}, **asked)
        found: Tensor = tensors["tokens"]
        return found

    def width(self) -> int:
        """See `TreeRunner.width`; 0 before something is loaded."""
        return self._hidden_size

    def tree_logits(self, tree: TokenTree) -> Tensor:
        """See `TreeRunner.tree_logits`."""
        _, tensors = self._ask({"op": "tree"}, **tree.tensors(self._hidden_size))
        logits: Tensor = tensors["logits"]
        return logits

    @by_halves
    def decoded(self, input_ids: Tensor, attention_mask: Tensor, n_last: int) -> Tensor:
        """See `DecodingRunner.decoded`."""
        check_padding(attention_mask)
        asked = {"op": "decoded", "n_last": str(n_last)}
        _, tensors = self._ask(asked, input_ids=input_ids, attention_mask=attention_mask)
        logits: Tensor = tensors["logits"]
        return logits

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        try:
            self._process.wait(CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()
        self._scratch.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._process.kill()
        self.close()

    def _ask(self, words: dict[str, str], **tensors: Tensor) -> tuple[dict[str, str], Any]:
        """One request and its answer."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with confined.time_limit(self._process, confined.SECONDS) as late:
            try:
                torch_worker.write_message(stdin, torch_worker.pack(words, contiguous))  # type: ignore[arg-type]
                data = torch_worker.read_message(stdout)  # type: ignore[arg-type]
            except BrokenPipeError:
                data = None
        if data is None and late.is_set():
            raise RanOutError(
                f"{self._folder.name}: {words['op']} took over {confined.SECONDS:.0f} seconds, and "
                "was stopped; take a faster device, or check its files by --only integrity"
            )
        if data is None:
            self._stderr.flush()
            said = confined.last_words(self._process, Path(self._stderr.name))
            who = f"{self._folder.name}: the process that loaded it {said}"
            if confined.ran_out_of_memory(said, self._process.returncode):
                raise RanOutError(f"{who}: memory ran out, it seems; take a machine with more")
            raise FolderError(f"{who}; check its files")
        found, answered = torch_worker.unpack(data)
        if "error" in found:
            said = found["error"].replace(words.get("model", "…"), str(self._folder))
            if confined.ran_out_of_memory(said):
                raise TooLargeError(f"{self._folder.name}: {said}; take a device with more memory")
            raise FolderError(
                f"{self._folder.name}: transformers alone cannot run it: {said}; "
                "check its files by --only integrity"
            )
        return found, answered
