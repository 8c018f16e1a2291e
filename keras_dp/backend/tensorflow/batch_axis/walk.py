"""Follows the examples of a batch through traced operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..operations import DRAWS
from .states import SHARED, Mixed, Rows, Shared, State, Unknown, is_symbolic
from .table import RULES

_DRAWS_BY_SEED = (
    "StatelessMultinomial",
    "StatelessParameterized",
    "StatelessRandomB",
    "StatelessRandomGamma",
    "StatelessRandomP",
    "StatelessSample",
    "StatelessShuffle",
)


class BatchAxis:
    """What each tensor of a graph has to do with the examples of a batch.

    Args:
        examples: Tensors that hold the examples along their first axis.
        shared: Tensors that don't follow from them.

    Attributes:
        drawn_together: Operations met so far that draw random numbers, once for all examples.
    """

    def __init__(self, examples: Sequence[Any] = (), shared: Sequence[Any] = ()) -> None:
        self.drawn_together: list[Any] = []
        self._declared: dict[tuple[Any, int], State] = {}
        self._found: dict[Any, list[State]] = {}
        for tensor in shared:
            self.declare(tensor, SHARED)
        for tensor in examples:
            self.declare(tensor, Rows())

    def declare(self, tensor: Any, state: State) -> None:
        """Says what a tensor is, by what is known of it otherwise."""
        if is_symbolic(tensor):
            self._declared[tensor.op, tensor.value_index] = state

    def of(self, tensor: Any) -> State:
        """What a tensor is."""
        if not is_symbolic(tensor):
            return SHARED  # a constant
        declared = self._declared.get((tensor.op, tensor.value_index))
        if declared is not None:
            return declared
        waiting = [tensor.op]
        while waiting:
            op = waiting[-1]
            if op in self._found:
                waiting.pop()
                continue
            before = [
                t.op
                for t in op.inputs
                if t.op not in self._found and (t.op, t.value_index) not in self._declared
            ]
            if before:
                waiting += before
                continue
            self._found[op] = self._states_of(op)
            waiting.pop()
        return self._found[tensor.op][tensor.value_index]

    def close(self, rows: int) -> None:
        """Gives tensors that hold the examples, as far as they were followed, their number."""
        declared = [(op.outputs[k], state) for (op, k), state in self._declared.items()]
        found = [
            pair
            for op, states in self._found.items()
            for pair in zip(op.outputs, states, strict=False)
        ]
        for tensor, state in (*declared, *found):
            if isinstance(state, Rows) and tensor.shape.rank and tensor.shape[state.axis] is None:
                sizes = tensor.shape.as_list()
                sizes[state.axis] = rows * state.each
                tensor.set_shape(sizes)

    def _input(self, tensor: Any) -> State:
        key = (tensor.op, tensor.value_index)
        declared = self._declared.get(key)
        return self._found[key[0]][key[1]] if declared is None else declared

    def _states_of(self, op: Any) -> list[State]:
        states = [self._input(t) for t in op.inputs]
        for kind in (Mixed, Unknown):
            bad = next((s for s in states if isinstance(s, kind)), None)
            if bad is not None:
                return [bad] * len(op.outputs)
        rule = RULES.get(op.type)
        if rule is None:
            if all(isinstance(s, Shared) for s in states):
                if op.type in DRAWS or op.type.startswith(_DRAWS_BY_SEED):
                    self.drawn_together.append(op)
                return [SHARED] * len(op.outputs)
            found: State | list[State] = Unknown(
                f"the operation '{op.name}' ({op.type}), of which it isn't known that it keeps "
                "examples apart"
            )
        else:
            try:
                found = rule(self, op, states)
            except ValueError:  # TensorFlow's, of a tensor without a rank
                found = Unknown(f"the operation '{op.name}' ({op.type}) has no known shape")
        return found if isinstance(found, list) else [found] * len(op.outputs)

    def inside(self, graph: Any, states: Sequence[State]) -> tuple[BatchAxis, list[State]]:
        """A function's results, from what its arguments are."""
        inner = BatchAxis()
        for placeholder, state in zip(graph.inputs, states, strict=False):
            inner.declare(placeholder, state)
        found = [inner.of(t) for t in graph.outputs]
        self.drawn_together += inner.drawn_together
        return inner, found
