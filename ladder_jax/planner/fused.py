"""The time of a fused attention kernel, which XLA's compilers do not tell.

cuDNN's kernel cannot be compiled without the library, and XLA:TPU has no estimate of a
Pallas kernel. In place of cuDNN's, a plan can have a stand-in of its arrays alone; the
time of the products is added to the plan's compute.
"""

import jax
import jax.numpy as jnp

# Assumed, of the peak; FlashAttention-3 (arXiv 2407.08608) has 40 to 65% on H100.
EFFICIENCY = 0.5
# Products of the backward pass over those of the forward pass: five over two.
BACKWARD = 2.5


def stand_in(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
    """An array [B, T, N, H] that depends on all three, without a product.

    Like a fused kernel it has no array of T x T scores.
    """
    groups = q_BTNH.shape[2] // k_BTKH.shape[2]
    return q_BTNH + jnp.repeat(k_BTKH + v_BTKH, groups, axis=2)


def seconds(forward_flops: float, recomputes: bool, peak_flops: float) -> float:
    """Seconds of a training step that a device spends in the kernel.

    Args:
      forward_flops: of a device's forward pass.
      recomputes: whether the backward pass runs the forward kernel again.
      peak_flops: of the device.
    """
    passes = 1 + BACKWARD + recomputes
    return passes * forward_flops / (EFFICIENCY * peak_flops)
