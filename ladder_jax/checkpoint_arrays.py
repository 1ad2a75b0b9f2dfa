"""The names of a checkpoint's arrays, and the message where they do not fit a model."""

from typing import Any

import jax
from flax.traverse_util import flatten_dict
from jax.tree_util import GetAttrKey, keystr, tree_leaves_with_path

SECTIONS = ("model", "optimizer")  # the config's sections that decide on the arrays


def named(tree: Any) -> dict[str, Any]:
    """Leaves of a pytree by their path, such as layers/attention/wq.

    The `.value` at the end of a Flax variable's path is left out.
    """
    leaves = tree_leaves_with_path(tree)
    named = {}
    for path, leaf in leaves:
        if path[-1] == GetAttrKey("value"):
            path = path[:-1]
        named[keystr(path, simple=True, separator="/")] = leaf
    assert len(named) == len(leaves), "two leaves have the same name"
    return named


def shapes(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """A pytree's arrays by name: shape, dtype and sharding."""
    return {
        array: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding(x))
        for array, x in named(tree).items()
    }


def _sharding(x: Any) -> jax.sharding.Sharding:
    """The sharding of `x`; if it has none, that of this process's first device."""
    sharding = getattr(x, "sharding", None)
    return sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def misfit(saved: dict[str, Any], wanted: dict[str, Any], cast: bool) -> str | None:
    """A message about the first array that differs between `saved` and `wanted`.

    `saved` are the checkpoint's arrays. None where all fit. With `cast`, floating-point
    dtypes may differ.
    """
    is_float = lambda x: jax.numpy.issubdtype(x.dtype, jax.numpy.floating)
    for array in sorted(wanted.keys() | saved.keys()):
        if array not in saved:
            return f"{array} is not in the checkpoint"
        if array not in wanted:
            return f"{array} is in the checkpoint, but not here"
        there, here = saved[array], wanted[array]
        if jax.numpy.issubdtype(here.dtype, jax.dtypes.prng_key):  # saved as integers
            here = jax.eval_shape(jax.random.key_data, here)
        if there.shape != here.shape:
            return (
                f"{array} has shape {there.shape} in the checkpoint, {here.shape} here"
            )
        may_cast = cast and is_float(there) and is_float(here)
        if there.dtype != here.dtype and not may_cast:
            return f"{array} is {there.dtype} in the checkpoint, {here.dtype} here"
    return None


def differences(saved: dict[str, Any] | None, now: dict[str, Any] | None) -> str:
    """The fields of SECTIONS that differ, in brackets, to end a message; or ""."""

    def flat(config: dict[str, Any] | None) -> dict[str, Any]:
        sections = {name: (config or {}).get(name, {}) for name in SECTIONS}
        return flatten_dict(sections, sep=".")

    there, here = flat(saved), flat(now)
    fields = [
        f"{name}={there[name]!r} in the checkpoint, {here[name]!r} here"
        for name in there.keys() & here.keys()
        if there[name] != here[name]
    ]
    return f" ({'; '.join(sorted(fields))})" if fields else ""
