"""Rotary position embedding (arXiv 2104.09864), and its scaling for longer contexts.

B batch, T tokens, N heads, H head dimension; F = H / 2 frequencies.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ladder_jax.config import RopeScaling


def rotary(
    positions_BT: jax.Array,
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The cosines and sines that `rotate` takes, [B, T, 1, F] float32.

    Args:
      positions_BT: the tokens' positions.
      head_dim: H.
      theta: the base of the wavelengths.
      scaling: see `frequencies`. yarn multiplies cosines and sines by a factor.
    """
    frequency_F = frequencies(head_dim, theta, scaling)
    angle_BTF = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_F
    factor = attention_factor(scaling)
    if factor == 1:
        return jnp.cos(angle_BTF), jnp.sin(angle_BTF)
    return factor * jnp.cos(angle_BTF), factor * jnp.sin(angle_BTF)


def rotate(x_BTNH: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """`x` rotated by `rotary`'s angles.

    Element i of the first half pairs with element i of the second, as in the Hugging
    Face layout of Llama weights.
    """
    cosine, sine = rotation
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = lax.concatenate([a * cosine - b * sine, b * cosine + a * sine], 3)
    return rotated.astype(x_BTNH.dtype)


def frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> jax.Array:
    """The frequencies [F] float32, radians a token, from the highest to the lowest.

    linear divides them all by scaling.factor, llama3 and yarn divide the low ones and
    leave the high ones as they are.
    """
    if scaling is not None and scaling.kind != "llama3":
        # In float64: an error of 1e-7 is 0.01 radians at position 100,000.
        exact_F = theta ** -(np.arange(0, head_dim, 2) / head_dim)
        scale_F = np.full(head_dim // 2, 1 / scaling.factor)
        if scaling.kind == "yarn":
            scale_F = _yarn_scale(head_dim, theta, scaling)
        return jnp.asarray(exact_F * scale_F, jnp.float32)
    frequency_F = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None or scaling.factor == 1:
        return frequency_F
    # Wavelengths above original_length / low_freq_factor are stretched by `factor`,
    # those below original_length / high_freq_factor stay, those between are
    # interpolated. First: rotations by each frequency within the original context.
    turns_F = scaling.original_length * frequency_F / (2 * jnp.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # The weight of the unscaled frequency: 1 at high frequencies, 0 at low ones.
    unscaled_F = jnp.clip((turns_F - low) / (high - low), 0, 1)
    return frequency_F * (unscaled_F + (1 - unscaled_F) / scaling.factor)


def _yarn_scale(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """What YaRN (arXiv 2309.00071) multiplies each frequency by, [F] float64.

    1 for those that turn at least beta_fast times in the original context, 1 / factor
    for those that turn at most beta_slow times; in between it falls with the index.
    """

    def index_of(turns: float) -> float:
        """Where among the frequencies one turns so often in the original context."""
        wavelength = scaling.original_length / turns
        return head_dim * math.log(wavelength / (2 * math.pi), theta) / 2

    first, last = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    # These bounds are those of the models' own code.
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    index_F = np.arange(head_dim // 2)
    unscaled_F = 1 - np.clip((index_F - first) / (last - first), 0, 1)
    return unscaled_F + (1 - unscaled_F) / scaling.factor


def attention_factor(scaling: RopeScaling | None) -> float:
    """What yarn multiplies cosines and sines by; scores grow by its square.

    It is scaling.attention_factor, or else follows from the factor (arXiv 2309.00071,
    section 3.4) and, if both are given, from mscale and mscale_all_dim. 1 for the
    other kinds.
    """
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    growth = 0.1 * math.log(max(scaling.factor, 1.0))
    if scaling.mscale is None or scaling.mscale_all_dim is None:
        return 1 + growth
    return (1 + scaling.mscale * growth) / (1 + scaling.mscale_all_dim * growth)
