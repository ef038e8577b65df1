"""A graph that is written node by node, in the order in which it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, StringStringEntryProto, TensorProto, helper, numpy_helper


class Builder:
    """Collects nodes and initializers. Values are passed around by name."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self._known: dict[str, str] = {}
        self.scope = ""
        """Part of the model that nodes from here on are named after."""

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Append a node with one output, and give the output's name."""
        return self.op_many(kind, *inputs, n_outputs=1, domain=domain, **attributes)[0]

    def op_many(
        self, kind: str, *inputs: str, n_outputs: int, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Append a node, and give its outputs' names."""
        name = f"{self.scope}/{kind}_{len(self.nodes)}"
        outputs = [f"{name}:{i}" for i in range(n_outputs)]
        self.nodes.append(
            helper.make_node(kind, inputs, outputs, name=name, domain=domain, **attributes)
        )
        return outputs

    def cast(self, x: str, to: int) -> str:
        """A value in another type."""
        return self.op("Cast", x, to=to)

    def ints(self, *values: int) -> str:
        """A constant vector of int64."""
        return self.constant(np.array(values, np.int64))

    def scalar(self, value: int) -> str:
        """A constant scalar of int64."""
        return self.constant(np.array(value, np.int64))

    def float(self, value: float) -> str:
        """A constant scalar of float32."""
        return self.constant(np.array(value, np.float32))

    def constant(self, array: NDArray[np.generic]) -> str:
        """A small constant, stored in the graph once however often it is asked for."""
        key = f"constant/{array.dtype}{list(array.shape)}/{array.tobytes().hex()}"

        def add() -> str:
            name = f"constant_{len(self.initializers)}"
            self.initializers[name] = numpy_helper.from_array(array, name)
            return name

        return self.once(key, add)

    def external(
        self, name: str, kind: int, shape: Sequence[int], data: Sequence[StringStringEntryProto]
    ) -> str:
        """An initializer whose data lies in another file."""
        if name not in self.initializers:
            self.initializers[name] = TensorProto(
                name=name,
                data_type=kind,
                dims=shape,
                data_location=TensorProto.EXTERNAL,
                external_data=data,
            )
        return name

    def once(self, key: str, make: Callable[[], str]) -> str:
        """What was made for this key before, else what `make` gives."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]
