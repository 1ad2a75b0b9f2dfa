"""Weights stored with their outputs first, as products on a CPU read them fastest.

A product of few rows reads such a weight as it lies in memory, and computes columns
(matmul.einsum); of a weight stored with its inputs first, XLA:CPU would write a copy in
another order for every product.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OutputMajor:
    """A matrix whose array has the outputs' dimensions before those that are summed.

    The matrix itself has them the other way round. It takes the matrix's place as the
    value of a nnx.Param; stacked layers have a layer dimension before all others.
    """

    output_major: jax.Array
    outputs: int = field(metadata=dict(static=True))  # how many dimensions they have

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's shape, without a layer dimension."""
        shape = self.output_major.shape
        return shape[self.outputs :] + shape[: self.outputs]

    def __getitem__(self, index: Any) -> "OutputMajor":
        """Itself; only `[...]` is accepted."""
        if index is not ...:
            raise TypeError("an OutputMajor has no index but [...]")
        return self

    def reshape(self, *shape: int) -> "OutputMajor":
        """With other dimensions that products sum over, and the same outputs."""
        summed, outputs = shape[: -self.outputs], shape[-self.outputs :]
        return OutputMajor(self.output_major.reshape(*outputs, *summed), self.outputs)


def output_major(x: jax.Array, axes: Sequence[str], summed: str) -> OutputMajor:
    """`x` with its outputs first.

    Args:
      x: it may have a layer dimension before those that `axes` names.
      axes: the names of the matrix's dimensions.
      summed: those that products sum over, the first ones.
    """
    assert "".join(axes).startswith(summed), (axes, summed)
    stacked, outputs = x.ndim - len(axes), len(axes) - len(summed)
    dims = range(stacked, x.ndim)
    order = *range(stacked), *dims[len(summed) :], *dims[: len(summed)]
    return OutputMajor(jnp.transpose(x, order), outputs)
