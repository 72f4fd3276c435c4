"""Rotary positions against complex numbers, and the scalings against their formulas."""

from __future__ import annotations

import jax
import numpy as np
from meshwright.models import preset
from meshwright.models.transformer.attention import inverse_frequencies, rotate, rotation


def test_rotation_is_multiplication_by_unit_complex_numbers() -> None:
    config = preset("tiny")
    x = np.random.default_rng(0).normal(size=(2, 5, 3, config.head_dim)).astype(np.float32)
    positions = np.array([[0, 1, 2, 0, 1], [7, 8, 9, 100, 3]], np.int32)
    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    half = config.head_dim // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * positions[..., None, None] * frequencies)
    wanted = np.concatenate((turned.real, turned.imag), axis=-1)
    got = rotate(x, *rotation(jax.numpy.asarray(positions), inverse_frequencies(config)))
    np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_llama3_scaling_keeps_fast_pairs_and_slows_slow_ones() -> None:
    plain = inverse_frequencies(preset("llama3-8b"))
    scaled = inverse_frequencies(preset("llama3-405b"))
    wavelength = 2 * np.pi / plain
    np.testing.assert_allclose(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4], rtol=1e-6)
    np.testing.assert_allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-6)
    between = (wavelength > 8192 / 4) & (wavelength < 8192)
    smooth = (8192 / wavelength[between] - 1) / (4 - 1)
    wanted = (1 - smooth) * plain[between] / 8 + smooth * plain[between]
    assert between.any()
    np.testing.assert_allclose(scaled[between], wanted, rtol=1e-5)


def test_gemma_turns_global_layers_eight_times_slower_and_local_ones_by_their_own_theta() -> None:
    config = preset("gemma3-27b")
    pairs = np.arange(0, config.head_dim, 2) / config.head_dim
    np.testing.assert_allclose(inverse_frequencies(config), 1e6**-pairs / 8, rtol=1e-5)
    np.testing.assert_allclose(inverse_frequencies(config, local=True), 1e4**-pairs, rtol=1e-5)
