"""Marks for tests that need XLA's compilers for TPUs or GPUs, and the bar of overlap."""

# ruff: noqa: E501
import importlib.util

import pytest

from ladder_jax.hardware import aot

needs_tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason=f"no libtpu: {aot.INSTALL}"
)
needs_gpu = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins.xla_cuda12") is None
    if importlib.util.find_spec("jax_plugins")
    else True,
    reason=f"no jax-cuda12-plugin: {aot.INSTALL}",
)
aot.prepare()


def hides(result):
    """Whether what is waited for is near what no order of instructions hides: the bar of docs/overlap.md."""
    totals = result["totals"]
    return (
        totals["exposed_us"]
        <= 1.1 * totals["unavoidable_us"] + 0.05 * totals["communication_us"]
    )
