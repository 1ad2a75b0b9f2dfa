"""Rotary embedding: distances, and every kind of scaling against float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from ladder_jax import rotary
from ladder_jax.config import RopeScaling


def test_with_rotary_embeddings_a_score_depends_on_the_distance_alone():
    """A score depends on the distance of query and key; position 0 is no turn."""
    random = np.random.default_rng(0)
    q, k = (jnp.asarray(random.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in "qk")
    score = lambda i, j: jnp.sum(turn(q, i) * turn(k, j))
    turn = lambda x, at: rotary.rotate(x, rotary.rotary(jnp.full((1, 1), at), 8, 100.0))
    np.testing.assert_array_equal(turn(q, 0), q)
    np.testing.assert_allclose(score(9, 4), score(105, 100), rtol=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_rope_scaling_is_llama_3_1s():
    """Short wavelengths stay, long ones are stretched by the factor.

    (Hugging Face's _compute_llama3_parameters.)
    """
    scaling = RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192
    )
    theta, H = 5e5, 128
    base = theta ** -(np.arange(0, H, 2) / H)
    expected = []
    for frequency in base:
        wavelength = 2 * np.pi / frequency
        smooth = (8192 / wavelength - 1) / (4 - 1)
        expected.append(
            frequency
            if wavelength < 8192 / 4
            else frequency / 8
            if wavelength > 8192
            else (1 - smooth) * frequency / 8 + smooth * frequency
        )
    _, sine = rotary.rotary(jnp.ones((1, 1), jnp.int32), H, theta, scaling)
    np.testing.assert_allclose(sine[0, 0, 0], np.sin(expected), rtol=2e-5)
    assert expected[0] == base[0] and expected[-1] == base[-1] / 8


def yarn_by_the_paper(H, theta, scaling):
    """Frequencies in Python's float64: one pair of dimensions after the other."""
    turns_at = lambda turns: (
        H
        * math.log(scaling.original_length / (turns * 2 * math.pi))
        / (2 * math.log(theta))
    )
    low, high = turns_at(scaling.beta_fast), turns_at(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, H - 1)
    result = []
    for i in range(H // 2):
        frequency = theta ** (-2 * i / H)
        share = min(max((i - low) / (high - low), 0), 1)
        result.append(frequency * (1 - share) + frequency / scaling.factor * share)
    return result


YARN = RopeScaling(kind="yarn", factor=4.0, original_length=32768)
SCALED = {
    "linear": (RopeScaling(kind="linear", factor=2.5), 1.0),
    "yarn": (YARN, 0.1 * math.log(4) + 1),
    "yarn, no truncation": (
        RopeScaling(
            kind="yarn",
            factor=16.0,
            original_length=4096,
            beta_fast=20.0,
            beta_slow=2.0,
            truncate=False,
            attention_factor=1.5,
        ),
        1.5,
    ),
    "yarn, mscale": (
        RopeScaling(
            kind="yarn",
            factor=40.0,
            original_length=4096,
            mscale=0.7,
            mscale_all_dim=1.2,
        ),
        (0.07 * math.log(40) + 1) / (0.12 * math.log(40) + 1),
    ),
}


@pytest.mark.parametrize("H, theta", [(128, 1e6), (64, 1e4), (8, 5e5)])
@pytest.mark.parametrize("name", SCALED)
def test_angles_at_long_positions_are_those_of_float64(name, H, theta):
    """A float32 angle near 131072 is exact to 0.004 radians, and so is a frequency."""
    scaling, factor = SCALED[name]
    exact = np.array(
        yarn_by_the_paper(H, theta, scaling)
        if scaling.kind == "yarn"
        else [theta ** (-2 * i / H) / scaling.factor for i in range(H // 2)]
    )
    frequencies = np.asarray(rotary.frequencies(H, theta, scaling))
    np.testing.assert_allclose(frequencies, exact, rtol=6.1e-8)
    positions = np.array([[0, 1, 77, 4095, 32767, 131071]])
    cosine, sine = rotary.rotary(jnp.asarray(positions), H, theta, scaling)
    angles = positions[..., None, None] * exact
    error = 1.2e-7 * angles * factor + 1e-6
    assert (np.abs(cosine - factor * np.cos(angles)) <= error).all()
    assert (np.abs(sine - factor * np.sin(angles)) <= error).all()


def test_yarn_leaves_high_frequencies_and_divides_low_ones():
    plain = np.asarray(rotary.frequencies(128, 1e6))
    scaled = np.asarray(rotary.frequencies(128, 1e6, YARN))
    ratio = plain / scaled
    assert ratio[0] == pytest.approx(1) and ratio[-1] == pytest.approx(4)
    assert (np.diff(ratio) > -1e-6).all()


@pytest.mark.parametrize("kind", ["llama3", "linear"])
def test_a_factor_of_one_is_no_scaling(kind):
    scaled = rotary.frequencies(64, 1e4, RopeScaling(kind=kind))
    np.testing.assert_allclose(scaled, rotary.frequencies(64, 1e4), rtol=2e-7)
    assert rotary.attention_factor(RopeScaling(kind=kind)) == 1
