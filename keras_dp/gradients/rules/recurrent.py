"""SimpleRNN, LSTM, GRU and ConvLSTM, and RNN around one of their cells.

Before its gates a cell adds `x_t K + b` to a product of the last state with the
recurrent kernel R. Here `u_t = x_t K + b` is made for all steps at once and
handed to the cell, so that the gradient d_t of u_t tells of every weight:

- K: `sum_t x_t (x) d_t`, and b: `sum_t d_t`;
- R: `sum_t h_{t-1} (x) d_t`, h the states that the layer went through.

A GRU resets the state for its candidate: with `reset_after`, the last third of
R sees r_t d_t instead of d_t; without, it multiplies r_t h_{t-1}. A step that is
masked leaves the state as it was and has d_t = 0. In a ConvLSTM both products are
convolutions: the same sums, of patches of x_t and h_{t-1} and of d_t at each place.
(For the recurrent kernel in Keras' own loop: Bu et al. 2022, arXiv 2210.00038, treat
a matrix used T times.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras import layers, ops

from ... import backend, keras_private
from ..forms import OuterProducts, PerExample
from .convolution import filters_of_steps
from .registry import NoRule, Unit, double_of, register_rule, summed_like


@register_rule(
    layers.SimpleRNN,
    layers.LSTM,
    layers.GRU,
    layers.ConvLSTM1D,
    layers.ConvLSTM2D,
    layers.ConvLSTM3D,
    layers.RNN,
)
def recurrent(
    unit: Unit,
    sequences: Any,
    initial_state: Any = None,
    mask: Any = None,
    training: bool = False,
) -> Any:
    """Unrolled or not, forwards or backwards, with masks and dropout."""
    layer = unit.layer
    kind = _KINDS.get(type(layer.cell))
    if kind is None:
        raise NoRule("its cell has no rule")
    if "inner_loop" in vars(layer):
        raise NoRule("it has a loop of its own")
    if mask is not None and layer.unroll and layer.go_backwards and layer.zero_output_for_mask:
        # Keras zeros other steps' outputs than those that are masked: states would be missing.
        raise NoRule("it is unrolled backwards, and zeros its outputs by a mask")
    double = double_of(layer.cell)
    cell = kind(unit, double, sequences, training)
    states: list[Any] = []

    def inner_loop(
        sequences: Any, initial_state: Any, mask: Any, training: bool = False
    ) -> tuple[Any, Any, Any]:
        last, every, final = layers.RNN.inner_loop(
            double_of(layer, cell=cell.step, return_sequences=True),
            sequences,
            initial_state,
            mask,
            training,
        )
        first = initial_state[0] if isinstance(initial_state, (list, tuple)) else initial_state
        states[:] = [first, every]
        if mask is None:  # the last output is the last state, whose gradient costs less
            last = final[0]
        return last, every, final

    arguments = {"initial_state": initial_state, "mask": mask, "training": training}
    projected = unit.watch(cell.projected)
    attributes = {"cell": double, "inner_loop": inner_loop}
    outputs = unit.call_with(attributes, projected, **arguments)
    first, every = states

    def gradients(d: Any) -> list[tuple[Any, Any]]:
        previous = _states_before(first, every, mask, backwards=layer.go_backwards)
        return cell.gradients(d, previous)

    return outputs, gradients


def _states_before(first: Any, every: Any, mask: Any, *, backwards: bool) -> Any:
    """The state that each step started from, (B, T, ...), in the order of the inputs.

    Args:
        first: The initial state, (B, ...).
        every: The output of each step, (B, T, ...), in the order of the steps.
        mask: (B, T), in the order of the inputs, or `None`. The output of a
            masked step is not the state.
        backwards: Whether the steps went through the inputs backwards.
    """
    before = ops.concatenate([ops.expand_dims(ops.cast(first, every.dtype), 1), every], axis=1)
    length = ops.shape(every)[1]
    if mask is None:
        before = before[:, :-1]
    else:
        # Where the steps that were not masked stand, in order; slot 0 is the initial state.
        taken = ops.cast(ops.flip(mask, 1) if backwards else mask, "int32")
        steps = ops.arange(1, length + 1, dtype="int32")
        slots = ops.sort(ops.where(taken > 0, steps, steps + length), axis=1)
        slots = ops.concatenate([ops.zeros_like(slots[:, :1]), slots], axis=1)
        so_far = ops.cumsum(taken, axis=1) - taken
        latest = ops.take_along_axis(slots, so_far, axis=1)
        latest = ops.expand_dims(latest, tuple(range(2, len(every.shape))))
        before = ops.take_along_axis(before, latest, axis=1)
    return ops.flip(before, 1) if backwards else before


class _Cell:
    """What all kinds of cells have in common.

    Args:
        unit: The call of the layer around the cell.
        cell: The cell, or a double of it.
        sequences: Its inputs, (B, T, ...).
        training: Whether dropout is on.
    """

    gates = 1

    def __init__(self, unit: Unit, cell: Any, sequences: Any, training: bool) -> None:
        self.unit = unit
        self.cell = cell
        self.kernel = unit.value(cell.kernel)
        self.recurrent_kernel = unit.value(cell.recurrent_kernel)
        self.bias = None if cell.bias is None else unit.value(cell.bias)
        self.masks = self.recurrent_masks = None
        if training and 0.0 < cell.dropout < 1.0:
            self.masks = self._per_gate(cell.get_dropout_mask(sequences[:, 0]))
        if training and 0.0 < cell.recurrent_dropout < 1.0 and self._drops_states():
            like = self._like_state(sequences)
            self.recurrent_masks = self._per_gate(cell.get_recurrent_dropout_mask(like))
        self.sequences = sequences
        self.projected = self._project()

    def _drops_states(self) -> bool:
        """Whether the cell uses `recurrent_dropout`: a fused implementation doesn't."""
        return getattr(self.cell, "implementation", 1) == 1

    def _like_state(self, sequences: Any) -> Any:
        return ops.broadcast_to(sequences[:, 0, :1], (ops.shape(sequences)[0], self.cell.units))

    def _per_gate(self, masks: Any) -> list[Any]:
        """One mask, (B, ...), for each gate, or one for all."""
        return list(masks) if isinstance(masks, (list, tuple)) else [masks]

    def _project(self) -> Any:
        inputs = self._dropped(self.sequences, self.masks)
        if len(inputs) == 1:
            projected = ops.matmul(inputs[0], self.kernel)
        else:
            parts = ops.split(self.kernel, self.gates, axis=1)
            projected = ops.concatenate(
                [ops.matmul(x, k) for x, k in zip(inputs, parts, strict=True)], axis=-1
            )
        bias = self._input_bias()
        return projected if bias is None else projected + bias

    def _input_bias(self) -> Any:
        return self.bias

    @staticmethod
    def _dropped(sequences: Any, masks: Any) -> list[Any]:
        if masks is None:
            return [sequences]
        return [sequences * ops.expand_dims(m, 1) for m in masks]

    def _recur(self, state: Any, gates: slice = slice(None)) -> Any:
        """The state times R, for some of the gates."""
        units = self.cell.units
        kernel = ops.split(self.recurrent_kernel, self.gates, axis=1)[gates]
        if self.recurrent_masks is None or len(self.recurrent_masks) == 1:
            if self.recurrent_masks is not None:
                state = state * self.recurrent_masks[0]
            first = (gates.start or 0) * units
            return ops.matmul(state, self.recurrent_kernel[:, first : first + len(kernel) * units])
        masks = self.recurrent_masks[gates]
        return ops.concatenate(
            [ops.matmul(state * m, k) for m, k in zip(masks, kernel, strict=True)], axis=-1
        )

    def step(self, projected: Any, states: Any) -> Any:
        raise NotImplementedError

    def gradients(self, d: Any, previous: Any) -> list[tuple[Any, Any]]:
        """From the gradient of what was projected, and the states before each step."""
        cell = self.cell
        return [
            (cell.kernel, self._products(self._dropped(self.sequences, self.masks), d)),
            (
                cell.recurrent_kernel,
                self._products(self._dropped(previous, self.recurrent_masks), d),
            ),
            *([] if cell.bias is None else [(cell.bias, ops.sum(d, axis=1))]),
        ]

    def _products(self, inputs: list[Any], d: Any) -> OuterProducts:
        return OuterProducts(*self._factors(inputs, d))

    def _factors(self, inputs: list[Any], d: Any) -> tuple[Any, Any]:
        """One input for all gates, or one for each: then each with the other gates' d at 0."""
        if len(inputs) == 1:
            return inputs[0], d
        parts = ops.split(d, self.gates, axis=-1)
        alone = [
            ops.concatenate(
                [p if k == gate else ops.zeros_like(p) for k, p in enumerate(parts)], axis=-1
            )
            for gate in range(self.gates)
        ]
        return ops.concatenate(inputs, axis=1), ops.concatenate(alone, axis=1)


class _Simple(_Cell):
    def _drops_states(self) -> bool:
        return True

    def step(self, projected: Any, states: Any) -> Any:
        state = states[0] if isinstance(states, (list, tuple)) else states
        output = projected + self._recur(state)
        if self.cell.activation is not None:
            output = self.cell.activation(output)
        return output, [output] if isinstance(states, (list, tuple)) else output


class _LSTM(_Cell):
    gates = 4

    @property
    def axis(self) -> int:
        """That of the gates, in one step."""
        return 1

    def step(self, projected: Any, states: Any) -> Any:
        hidden, carry = states
        i, f, c, o = ops.split(projected + self._recur(hidden), 4, axis=self.axis)
        gate, activation = self.cell.recurrent_activation, self.cell.activation
        carry = gate(f) * carry + gate(i) * activation(c)
        hidden = gate(o) * activation(carry)
        return hidden, [hidden, carry]


class _ConvLSTM(_LSTM):
    @property
    def axis(self) -> int:
        return 1 if self._channels_first() else -1

    def _channels_first(self) -> bool:
        return bool(self.cell.data_format == "channels_first")

    def _like_state(self, sequences: Any) -> Any:
        return self.cell.get_initial_state(batch_size=ops.shape(sequences)[0])[0]

    def _convolved(self, inputs: Any, kernel: Any, function: Callable[[Any, Any], Any]) -> Any:
        """All gates at once, or each with a mask of its own."""
        if len(inputs) == 1:
            return function(inputs[0], kernel)
        parts = ops.split(kernel, self.gates, axis=-1)
        found = [function(x, k) for x, k in zip(inputs, parts, strict=True)]
        return ops.concatenate(found, axis=self.axis)

    def _project(self) -> Any:
        cell = self.cell
        space = cell.spatial_dims
        channels = self.kernel.shape[-2]
        one = (channels, *space) if self._channels_first() else (*space, channels)
        shape = backend.of_known_sizes(self.sequences, [None, None, *one]).shape
        inputs = [
            ops.reshape(t, (-1, *shape[2:])) for t in self._dropped(self.sequences, self.masks)
        ]
        found = self._convolved(
            inputs,
            self.kernel,
            lambda x, k: self.cell.input_conv(x, k, padding=self.cell.padding),
        )
        if self.bias is not None:
            sizes = [1 for _ in found.shape]
            sizes[self.axis] = -1
            found = found + ops.reshape(self.bias, sizes)
        steps = (-1, shape[1]) if shape[1] is not None else (ops.shape(self.sequences)[0], -1)
        return ops.reshape(found, (*steps, *found.shape[1:]))

    def _recur(self, state: Any, gates: slice = slice(None)) -> Any:
        masks = self.recurrent_masks
        states = [state] if masks is None else [state * m for m in masks]
        return self._convolved(states, self.recurrent_kernel, self.cell.recurrent_conv)

    def gradients(self, d: Any, previous: Any) -> list[tuple[Any, Any]]:
        cell, rank = self.cell, self.cell.rank
        state = self.projected.shape[2:]
        first = self._channels_first()
        state = (cell.filters, *state[1:]) if first else (*state[:-1], cell.filters)
        previous = backend.of_known_sizes(previous, [None, None, *state])
        d = self._channels_last(d)

        def filters(kernel: Any, inputs: Any, masks: Any, *settings: Any) -> PerExample:
            dropped = [self._channels_last(t) for t in self._dropped(inputs, masks)]
            return filters_of_steps(*self._factors(dropped, d), tuple(kernel.shape), *settings)

        ones = (1,) * rank
        how = cell.strides, cell.padding, cell.dilation_rate
        return [
            (cell.kernel, filters(cell.kernel, self.sequences, self.masks, *how)),
            (
                cell.recurrent_kernel,
                filters(cell.recurrent_kernel, previous, self.recurrent_masks, ones, "same", ones),
            ),
            *([] if cell.bias is None else [(cell.bias, summed_like(d, (-1,)))]),
        ]

    def _channels_last(self, tensor: Any) -> Any:
        """(B, T, channels, *space) as (B, T, *space, channels)."""
        if not self._channels_first():
            return tensor
        return ops.transpose(tensor, (0, 1, *range(3, len(tensor.shape)), 2))


class _GRU(_Cell):
    gates = 3

    def _input_bias(self) -> Any:
        if self.bias is None or not self.cell.reset_after:
            return self.bias
        return self.bias[0]

    def _state_bias(self) -> Any:
        return 0.0 if self.bias is None else self.bias[1]

    def _gates(self, projected: Any, state: Any) -> tuple[Any, Any, Any, Any]:
        """z, r, the candidate's own share, and what the recurrent kernel gives it."""
        cell = self.cell
        x_z, x_r, x_h = ops.split(projected, 3, axis=-1)
        if cell.reset_after:
            inner = self._recur(state) + self._state_bias()
            h_z, h_r, h_h = ops.split(inner, 3, axis=-1)
        else:
            h_z, h_r = ops.split(self._recur(state, slice(0, 2)), 2, axis=-1)
        z, r = cell.recurrent_activation(x_z + h_z), cell.recurrent_activation(x_r + h_r)
        return z, r, x_h, r * h_h if cell.reset_after else self._recur(r * state, slice(2, 3))

    def step(self, projected: Any, states: Any) -> Any:
        state = states[0] if isinstance(states, (list, tuple)) else states
        z, _, x_h, h_h = self._gates(projected, state)
        new = z * state + (1 - z) * self.cell.activation(x_h + h_h)
        return new, [new] if isinstance(states, (list, tuple)) else new

    def gradients(self, d: Any, previous: Any) -> list[tuple[Any, Any]]:
        cell = self.cell
        dropped = self._dropped(previous, self.recurrent_masks)
        reset = self._reset_gate(dropped)
        d_z, d_r, d_h = ops.split(d, 3, axis=-1)
        found: list[tuple[Any, Any]] = [
            (cell.kernel, self._products(self._dropped(self.sequences, self.masks), d))
        ]
        if cell.reset_after:
            inner = ops.concatenate([d_z, d_r, reset * d_h], axis=-1)
            found.append((cell.recurrent_kernel, self._products(dropped, inner)))
            if cell.bias is not None:
                both = ops.stack([ops.sum(d, axis=1), ops.sum(inner, axis=1)], axis=1)
                found.append((cell.bias, both))
            return found
        last = reset * dropped[-1]
        inputs = [dropped[0], dropped[1 % len(dropped)], last]
        found.append((cell.recurrent_kernel, self._products(inputs, d)))
        if cell.bias is not None:
            found.append((cell.bias, ops.sum(d, axis=1)))
        return found

    def _reset_gate(self, dropped: list[Any]) -> Any:
        """r of every step, (B, T, units), from the states before them."""
        units = self.cell.units
        kernel = self.recurrent_kernel[:, units : 2 * units]
        h_r = ops.matmul(dropped[1 % len(dropped)], kernel)
        if self.cell.reset_after and self.bias is not None:
            h_r = h_r + self.bias[1][units : 2 * units]
        return self.cell.recurrent_activation(self.projected[..., units : 2 * units] + h_r)


_KINDS: dict[type, Callable[..., _Cell]] = {
    layers.SimpleRNNCell: _Simple,
    layers.LSTMCell: _LSTM,
    keras_private.ConvLSTMCell: _ConvLSTM,
    layers.GRUCell: _GRU,
}
