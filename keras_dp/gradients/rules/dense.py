"""Dense and EinsumDense, with and without LoRA.

`z_t = W^T a_t + b` at T positions of an example, g = dL/dz: the gradient of W is
`sum_t a_t (x) g_t` and that of b is `sum_t g_t`. With LoRA, `W = W0 + s A B`: the
gradient of A is that of W times `s B^T`, and of B it is `s A^T` times that of W;
both are again sums of outer products, of `(a, s g B^T)` and of `(s a A, g)`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from keras import layers, ops

from ... import backend
from ..forms import OuterProducts, PerExample
from .registry import NoRule, Unit, register_rule, summed_like


@register_rule(layers.Dense)
def dense(unit: Unit, inputs: Any, **kwargs: Any) -> Any:
    """(B, ..., d) times (d, p)."""
    layer = unit.layer
    lora = LowRank.of(unit, "kernel")
    outputs = unit.call_watching_activation(inputs, **kwargs)

    def gradients(g: Any) -> list[tuple[Any, Any]]:
        a, flat_g = positions_of(inputs), positions_of(g)
        found = []
        if layer.use_bias:
            found.append((layer.bias, summed_like(g, (-1,))))
        if lora is not None:
            right = ops.matmul(flat_g, ops.transpose(lora.high))
            left = ops.matmul(a, lora.low)
            found += lora.pairs(OuterProducts(a, right), OuterProducts(left, flat_g))
        if unit.trains(layer._kernel):
            found.append((layer._kernel, OuterProducts(a, flat_g)))
        return found

    return outputs, gradients


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The factors that LoRA adds to a weight: `W = W0 + scale A B`.

    Args:
        variables: A and B.
        low: A's values while the layer runs, (..., r).
        high: B's values, (r, p).
        scale: The factor in front of their product.
    """

    variables: tuple[Any, Any]
    low: Any
    high: Any
    scale: float

    @classmethod
    def of(cls, unit: Unit, name: str) -> LowRank | None:
        """Those of a layer's `lora_<name>_a` and `_b`, if LoRA is enabled."""
        layer = unit.layer
        if not getattr(layer, "lora_enabled", False):
            return None
        both = (getattr(layer, f"lora_{name}_a"), getattr(layer, f"lora_{name}_b"))
        low, high = (ops.cast(unit.value(w), layer.compute_dtype) for w in both)
        return cls(both, low, high, layer.lora_alpha / layer.lora_rank)

    def pairs(self, of_low: PerExample, of_high: PerExample) -> list[tuple[Any, Any]]:
        """The gradients of `low` and `high` for scale 1, scaled, beside their variables."""
        both = zip(self.variables, (of_low, of_high), strict=True)
        return [
            (v, g.with_tensors([*g.tensors()[:-1], g.tensors()[-1] * self.scale])) for v, g in both
        ]


def positions_of(tensor: Any) -> Any:
    """(B, ..., d) as (B, T, d); (B, d) as it is."""
    if len(tensor.shape) <= 3:
        return tensor
    length = [tensor.shape[k] for k in range(1, len(tensor.shape) - 1)]
    width = tensor.shape[-1]
    if None not in length:
        return ops.reshape(tensor, (-1, math.prod(length), width))
    return ops.reshape(tensor, (ops.shape(tensor)[0], -1, width))


@register_rule(layers.EinsumDense)
def einsum_dense(unit: Unit, inputs: Any, **kwargs: Any) -> Any:
    """Any product `input,kernel->output` that keeps the examples apart, first in both."""
    layer = unit.layer
    product = Product.of(layer.equation, len(inputs.shape))
    lora = LowRank.of(unit, "kernel")
    outputs = unit.call_watching_activation(inputs, **kwargs)

    def gradients(g: Any) -> list[tuple[Any, Any]]:
        sizes = _sizes((product.x, inputs), (product.kernel, layer._kernel), (product.z, g))
        g = backend.of_known_sizes(g, [sizes[c] for c in product.z])
        backend.of_known_sizes(inputs, [sizes[c] for c in product.x])
        found = []
        if layer.bias is not None:
            found.append((layer.bias, _bias_gradient(g, layer.bias.shape)))
        if lora is not None:
            found += lora.pairs(*product.low_rank(inputs, g, lora.low, lora.high))
        if unit.trains(layer._kernel):
            found.append((layer._kernel, product.gradient(inputs, g)))
        return found

    return outputs, gradients


def _bias_gradient(g: Any, shape: tuple[int, ...]) -> Any:
    """Sums over what a bias of this shape, aligned with the last axes, was broadcast along."""
    lead = len(g.shape) - len(shape)
    total = ops.sum(g, axis=tuple(range(1, lead))) if lead > 1 else g
    spread = tuple(1 + k for k, size in enumerate(shape) if size == 1 and g.shape[lead + k] != 1)
    return ops.sum(total, axis=spread, keepdims=True) if spread else total


class Product:
    """An einsum `input,kernel->output`, its letters sorted by what they do.

    Args:
        x, kernel, z: The letters of input, kernel and output, without ellipses.

    Raises:
        NoRule: If it doesn't keep the examples apart.
    """

    def __init__(self, x: str, kernel: str, z: str) -> None:
        self.x, self.kernel, self.z = x, kernel, z
        batch = x[0]
        if z[0] != batch or batch in kernel:
            raise NoRule("its equation doesn't have the examples first in input and output")
        if any(len(set(letters)) < len(letters) for letters in (x, kernel, z)):
            raise NoRule("its equation repeats a letter")
        if any(c not in z and c not in kernel for c in x) or any(
            c not in x and c not in z for c in kernel
        ):
            raise NoRule("its equation sums over a letter of one operand alone")
        self.blocks = "".join(c for c in kernel if c in x and c in z)
        self.inner = "".join(c for c in kernel if c in x and c not in z)
        self.outer = "".join(c for c in kernel if c in z and c not in x)
        self.positions = "".join(c for c in x[1:] if c in z and c not in kernel)

    @classmethod
    def of(cls, equation: str, rank: int) -> Product:
        """From an equation as EinsumDense takes it, for inputs of a rank."""
        operands, z = equation.replace(" ", "").split("->")
        x, kernel = operands.split(",")
        if "..." in equation:
            if "..." in kernel:
                raise NoRule("its equation has an ellipsis in the kernel")
            free = [c for c in "ZYXWVUTSRQPONMLKJIHGFEDCBA" if c not in equation]
            letters = "".join(free[: rank - len(x.replace("...", ""))])
            x, z = x.replace("...", letters), z.replace("...", letters)
        return cls(x, kernel, z)

    def gradient(self, x: Any, g: Any) -> OuterProducts:
        """The kernel's per-example gradients."""
        left = _arranged(x, self.x, self.blocks, self.positions, self.inner)
        right = _arranged(g, self.z, self.blocks, self.positions, self.outer)
        sizes = {c: n for c, n in zip(self.x + self.z, [*x.shape, *g.shape], strict=True)}
        made = self.blocks + self.inner + self.outer
        if made == self.kernel and len(self.inner) == len(self.outer) == 1 and not self.blocks:
            return OuterProducts(left, right)
        return OuterProducts(
            left, right, shape=[sizes[c] for c in made], order=[made.index(c) for c in self.kernel]
        )

    def low_rank(self, x: Any, g: Any, low: Any, high: Any) -> tuple[OuterProducts, OuterProducts]:
        """The gradients of `low` and `high`, whose product along the last axis is the kernel."""
        last, rank = self.kernel[-1], "r"
        if rank in self.x + self.kernel + self.z:
            rank = next(c for c in "abcdefghijklmnopqstuvwxyz" if c not in self.x + self.z)
        kernel = self.kernel[:-1] + rank
        sizes = _sizes((self.x, x), (self.z, g), (kernel, low), (rank + last, high))

        def product(equation: str, a: Any, b: Any) -> Any:
            # An einsum may forget the sizes that are known.
            made = ops.einsum(equation, a, b)
            return backend.of_known_sizes(made, [sizes[c] for c in equation.partition("->")[2]])

        if last in self.outer:
            z = self.z.replace(last, rank)
            upstream = product(f"{self.z},{rank}{last}->{z}", g, high)
            through = product(f"{self.x},{kernel}->{z}", x, low)
            first = Product(self.x, kernel, z).gradient(x, upstream)
            return first, Product(z, rank + last, self.z).gradient(through, g)
        if last in self.inner:
            reduced = self.x.replace(last, rank)
            inputs = product(f"{self.x},{rank}{last}->{reduced}", x, high)
            back = product(f"{self.z},{kernel}->{reduced}", g, low)
            first = Product(reduced, kernel, self.z).gradient(inputs, g)
            return first, Product(reduced, rank + last, self.x).gradient(back, x)
        raise NoRule("LoRA acts on a letter of its equation that is in input and output")


def _sizes(*named: tuple[str, Any]) -> dict[str, int | None]:
    """The size of each letter, where one of the tensors tells."""
    found: dict[str, int | None] = {}
    for letters, tensor in named:
        for letter, size in zip(letters, tensor.shape, strict=True):
            found[letter] = size if found.get(letter) is None else found[letter]
    return found


def _arranged(tensor: Any, letters: str, blocks: str, positions: str, inner: str) -> Any:
    """Axes in the order examples, blocks, positions, inner, each group merged into one axis."""
    wanted = letters[0] + blocks + positions + inner
    order = [letters.index(c) for c in wanted]
    if order != sorted(order):
        tensor = ops.transpose(tensor, order)
    shape = list(tensor.shape)
    first, second = 1 + len(blocks), 1 + len(blocks) + len(positions)
    width = math.prod(shape[second:])
    # One axis at most may have a size that isn't known.
    rows = -1 if None not in shape[1:] else ops.shape(tensor)[0]
    sizes: list[Any] = [rows if shape[0] is None else shape[0]]
    if blocks:
        sizes.append(math.prod(shape[1:first]))
    if positions or blocks:
        known = None not in shape[first:second]
        sizes.append(math.prod(shape[first:second]) if known else -1)
    return ops.reshape(tensor, [*sizes, width])
